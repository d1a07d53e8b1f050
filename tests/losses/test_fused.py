"""The compiled tiles of the softmax losses: the same numbers as torch's, and what happens without a compiler."""

import shutil
from collections.abc import Iterator

import pytest
import torch

from contrastive.errors import UserError
from contrastive.losses import InfoNCE, fuse, fused, infonce
from tests.losses.dense import features, gradients, of_rows, scalar, worst_error
from tests.losses.every_loss import TILED, extras
from tests.losses.test_tiled import ids_of

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("ninja") is None, reason="no C++ compiler or no ninja"
)


@pytest.fixture
def compiled() -> Iterator[None]:
    fuse()
    yield
    fuse(False)


@needs_compiler
def test_an_exponential_and_its_sums_equal_float64(compiled: None) -> None:
    logits = torch.linspace(-80, 80, 70 * 130).view(70, 130)[:, torch.randperm(130)].contiguous()
    exact = (logits.double() - 3).exp()
    row_sum, column_sum, best = torch.ones(70), torch.ones(130), torch.zeros(70)
    fused.exp_sums_(logits, 3.0, row_sum, column_sum, best)
    # a product with log2 e rounds: 6e-8 of the exponent, which is up to 80
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(row_sum.double(), 1 + exact.sum(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(column_sum.double(), 1 + exact.sum(dim=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(best.double(), exact.amax(dim=1), rtol=1e-5, atol=0)


@needs_compiler
def test_infinities_and_nan_stay_what_they_are(compiled: None) -> None:
    x = torch.tensor([[-torch.inf, -1000.0, 0.0, 1000.0, torch.inf, torch.nan]])
    fused.exp_slope_(x, 0.0, torch.ones(1), torch.zeros(6), True)
    torch.testing.assert_close(x, torch.tensor([[0, 0, 1, torch.inf, torch.inf, torch.nan]]), equal_nan=True)


@needs_compiler
@pytest.mark.parametrize(("tile", "images"), [(16, False), ("auto", False), (16, True)])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize(
    "name", [name for name in TILED if "infonce" in name or name in ("dcl", "dcl ignore", "sogclr")]
)
def test_gradients_equal_those_of_float64_loops(
    name: str, scale: float, tile: int | str, images: bool, compiled: None
) -> None:
    variant = TILED[name]
    leaves = *features(1, 41, 24, torch.float32), scalar(scale, torch.float32), scalar(-3.0, torch.float32)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    further = variant.options | extras(variant, 41)
    valid, ids = torch.arange(41) % 5 != 2, ids_of(41)
    if images:  # which are equal for other rows than captions are
        ids = torch.stack([ids, torch.arange(41) // 3], dim=1)
    loss = variant.function(*leaves, ids=ids, valid=valid, tile=tile, **further)["loss"]
    kept = of_rows(valid, further)
    oracle = variant.loops(exact[0][valid], exact[1][valid], *exact[2:], ids[valid], **kept)
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-5)
    assert worst_error(gradients(loss, *leaves)[:3], gradients(oracle, *exact)[:3]) < 1e-5


@needs_compiler
def test_accuracy_and_loss_equal_those_without(compiled: None) -> None:
    leaves = *features(2, 300, 8, torch.float32), scalar(20.0, torch.float32)
    found = infonce(*leaves, tile=64)
    fuse(False)
    expected = infonce(*leaves, tile=64)
    assert found["accuracy"] == expected["accuracy"]
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-6, atol=0)


@needs_compiler
def test_the_compiled_code_is_what_runs(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    whole = fused.exp_sums_
    monkeypatch.setattr(fused, "exp_sums_", lambda *arguments: (called.append(1), whole(*arguments)))
    InfoNCE(tile=16)(*features(0, 32, 8, torch.float32), scalar(5.0, torch.float32))
    assert len(called) == 4


def test_without_a_compiler_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused.torch.ops, "contrastive", object())
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(UserError, match=r"no c\+\+ on PATH"):
        fuse()
