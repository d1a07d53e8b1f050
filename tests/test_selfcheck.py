"""`contrastive selfcheck losses`: it passes here, and it fails when a loss is wrong."""

import pytest

from contrastive import selfcheck
from contrastive.cli import main
from contrastive.losses import InfoNCE


def test_every_loss_is_in_order_on_one_process(capsys):
    assert main(["selfcheck", "losses", "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "0 beyond their bound" in out
    rows = [line.split() for line in out.splitlines() if line[:1].isdigit() and "cases" not in line]
    ways = {tuple(row[:5]) for row in rows}
    assert len(ways) == len(rows) == 3 * 2 * 3  # tiles x chunks x precisions


def test_two_processes_and_the_ring_are_in_order(capsys):
    assert main(["selfcheck", "losses", "--loss", "infonce", "--loss", "siglip", "--processes", "2"]) == 0
    assert "ring" in capsys.readouterr().out


def test_all_losses_of_the_package_are_checked():
    from contrastive import losses

    classes = {type(make(tile=None, exchange="auto")) for make in selfcheck.LOSSES.values()}
    public = {getattr(losses, name) for name in losses.__all__}
    assert {c for c in public if isinstance(c, type) and issubclass(c, losses.Loss)} - {losses.Loss} == classes


class Wrong(InfoNCE):
    """Its tiles are right but for a factor of 1 + 1e-4."""

    def forward(self, *arguments, **keywords):
        result = super().forward(*arguments, **keywords)
        return result if self.options["tile"] is None else result | {"loss": result["loss"] * (1 + 1e-4)}


def test_a_wrong_gradient_fails(capsys, monkeypatch):
    monkeypatch.setitem(selfcheck.LOSSES, "infonce", lambda **options: Wrong(**options))
    found = selfcheck._gradients(selfcheck.Case("infonce", 1, 64, "gather", 1, "float64"), 0, "cpu")
    right = selfcheck._gradients(selfcheck.Case("infonce", 1, None, "gather", 1, "float64"), 0, "cpu")
    errors = {part: selfcheck._error(found[part], right[part]) for part in selfcheck.PARTS}
    case = selfcheck.Case("infonce", 1, 64, "gather", 1, "float64")
    assert errors["image tower"] == pytest.approx(1e-4, rel=1e-3)
    assert not selfcheck.Result(case, errors).passed
    result = selfcheck.Result(case, errors)
    monkeypatch.setattr(selfcheck, "check_losses", lambda *arguments, **keywords: iter([[result]]))
    assert main(["selfcheck", "losses", "--loss", "infonce"]) == 1
    assert "BEYOND ITS BOUND" in capsys.readouterr().out


@pytest.mark.parametrize("words, message", [
    (["--loss", "infonc"], "unknown loss 'infonc'; choose from infonce"),
    (["--precision", "float16"], "unknown precision 'float16'"),
    (["--processes", "7"], "7 processes do not divide 300 rows"),
])  # fmt: skip
def test_a_wrong_option_is_one_line(capsys, words, message):
    assert main(["selfcheck", "losses", *words]) == 2
    assert message in capsys.readouterr().err
