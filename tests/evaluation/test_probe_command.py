import pytest

from contrastive.cli.probe import _shares, _strengths
from contrastive.errors import UserError
from tests.evaluation.test_commands import command, saved  # noqa: F401  (a fixture)


@pytest.mark.parametrize(
    ("text", "strengths"), [(None, None), ("clip", "clip"), ("dinov2", "dinov2"), ("2", 2.0), ("1,1e3", [1.0, 1000.0])]
)
def test_strengths_are_a_preset_a_number_or_several(text, strengths):
    assert _strengths(text) == strengths


@pytest.mark.parametrize("text", ["clap", "1,x", ""])
def test_a_strength_that_is_neither_is_told(text):
    with pytest.raises(UserError, match="--C .*clip, dinov2"):
        _strengths(text)


def test_a_share_that_is_no_number_is_told():
    with pytest.raises(UserError, match="--partial half"):
        _shares("half")


def test_parts_of_the_training_set_and_the_commonest_class_are_in_the_table(saved, labelled, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "probe.safetensors"
    options = ("--test", labelled, "--C", "1", "--partial", "0.3,1")
    assert command("probe", "fit", saved, labelled, file, *options) == 0
    out = capsys.readouterr().out
    assert "the model, 30 % (16)" in out and "the model, 100 % (48)" in out
    assert "always the commonest class: 25.0 %" in out


def test_parts_without_a_test_set_end_with_one_line(saved, labelled, tmp_path, capsys):  # noqa: F811
    assert command("probe", "fit", saved, labelled, tmp_path / "probe.safetensors", "--partial", "0.1") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: partial") and error.count("\n") == 1
