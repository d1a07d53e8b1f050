"""Embeddings that are kept on disk: the same rows, from any number of ranks, and never stale ones."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from contrastive.errors import UserError
from contrastive.evaluation import embed, stored
from contrastive.shards import open_index, open_source, write_shards
from tests.distributed.spawn import run_ranks
from tests.evaluation.fake import NAMES, ColourModel, square

OPTIONS = {"features": "both", "text": "all", "batch_size": 4}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(stored, "PART", 3)


class Counting(ColourModel):
    """Counts the images that go through the tower."""

    seen = 0

    def image_features(self, pixels):
        Counting.seen += len(pixels)
        return super().image_features(pixels)


@pytest.fixture
def counting():
    Counting.seen = 0
    return Counting()


def same(found, expected, rounding=1e-6):
    """Equal up to `rounding`: parts of the cache are other batches, which may be summed in another order."""
    for name in ("image", "image_tower", "text", "text_tower", "looks", "image_of_text"):
        ours, theirs = np.asarray(getattr(found, name)), np.asarray(getattr(expected, name))
        if rounding and ours.dtype.kind == "f":
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=rounding, err_msg=name)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
    for name in ("keys", "captions", "labels", "failures"):
        assert getattr(found, name) == getattr(expected, name), name


def test_both_kinds_of_features_come_from_one_pass(counting, pairs):
    found = embed(counting, pairs, **OPTIONS)
    assert Counting.seen == 8
    np.testing.assert_allclose(found.image, embed(counting, pairs).image, atol=1e-6)
    np.testing.assert_allclose(found.image_tower, embed(counting, pairs, features="tower").image, atol=1e-6)
    np.testing.assert_allclose(found.text, embed(counting, pairs).text, atol=1e-6)
    np.testing.assert_allclose(found.text_tower, embed(counting, pairs, features="tower").text, atol=1e-6)


def with_captions(pairs, number, captions):
    """The pairs as a table, in which one image has other captions."""
    rows = [{"image": f"pairs/{i}.png", "captions": [(pairs / f"{i}.txt").read_text()]} for i in range(8)]
    rows[number]["captions"] = captions
    table = pairs.parent / "several.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def test_every_caption_has_a_row_and_knows_its_image(model, pairs):
    table = with_captions(pairs, 1, ["green square", "red", "blue"])
    found = embed(model, table, text="all")
    assert found.image_of_text.tolist() == [0, 1, 1, 1, 2, 3, 4, 5, 6, 7]
    assert found.captions[1:4] == ["green square", "red", "blue"] and len(found.text) == 10
    np.testing.assert_allclose(found.text[2], embed(model, pairs).text[0], atol=0.1)  # red beside "red square"


def test_the_cache_gives_the_rows_of_a_plain_pass_and_encodes_nothing_twice(counting, pairs, tmp_path):
    table = with_captions(pairs, 1, ["green square", "red"])
    expected = embed(counting, table, **OPTIONS)
    Counting.seen = 0
    first = embed(counting, table, cache=tmp_path / "c", **OPTIONS)
    same(first, expected)
    again = embed(counting, table, cache=tmp_path / "c", **OPTIONS)
    same(again, first, rounding=0)
    assert Counting.seen == 8
    assert isinstance(again.image, np.memmap) and isinstance(again.text, np.memmap)


def test_every_form_of_source_may_be_kept(model, pairs, tmp_path):
    write_shards(open_source(pairs), tmp_path / "shards")
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{p},a\n" for p in sorted(pairs.glob("*.png"))))
    files = sorted(pairs.glob("*.png"))
    rows = {"image": [{"bytes": file.read_bytes(), "path": file.name} for file in files]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "on disk"))
    expected = embed(model, pairs).image
    images = [square(NAMES[n % 4], n) for n in range(8)]
    for source in (
        pairs, open_index(tmp_path / "shards"), tmp_path / "shards", str(pairs / "*.png"),
        files, images, tmp_path / "t.csv", tmp_path / "t.parquet", tmp_path / "on disk",
    ):  # fmt: skip
        for _ in range(2):
            found = embed(model, source, cache=tmp_path / "c", text=False).image
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # other batches than without a cache


def change_weight(model, pairs):
    with torch.no_grad():
        model.logit_scale += 1


def change_buffer(model, pairs):
    model.register_buffer("pixel_mean", torch.ones(3), persistent=False)


def change_setting(model, pairs):
    model.image_size = 6


def change_transform(model, pairs):
    plain = model.preprocess
    model.preprocess = lambda image: plain(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def change_tokens(model, pairs):
    plain = model.tokenize
    model.tokenize = lambda texts: plain([text.replace("red", "blue") for text in texts])


def change_pixel(model, pairs):
    image = Image.open(pairs / "4.png")
    image.putpixel((3, 3), (1, 2, 3))
    image.save(pairs / "4.png")


def change_caption(model, pairs):
    (pairs / "4.txt").write_text("yellow square")


@pytest.mark.parametrize(
    "change",
    [change_weight, change_buffer, change_setting, change_transform, change_tokens, change_pixel, change_caption],
)
def test_a_stale_cache_is_not_read(counting, pairs, tmp_path, change):
    embed(counting, pairs, cache=tmp_path / "c", **OPTIONS)
    for rows in (tmp_path / "c").glob("*/*.npy"):  # what was kept would be seen to be wrong
        memory = np.load(rows, mmap_mode="r+")
        memory[:] = 7
        memory.flush()
    change(counting, pairs)
    found, expected = (embed(counting, pairs, cache=cache, **OPTIONS) for cache in (tmp_path / "c", None))
    part = slice(3, 6)  # of three items, the one with image 4
    if change is not change_tokens:
        np.testing.assert_allclose(found.image_tower[part], expected.image_tower[part], rtol=0, atol=1e-6)
    if change is not change_pixel:
        np.testing.assert_allclose(found.text_tower[part], expected.text_tower[part], rtol=0, atol=1e-6)


def test_another_precision_or_inversion_is_another_cache(counting, pairs, tmp_path):
    plain = embed(counting, pairs, cache=tmp_path, **OPTIONS)
    half = embed(counting, pairs, cache=tmp_path, dtype=torch.bfloat16, **OPTIONS)
    inverted = embed(counting, pairs, cache=tmp_path, invert=True, **OPTIONS)
    assert Counting.seen == 24 and len(half.image) == 8
    assert not np.array_equal(plain.image, inverted.image)


def test_one_changed_image_costs_its_part_only(counting, pairs, tmp_path):
    embed(counting, pairs, cache=tmp_path / "c", **OPTIONS)
    change_pixel(counting, pairs)
    Counting.seen = 0
    embed(counting, pairs, cache=tmp_path / "c", **OPTIONS)
    assert Counting.seen == 3


def test_a_killed_run_goes_on_where_it_was(counting, pairs, tmp_path):
    def kill(done, total):
        if done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(counting, pairs, cache=tmp_path, progress=kill, **OPTIONS)
    assert Counting.seen == 6
    found = embed(counting, pairs, cache=tmp_path, **OPTIONS)
    assert Counting.seen == 8
    same(found, embed(counting, pairs, **OPTIONS))


def test_a_part_whose_file_is_cut_off_is_made_again(counting, pairs, tmp_path):
    embed(counting, pairs, cache=tmp_path, **OPTIONS)
    (part,) = tmp_path.glob("*/parts/image-000001.json")
    part.write_text(part.read_text()[:20])
    same(embed(counting, pairs, cache=tmp_path, **OPTIONS), embed(ColourModel(), pairs, **OPTIONS))
    assert Counting.seen == 8 + 3


def test_unreadable_images_are_listed_and_not_fatal_below_a_limit(model, pairs, tmp_path):
    (pairs / "3.png").write_bytes(b"no image")
    for cache in (None, tmp_path / "c", tmp_path / "c"):
        found = embed(model, pairs, cache=cache, max_unreadable=0.2, **OPTIONS)
        assert found.failures == {"3.png": "not an image"} and found.keys == [f"{n}.png" for n in (0, 1, 2, 4, 5, 6, 7)]
        assert len(found.image) == len(found.text) == len(found.looks) == 7
        with pytest.raises(UserError, match=r"1 of 8 images cannot be read \(1 × not an image; first 3.png\).*10.0%"):
            embed(model, pairs, cache=cache, max_unreadable=0.1, **OPTIONS)
    summary = json.loads(next((tmp_path / "c").glob("*/summary.json")).read_text())
    assert summary["failures"] == {"3.png": "not an image"} and summary["rows"] == 7


def test_a_key_that_occurs_twice_is_told_apart_by_its_place(model, tmp_path):
    square("red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "t.csv").write_text("image,key\na.png,x\nb.png,x\na.png,y\n")
    found = embed(model, tmp_path / "t.csv", cache=tmp_path / "c", text=False)
    assert found.keys == ["x", "y"] and len(found.image) == 2


def on_ranks(rank, world, pairs, cache):
    stored.PART = 3
    model = Counting()
    Counting.seen = 0
    found = embed(model, pairs, cache=cache, **OPTIONS)
    return Counting.seen, found.keys, np.array(found.image), np.array(found.text_tower), found.failures


def test_two_ranks_share_the_work_and_find_what_one_finds(pairs, tmp_path):
    (pairs / "5.png").write_bytes(b"no image")
    expected = embed(Counting(), pairs, **OPTIONS)
    first, second = run_ranks(2, on_ranks, pairs, tmp_path / "c")
    assert (first[0], second[0]) == (3, 4)  # parts of 3, 2 and 2 readable images: one rank has one, the other two
    for _, keys, image, text_tower, failures in (first, second):
        assert keys == expected.keys and failures == expected.failures
        np.testing.assert_allclose(image, expected.image, rtol=0, atol=1e-6)
        np.testing.assert_allclose(text_tower, expected.text_tower, rtol=0, atol=1e-6)
    Counting.seen = 0
    same(embed(Counting(), pairs, cache=tmp_path / "c", **OPTIONS), expected)
    assert Counting.seen == 0  # one process reads what two have made


def test_rows_that_were_cut_off_are_told_with_the_remedy(counting, pairs, tmp_path):
    embed(counting, pairs, cache=tmp_path / "kept")
    (file,) = (tmp_path / "kept").rglob("image.npy")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="is damaged; delete"):
        embed(counting, pairs, cache=tmp_path / "kept")
