"""One caption, or one image, for nearly all pairs is said at the start."""

from pathlib import Path

import pytest
from PIL import Image

from contrastive.preflight import repeated_content
from contrastive.pretrain import dry_run, pretrain
from contrastive.shards import Mixture, open_index, open_source, write_shards
from tests.tiny import COLOURS, tiny_config


def write_pairs(folder: Path, captions: list[str], images: int | None = None) -> Path:
    """Shards of as many pairs as captions; `images` of the pictures differ, all where it is None."""
    source = folder / "images"
    source.mkdir(parents=True)
    for number, caption in enumerate(captions):
        kind = number if images is None else min(number, images - 1)
        Image.new("RGB", (8, 8), (kind % 256, kind // 256, 0)).save(source / f"{number:04d}.png")
        (source / f"{number:04d}.txt").write_text(caption)
    write_shards(open_source(source), folder / "shards")
    return folder / "shards"


@pytest.mark.parametrize("captions", [
    ["a photo"] * 40,
    ["a photo", "A  PHOTO "] * 20,  # the same but for case and blanks
    ["a photo"] * 198 + ["one", "two"],
], ids=["all", "case", "99 %"])  # fmt: skip
def test_one_caption_for_nearly_all_pairs_is_said(tmp_path, captions):
    index = open_index(write_pairs(tmp_path, captions))
    (line,) = repeated_content("data.validation", index)
    assert line.startswith("warning: data.validation: ") and "have the same caption, 'a photo'" in line


@pytest.mark.parametrize("captions", [["a photo"] * 195 + list("abcde"), [str(n) for n in range(40)], COLOURS * 3])
def test_captions_that_differ_are_not_worth_a_line(tmp_path, captions):
    assert not list(repeated_content("data.train", open_index(write_pairs(tmp_path, captions))))


def test_one_image_for_all_pairs_is_said(tmp_path):
    index = open_index(write_pairs(tmp_path, [str(n) for n in range(20)], images=1))
    (line,) = repeated_content("data.train", index)
    assert "100.0% of the pairs have the same image" in line


def test_a_set_counts_as_often_as_it_is_drawn(tmp_path):
    same = open_index(write_pairs(tmp_path / "same", ["a photo"] * 5))
    other = open_index(write_pairs(tmp_path / "other", [str(n) for n in range(50)]))
    assert not list(repeated_content("data.train", Mixture([same, other], [1, 1])))
    assert list(repeated_content("data.train", Mixture([same, other], [199, 1])))


def test_a_run_and_a_dry_run_say_it(tmp_path, capsys):
    shards = write_pairs(tmp_path, ["a photo"] * 40)
    config = tiny_config(
        tmp_path, tmp_path / "run", f"data.train={shards}", f"data.validation={shards}", "train.steps=1"
    )
    assert "warning: data.train: 100.0% of the pairs have the same caption" in dry_run(config)
    pretrain(config, quiet=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [line.split(": ")[1] for line in lines] == ["data.train", "data.validation"]
