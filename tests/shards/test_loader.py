import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contrastive.errors import UserError
from contrastive.shards import (
    Augment,
    Batch,
    Mixture,
    PairLoader,
    Record,
    Rejected,
    ShardIndex,
    augment_pixels,
    open_index,
    resize_square,
    why_not_compiled,
    write_shards,
)
from contrastive.shards.augment import DRAWS
from contrastive.shards.decode import decode_image
from contrastive.shards.features import FeatureLoader
from contrastive.shards.index import caption_id
from contrastive.shards.loader import threads_of
from contrastive.shards.order import draws

from .conftest import encoded, lengths, records

Shards = Callable[..., ShardIndex]
STRONG = Augment((0.4, 1), flip=0.5, rotate=20, color=0.4, grayscale=0.2, tint=0.3)


needs_compiler = pytest.mark.skipif(why_not_compiled() is not None, reason=f"{why_not_compiled()}")


def load(index: ShardIndex | Mixture, **options: Any) -> list[Batch]:
    defaults: dict[str, Any] = {"image_size": 12, "augment": STRONG, "global_batch": 4, "seed": 5, "steps": 6}
    return list(PairLoader(index, tokenize=lengths, **{**defaults, **options}))


def joined(batches: list[Batch]) -> dict[str, Any]:
    """One dictionary that two equal streams share."""
    tensors = {name: torch.cat([getattr(b, name) for b in batches]) for name in ("pixels", "tokens", "ids", "valid")}
    values = {name: tensor.tolist() for name, tensor in tensors.items()}
    return {**values, "keys": [key for b in batches for key in b.keys]}


def test_a_batch_has_the_promised_shapes(shards: Shards) -> None:
    batch = load(shards(records(10)))[0]
    assert (batch.pixels.dtype, tuple(batch.pixels.shape)) == (torch.uint8, (4, 3, 12, 12))
    assert (batch.tokens.dtype, tuple(batch.tokens.shape)) == (torch.int64, (4, 2))
    assert (batch.ids.dtype, batch.valid.tolist(), batch.rejected) == (torch.int64, [True] * 4, [])


def test_each_image_is_changed_by_the_numbers_of_its_epoch_and_sample(shards: Shards) -> None:
    items = {item.key: item for item in records(10)}
    for step, batch in enumerate(load(shards(list(items.values())))):
        epochs = np.asarray([(4 * step + row) // 10 for row in range(4)])
        numbers = draws(5, epochs, batch.samples.numpy(), DRAWS + 2)
        for row, key in enumerate(batch.keys):
            pixels = np.asarray(decode_image(items[key].image))
            expected = augment_pixels(pixels, 12, STRONG, numbers[row].tolist())
            assert np.array_equal(batch.pixels[row].permute(1, 2, 0).numpy(), expected)


def test_rows_belong_together(shards: Shards) -> None:
    items = {item.key: item for item in records(10)}
    index = shards(list(items.values()))
    for batch in load(index, augment=None):
        for row, key in enumerate(batch.keys):
            item = items[key]
            assert item.image is not None
            assert np.array_equal(batch.pixels[row].numpy(), resize_square(decode_image(item.image), 12))
            assert batch.tokens[row].tolist() == lengths([item.captions[0]])[0].tolist()
            assert batch.ids[row] == index.ids[int(item.meta["number"])]


def with_repeats(count: int, repeats: int) -> list[Record]:
    """Records of which the last `repeats` have the images of the first ones, and captions of their own."""
    items = records(count)
    return [replace(item, image=items[(n + repeats) % count].image) if n >= count - repeats else item
            for n, item in enumerate(items)]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cache", [False, True])
def test_where_an_image_occurs_twice_ids_are_of_captions_and_images(shards: Shards, cache: bool, workers: int) -> None:
    index = shards(with_repeats(10, 1))
    for batch in load(index, cache=cache, workers=workers):  # of those without a repeat, too
        assert batch.ids.shape == (4, 2)
        assert batch.ids[:, 0].tolist() == index.ids[batch.samples].tolist()
        assert batch.ids[:, 1].tolist() == index.image_ids[batch.samples].tolist()


def test_another_caption_of_a_sample_changes_the_id_of_its_caption_alone(shards: Shards) -> None:
    index = shards(with_repeats(8, 2))
    (batch,) = load(index, caption_variants=1.0, global_batch=8, steps=1)
    assert batch.ids[:, 0].tolist() == [caption_id(f"variant {i}") for i in batch.samples.tolist()]
    assert batch.ids[:, 1].tolist() == index.image_ids[batch.samples].tolist()
    assert len(batch.ids[:, 1].unique()) == 6


def test_an_image_in_two_sets_of_a_mixture_is_an_equal_one(shards: Shards) -> None:
    first, second = shards(records(6), "a"), shards(with_repeats(9, 3)[6:], "b")
    (batch,) = load(Mixture([first, second]), global_batch=12, steps=1)
    assert batch.ids.shape == (12, 2) and len(batch.ids[:, 1].unique()) == 6
    (alone,) = load(first, global_batch=6, steps=1)
    assert alone.ids.shape == (6,)


def test_features_in_place_of_pixels_have_the_same_ids(shards: Shards) -> None:
    for number, repeats in enumerate((0, 2)):
        index = shards(with_repeats(8, repeats), str(number))
        features = np.zeros((8, 3), np.float32)
        loader = FeatureLoader(index, features, features, {}, global_batch=4, seed=5)
        for batch, expected in zip(loader, load(index, steps=3), strict=False):
            assert batch.ids.tolist() == expected.ids.tolist()


def test_a_run_whose_ids_were_of_captions_alone_is_not_gone_on_with_others(shards: Shards) -> None:
    options: dict[str, Any] = {"tokenize": lengths, "image_size": 12, "augment": None, "global_batch": 4}
    plain, repeated = (PairLoader(shards(with_repeats(8, n), str(n)), **options).identity for n in (0, 2))
    assert "ids" not in plain and repeated["ids"] == "captions and images"


def test_every_sample_comes_once_an_epoch_across_straddling_batches(shards: Shards) -> None:
    keys = joined(load(shards(records(10)), steps=5))["keys"]  # 20 samples: two epochs, the third batch has both
    assert sorted(keys[:10]) == sorted(keys[10:]) == [f"sample-{i:03d}" for i in range(10)]
    assert keys[:10] != keys[10:]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_have_the_batches_of_one_process(shards: Shards, world: int) -> None:
    index = shards(records(10))
    whole = load(index)
    ranks = [load(index, rank=rank, world=world) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert joined([rank[step] for rank in ranks]) == joined([batch])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_batches(shards: Shards, workers: int) -> None:
    index = shards(records(10))
    assert joined(load(index, workers=workers, caption_variants=0.5)) == joined(load(index, caption_variants=0.5))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_later_start_continues_the_same_stream(shards: Shards, workers: int) -> None:
    index = shards(records(10))
    assert joined(load(index, start_step=4, workers=workers)) == joined(load(index)[4:])


@pytest.mark.parametrize("workers", [0, 1])
def test_without_a_number_of_steps_there_is_no_end(shards: Shards, workers: int) -> None:
    index = shards(records(3))
    loader = PairLoader(
        index, tokenize=lengths, image_size=8, augment=None, global_batch=2, workers=workers, start_step=1
    )
    assert joined(list(itertools.islice(loader, 9))) == joined(
        load(index, image_size=8, augment=None, global_batch=2, seed=0, start_step=1, steps=10)
    )


def test_augmentation_differs_between_epochs(shards: Shards) -> None:
    first, second = load(shards(records(4)), steps=2)
    row, again = first.keys.index("sample-000"), second.keys.index("sample-000")
    assert not torch.equal(first.pixels[row], second.pixels[again])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_random_stream_of_the_model_is_left_alone(shards: Shards, workers: int) -> None:
    index = shards(records(4))
    before = torch.get_rng_state()
    load(index, workers=workers, steps=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bad_sample_is_counted_and_stays_in_its_place(shards: Shards) -> None:
    items = records(8)
    items[3] = replace(items[3], image=encoded(3)[:200])
    items[6] = replace(items[6], image=b"\x89PNG\r\n\x1a\n but no more")
    (batch,) = load(shards(items), global_batch=8, steps=1)
    (whole,) = load(shards(records(8), "good"), global_batch=8, steps=1)
    bad = [key for key, valid in zip(batch.keys, batch.valid.tolist(), strict=True) if not valid]
    assert sorted(bad) == ["sample-003", "sample-006"]
    assert sorted(one.key for one in batch.rejected) == sorted(bad)
    assert {(one.key, one.reason, one.epoch, Path(one.shard).name) for one in batch.rejected} == {
        ("sample-003", "truncated or damaged", 0, "00000.tar"),
        ("sample-006", "truncated or damaged", 0, "00001.tar"),
    }
    assert batch.pixels[~batch.valid].max() == 0
    assert batch.tokens[~batch.valid].tolist() == lengths(["", ""]).tolist()
    assert batch.keys == whole.keys
    assert torch.equal(batch.pixels[batch.valid], whole.pixels[batch.valid])


@pytest.mark.parametrize("part", ["pair", "variants"])
def test_what_a_shard_refuses_to_give_is_a_rejection_in_its_place(
    shards: Shards, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    index = shards(records(8))
    whole = getattr(ShardIndex, part)

    def refuse(self: ShardIndex, i: int) -> Any:
        if i == 3:
            raise Rejected("shard changed since indexing")
        return whole(self, i)

    monkeypatch.setattr(ShardIndex, part, refuse)
    chance = 1.0 if part == "variants" else 0.0
    (batch,) = load(index, global_batch=8, steps=1, caption_variants=chance)
    row = batch.keys.index("sample-003")
    assert [(one.key, one.reason) for one in batch.rejected] == [("sample-003", "shard changed since indexing")]
    assert (~batch.valid).nonzero().tolist() == [[row]]
    assert batch.pixels[row].max() == 0 and batch.tokens[row].tolist() == lengths([""])[0].tolist()


def test_variants_are_drawn_as_often_as_asked(shards: Shards) -> None:
    index = shards([Record(str(i), encoded(i), ("first", "v1", "v2")) for i in range(40)])
    batches = load(index, augment=None, image_size=4, global_batch=40, steps=25, caption_variants=0.25)
    drawn = [tuple(tokens) for batch in batches for tokens in batch.tokens.tolist()]
    counts = [drawn.count(tuple(lengths([text])[0].tolist())) for text in ("first", "v1", "v2")]
    assert sum(counts) == 1000
    for count, share in zip(counts, (0.75, 0.125, 0.125), strict=True):
        assert abs(count - 1000 * share) < 5 * np.sqrt(1000 * share * (1 - share))


def test_a_sample_without_variants_keeps_its_caption(shards: Shards) -> None:
    index = shards([Record(str(i), encoded(i), ("only",)) for i in range(4)])
    (batch,) = load(index, steps=1, caption_variants=1.0)
    assert batch.tokens.tolist() == lengths(["only"] * 4).tolist()


@pytest.mark.parametrize("augment", [None, STRONG])
def test_the_cache_gives_the_pixels_of_decoding(shards: Shards, augment: Augment | None) -> None:
    items = records(8)
    items[3] = replace(items[3], image=encoded(3)[:200])
    index = shards(items)
    plain, cached = load(index, augment=augment), load(index, augment=augment, cache=True)
    assert joined(plain) == joined(cached)
    assert [b.rejected for b in plain] == [b.rejected for b in cached]
    assert joined(load(index, augment=augment, cache=True, workers=1)) == joined(plain)


@needs_compiler
@pytest.mark.parametrize("rotate", [0, 20])  # what rotates is not for it
@pytest.mark.parametrize("workers", [0, 1])
def test_compiled_code_gives_the_batches_of_the_plain_one(shards: Shards, rotate: float, workers: int) -> None:
    items = records(8)
    items[3] = replace(items[3], image=encoded(3)[:200])
    sets = Mixture([shards(items), shards(records(5, size=(9, 30)), "others")], [2, 1])
    options: dict[str, Any] = {"augment": replace(STRONG, rotate=rotate), "cache": True}
    plain, compiled = load(sets, **options), load(sets, compiled=True, workers=workers, **options)
    assert joined(plain) == joined(compiled)
    assert sum(map(len, (b.rejected for b in plain))) and [b.rejected for b in plain] == [b.rejected for b in compiled]


@needs_compiler
def test_compiled_colors_of_decoded_images_are_those_of_the_plain_ones(shards: Shards) -> None:
    index = shards(records(8))
    assert joined(load(index, compiled=True)) == joined(load(index))


def test_the_cache_is_built_once(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    index = shards(records(4))
    load(index, cache=True)
    monkeypatch.setattr("contrastive.shards.cache.decode_image", lambda data: pytest.fail("decoded again"))
    load(index, cache=True)


@pytest.mark.parametrize(("remembered", "reads"), [(40, 40), (0, 80)])
def test_with_the_cache_a_caption_that_is_remembered_is_not_read_again(
    shards: Shards, monkeypatch: pytest.MonkeyPatch, remembered: int, reads: int
) -> None:
    index = shards(records(40))
    plain = load(index, global_batch=40, steps=2)
    read: list[int] = []
    whole = ShardIndex.caption

    def caption(self: ShardIndex, i: int) -> str:
        read.append(i)
        return whole(self, i)

    monkeypatch.setattr("contrastive.shards.loader.CAPTIONS", remembered)
    monkeypatch.setattr(ShardIndex, "caption", caption)
    assert joined(load(index, global_batch=40, steps=2, cache=True)) == joined(plain)
    assert len(read) == reads


def test_threads_of_compiled_code_share_the_cores_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16), raising=False)
    assert [threads_of(*who) for who in ((1, 1), (0, 1), (4, 1), (8, 1), (1, 8), (4, 8))] == [4, 4, 4, 2, 2, 1]


def test_the_cache_of_replaced_pixels_is_built_again(tmp_path: Path) -> None:
    # Raw pixels: another image with the same length, hence the same offsets and sizes.
    for round in (0, 1):
        item = Record("a", encoded(round, format="BMP"), ("same",))
        folder = tmp_path / f"new{round}"
        write_shards([item], folder)
        if round:
            (folder / "00000.tar").replace(tmp_path / "a" / "00000.tar")
        else:
            folder.rename(tmp_path / "a")
        index = open_index(tmp_path / "a")
        assert joined(load(index, cache=True)) == joined(load(index))


def test_a_cache_of_images_that_differ_in_size_is_refused(shards: Shards) -> None:
    index = shards([*records(3), Record("odd", encoded(size=(8, 8)), ("odd",))])
    with pytest.raises(UserError, match=r"data\.cache: .*20x16, 8x8 at odd"):
        load(index, cache=True)
    assert not list(index.folder.glob("*pixels-*"))


def test_a_batch_that_does_not_divide_is_refused(shards: Shards) -> None:
    with pytest.raises(UserError, match="not divisible by 3"):
        load(shards(records(4)), world=3)


@pytest.mark.parametrize("samples", [1, 7, 1000])
def test_a_shard_of_any_size_gives_whole_epochs_with_more_workers_than_shards(tmp_path: Path, samples: int) -> None:
    image = encoded(size=(4, 4))
    write_shards([Record(f"{i:04d}", image, (str(i),)) for i in range(samples)], tmp_path / "s")
    index = open_index(tmp_path / "s")
    batch, steps = 6, -(-2 * samples // 6)  # the tail of the second epoch shares its batch with the third
    options = {"global_batch": batch, "world": 2, "steps": steps, "workers": 3, "augment": None, "image_size": 4}
    ranks = [load(index, rank=rank, **options) for rank in range(2)]
    keys = [key for step in range(steps) for rank in ranks for key in rank[step].keys][: 2 * samples]
    assert sorted(keys) == sorted(2 * [f"{i:04d}" for i in range(samples)])


def test_the_state_names_all_that_the_stream_depends_on(shards: Shards) -> None:
    index = shards(records(10))
    loader = PairLoader(index, tokenize=lengths, image_size=12, augment=STRONG, global_batch=4, seed=5, window=2)
    state = loader.state(6)  # 24 pairs
    assert json.loads(json.dumps(state)) == state
    assert {key: state[key] for key in ("seed", "global_batch", "window", "epoch", "cursor", "fingerprint")} == {
        "seed": 5, "global_batch": 4, "window": 2, "epoch": 2, "cursor": 4, "fingerprint": index.fingerprint,
    }  # fmt: skip
    others = [("augment", None), ("image_size", 8), ("caption_variants", 0.5), ("decode", "fast"), ("seed", 6)]
    for name, value in others:
        options: dict[str, Any] = {"image_size": 12, "augment": STRONG, "seed": 5, "window": 2, name: value}
        assert PairLoader(index, tokenize=lengths, global_batch=4, **options).identity != loader.identity, name
