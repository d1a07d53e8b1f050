"""Every command that reads a set takes one split of a folder that holds several."""

import json
import shutil

import pytest

from tests.evaluation.test_commands import command, saved  # noqa: F401  (a fixture)

ASKS = "holds several splits: train, test; choose one, as in --split train"


@pytest.fixture
def splits(labelled, tmp_path):
    """The labelled set twice: its train split has eleven images a class, its test split has all twelve."""
    for split in ("train", "test"):
        shutil.copytree(labelled, tmp_path / "splits" / split)
    for image in (tmp_path / "splits" / "train").glob("*/11.png"):
        image.unlink()
    return tmp_path / "splits"


def test_classify_takes_one_split(saved, splits, capsys):  # noqa: F811
    options = ("--labels", "red,blue", "--top-k", 1, "--format", "json")
    assert command("classify", saved, splits, *options) == 2
    assert ASKS in capsys.readouterr().err
    assert command("classify", saved, splits, *options, "--split", "train") == 0
    assert len(json.loads(capsys.readouterr().out)) == 44


def test_embed_takes_one_split(saved, splits, tmp_path, capsys):  # noqa: F811
    assert command("embed", saved, splits, tmp_path / "kept") == 2
    assert ASKS in capsys.readouterr().err
    for split, count in (("train", 44), ("test", 48)):
        assert command("embed", saved, splits, tmp_path / "kept", "--split", split) == 0
        assert f"{count} images, 0 captions" in capsys.readouterr().out


def test_evaluate_takes_a_split_of_each_set(saved, splits, tmp_path, capsys):  # noqa: F811
    options = ("--tasks", "knn", "--train", splits, "--json", tmp_path / "found.json")
    assert command("evaluate", saved, splits, *options, "--split", "test") == 2
    assert "--train-split" in capsys.readouterr().err
    assert command("evaluate", saved, splits, *options, "--split", "test", "--train-split", "train") == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())["sets"].values()
    assert (found["name"], found["samples"]) == ("splits test", 48)


def test_probe_fit_takes_a_split_of_each_set(saved, splits, tmp_path, capsys):  # noqa: F811
    fit = ("probe", "fit", saved, splits, tmp_path / "probe.safetensors", "--C", 1)
    assert command(*fit) == 2
    assert ASKS in capsys.readouterr().err
    assert command(*fit, "--split", "train", "--test", splits, "--test-split", "test") == 0
    assert "44 training images, 4 classes; 48 test images" in capsys.readouterr().out
    assert command(*fit, "--split", "train", "--test-split", "test") == 2
    assert "split test: of which set?" in capsys.readouterr().err


def test_labels_are_missed_by_name_where_an_image_lies_beside_the_class_folders(saved, labelled, tmp_path, capsys):  # noqa: F811
    shutil.copy(labelled / "red" / "00.png", labelled / "00.png")
    assert command("probe", "fit", saved, labelled, tmp_path / "probe.safetensors") == 2
    assert "00.png is outside the class folders and has no label" in capsys.readouterr().err


def test_an_image_whose_caption_cannot_be_read_is_classified(saved, pairs, capsys):  # noqa: F811
    (pairs / "0.txt").write_bytes("Müll".encode("latin-1"))
    assert command("classify", saved, pairs, "--labels", "red,blue", "--top-k", 1, "--format", "json") == 0
    assert [row["error"] for row in json.loads(capsys.readouterr().out)] == [""] * 8
