"""Features of teachers and of locked towers are made once, kept on disk, and never those of something else."""

import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from contrastive import pretrain as job
from contrastive.errors import UserError
from contrastive.evaluation import embed, feature_store, stored
from contrastive.models import TwoTower, load
from contrastive.pretrain import pretrain
from contrastive.shards import open_index, open_source, write_shards
from tests.distributed.spawn import PATIENCE, run_ranks
from tests.tiny import tiny_config, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def teachers(corpus, tmp_path_factory):
    """Two run folders, of models that differ in their weights only."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed in (1, 2):
        pretrain(tiny_config(corpus, folder / str(seed) / "run", "train.steps=2", f"run.seed={seed}"), quiet=True)
    return [folder / str(seed) / "run" for seed in (1, 2)]


def counting(seen: list[int]):
    """`load`, whose teachers note the images that they embed."""

    def opened(name, **options):
        model = load(name, **options)
        if isinstance(name, str):  # as the recipe gives it; the finished student is opened too, by its Path
            plain = model.encode_image
            model.encode_image = lambda pixels: seen.append(len(pixels)) or plain(pixels)
        return model

    return opened


@pytest.fixture
def embedded(monkeypatch):
    """The numbers of images that teachers embedded, a batch each."""
    seen: list[int] = []
    monkeypatch.setattr(job, "load", counting(seen))
    return seen


def student(corpus: Path, folder: Path, teacher: Path, *overrides: str):
    loss = f"loss=[{{kind: infonce}}, {{kind: distillation, teacher: {teacher}}}]"
    return tiny_config(corpus, folder / "run", loss, "train.steps=6", *overrides)


def weights(config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.dir) / "model" / "model.safetensors")


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def stores(folder: Path) -> list[Path]:
    return sorted((folder / "features").iterdir())


def test_a_second_start_embeds_nothing_and_trains_the_same(corpus, tmp_path, teachers, embedded):
    config = student(corpus, tmp_path, teachers[0])
    pretrain(config, quiet=True)
    assert sum(embedded) == 40
    first = weights(config)
    pretrain(config, overwrite=True, quiet=True)
    other = student(corpus, tmp_path, teachers[0], f"run.dir={tmp_path}/other", "run.seed=5")
    pretrain(other, quiet=True)
    assert sum(embedded) == 40
    pretrain(config, overwrite=True, quiet=True)
    assert same(weights(config), first) and not same(weights(other), first)


def test_a_resumed_run_reads_and_ends_bit_for_bit_alike(corpus, tmp_path, teachers, embedded):
    whole, parts = (student(corpus, tmp_path / name, teachers[0]) for name in ("whole", "parts"))
    pretrain(whole, quiet=True)
    pretrain(parts, stop_after=3, quiet=True)
    before = sum(embedded)
    pretrain(parts, resume=True, quiet=True)
    assert sum(embedded) == before == 80
    assert same(weights(parts), weights(whole))


def test_stored_rows_are_those_of_the_teacher(corpus, tmp_path, teachers):
    pretrain(student(corpus, tmp_path, teachers[0]), quiet=True)
    (folder,) = stores(tmp_path)
    expected = embed(load(teachers[0]), open_index(corpus / "shards"))
    np.testing.assert_allclose(np.load(folder / "image.npy"), expected.image, atol=1e-6)
    np.testing.assert_allclose(np.load(folder / "text.npy"), expected.text, atol=1e-6)
    assert not (folder / "filling").exists()


def test_another_teacher_at_the_same_place_is_another_entry(corpus, tmp_path, teachers, embedded):
    place = tmp_path / "teacher"
    for number, teacher in enumerate(teachers):
        if place.is_symlink():
            place.unlink()
        place.symlink_to(teacher)
        pretrain(student(corpus, tmp_path, place), overwrite=number > 0, quiet=True)
    assert sum(embedded) == 80 and len(stores(tmp_path)) == 2
    one, two = (np.load(folder / "image.npy") for folder in stores(tmp_path))
    assert not np.allclose(one, two, atol=1e-3)


def test_another_data_set_at_the_same_place_is_another_entry(tmp_path, teachers, embedded):
    corpus = write_corpus(tmp_path / "corpus")
    pretrain(student(corpus, tmp_path, teachers[0]), quiet=True)
    (corpus / "images" / "000.txt").write_text("blue square 0")  # as many bytes as were there, and as many pairs
    for file in (corpus / "shards").iterdir():
        file.unlink()
    write_shards(open_source(corpus / "images"), corpus / "shards")
    pretrain(student(corpus, tmp_path, teachers[0]), overwrite=True, quiet=True)
    assert sum(embedded) == 80 and len(stores(tmp_path)) == 2


def test_another_preprocessing_of_the_same_weights_is_another_entry(corpus, tmp_path, teachers, embedded, monkeypatch):
    pretrain(student(corpus, tmp_path, teachers[0]), quiet=True)
    plain = TwoTower.preprocess
    monkeypatch.setattr(TwoTower, "preprocess", lambda self, image: plain(self, image).flip(-1))
    pretrain(student(corpus, tmp_path, teachers[0]), overwrite=True, quiet=True)
    assert sum(embedded) == 80 and len(stores(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["cut", "no summary"])
def test_a_damaged_entry_is_made_again(corpus, tmp_path, teachers, embedded, damage):
    config = student(corpus, tmp_path, teachers[0])
    pretrain(config, quiet=True)
    (folder,) = stores(tmp_path)
    whole = (folder / "image.npy").read_bytes()
    if damage == "cut":
        (folder / "image.npy").write_bytes(whole[:-4])
    else:
        (folder / "whole.json").unlink()
    pretrain(config, overwrite=True, quiet=True)
    assert sum(embedded) == 80
    assert (folder / "image.npy").read_bytes() == whole


def test_several_sets_and_unreadable_images_keep_their_places(tmp_path, teachers):
    corpora = [write_corpus(tmp_path / name) for name in ("a", "b")]
    broken = corpora[1] / "images" / "007.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (corpora[1] / "images" / "001.txt").write_text("a caption of its own")
    for file in (corpora[1] / "shards").iterdir():
        file.unlink()
    write_shards(open_source(corpora[1] / "images"), corpora[1] / "shards")
    sets = "data.train={" + ", ".join(f"{corpus}/shards: 1" for corpus in corpora) + "}"
    pretrain(student(corpora[0], tmp_path, teachers[0], sets, "data.max_skip_rate=0.5"), quiet=True)
    (folder,) = stores(tmp_path)
    rows = np.load(folder / "image.npy")
    assert len(rows) == 80
    assert json.loads((folder / "whole.json").read_text())["rejected"] == {"47": "truncated or damaged"}
    assert not rows[47].any() and rows[46].any()
    np.testing.assert_allclose(rows[48:], rows[8:40], atol=1e-6)  # the same images, whatever comes before them


def test_locked_towers_run_once_for_all_runs(corpus, tmp_path, monkeypatch):
    locked = ["model.image.locked=true", "model.text.locked=true", "data.augment={crop: [1.0, 1.0], ratio: 1.0}"]
    locked += ["data.cache=features", "data.validation=null"]
    seen: list[int] = []
    plain = TwoTower.image_features
    monkeypatch.setattr(
        TwoTower, "image_features", lambda self, x: (seen.append(len(x)) if x.ndim == 4 else None) or plain(self, x)
    )
    for name in ("one", "two"):
        pretrain(tiny_config(corpus, tmp_path / name, *locked, "optim.lr=1e-2"), quiet=True)
    assert sum(seen) == 40


# ---- killed, and on several ranks


def train_and_die(config, parts: int) -> None:
    """In a process of its own: killed when so many parts of the features are on the disk."""
    stored.PART = 8
    plain, written = stored.write_json, [0]

    def write(file, value, indent=None):
        plain(file, value, indent)
        written[0] += file.name.startswith("image-")
        if written[0] == parts:
            os.kill(os.getpid(), signal.SIGKILL)

    stored.write_json = write
    pretrain(config, quiet=True)


@pytest.mark.parametrize("parts", [1, 3, 5])
def test_killed_while_storing_the_next_start_goes_on_behind_the_parts_that_are_done(
    corpus, tmp_path, teachers, embedded, monkeypatch, parts
):
    config = student(corpus, tmp_path, teachers[0])
    process = multiprocessing.get_context("fork").Process(target=train_and_die, args=(config, parts))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    (folder,) = stores(tmp_path)
    assert not (folder / "whole.json").exists()
    monkeypatch.setattr(stored, "PART", 8)
    pretrain(config, quiet=True)
    assert sum(embedded) == 40 - 8 * parts
    expected = embed(load(teachers[0]), open_index(corpus / "shards"))
    np.testing.assert_allclose(np.load(folder / "image.npy"), expected.image, atol=1e-6)


def train_and_count(config, where: Path) -> None:
    seen: list[int] = []
    job.load = counting(seen)
    pretrain(config, quiet=True)
    where.write_text(str(sum(seen)))


def test_of_two_runs_at_once_one_makes_the_features(corpus, tmp_path, teachers):
    context, configs = multiprocessing.get_context("fork"), {}
    for name in ("one", "two"):
        configs[name] = student(corpus, tmp_path, teachers[0], f"run.dir={tmp_path}/{name}")
    processes = [
        context.Process(target=train_and_count, args=(config, tmp_path / f"{name}.txt"))
        for name, config in configs.items()
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(int((tmp_path / f"{name}.txt").read_text()) for name in configs) == [0, 40]
    assert same(*map(weights, configs.values()))


def test_a_store_that_cannot_be_written_is_told(corpus, tmp_path, teachers):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data.features: .*file/.* cannot be made"):
        pretrain(student(corpus, tmp_path, teachers[0], f"data.features={tmp_path}/file"), quiet=True)


def on_ranks(rank: int, world: int, corpus: Path, folder: Path, teacher: Path) -> int:
    stored.PART = 8
    seen: list[int] = []
    job.load = counting(seen)
    pretrain(student(corpus, folder, teacher, "data.validation=null"), overwrite=True, quiet=True)
    return sum(seen)


def test_ranks_share_the_work_and_all_read_it(corpus, tmp_path, teachers):
    assert run_ranks(2, on_ranks, corpus, tmp_path, teachers[0]) == [16, 24]  # two and three parts of eight
    assert run_ranks(2, on_ranks, corpus, tmp_path, teachers[0]) == [0, 0]
    (folder,) = stores(tmp_path)
    expected = embed(load(teachers[0]), open_index(corpus / "shards"))
    np.testing.assert_allclose(np.load(folder / "image.npy"), expected.image, atol=1e-6)


def with_a_late_reader(rank: int, world: int, corpus: Path, folder: Path, teacher: Path) -> int:
    mapped = stored._mapped

    def late(file: Path) -> np.ndarray:
        time.sleep(1.0)
        return mapped(file)

    if rank == 1:
        stored._mapped = late
    return on_ranks(rank, world, corpus, folder, teacher)


def test_what_a_late_rank_has_still_to_read_is_not_deleted(corpus, tmp_path, teachers):
    assert run_ranks(2, with_a_late_reader, corpus, tmp_path, teachers[0]) == [16, 24]


def with_a_late_disk(rank: int, world: int, corpus: Path, folder: Path, teacher: Path) -> str:
    plain = feature_store._open
    feature_store._open = lambda *arguments: None if rank == 1 else plain(*arguments)
    try:
        on_ranks(rank, world, corpus, folder, teacher)
    except UserError as error:
        return str(error)
    return ""


def test_features_that_one_rank_does_not_find_end_all_with_the_same_line(corpus, tmp_path, teachers):
    run_ranks(2, on_ranks, corpus, tmp_path, teachers[0])
    told = run_ranks(2, with_a_late_disk, corpus, tmp_path, teachers[0])
    assert told[0] == told[1] and told[0].startswith("data.features: process 1 does not find all of")


class Odd(OSError):
    """Cannot be made from its arguments, so that no other rank could rebuild it."""

    def __init__(self, *, number: int) -> None:
        super().__init__(number, "odd")


def with_an_odd_error(rank: int, world: int) -> tuple[str, str]:
    try:
        with stored.together():
            if rank == 1:
                raise Odd(number=5)
    except OSError as error:
        return type(error).__name__, str(error)
    return "", ""


def test_an_error_that_cannot_be_sent_is_told_all_the_same():
    assert run_ranks(2, with_an_odd_error) == [("OSError", "[Errno 5] odd"), ("Odd", "[Errno 5] odd")]


def with_a_full_disk(rank: int, world: int, corpus: Path, folder: Path, teacher: Path, at: int, where: str) -> str:
    module = {"part": stored, "whole": feature_store}[where]
    plain = module.write_rows

    def write(file: Path, *arguments) -> None:
        if rank == at:
            raise OSError(28, "No space left on device", str(file))
        plain(file, *arguments)

    module.write_rows = write
    try:
        on_ranks(rank, world, corpus, folder, teacher)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("at", "where"), [(0, "part"), (1, "part"), (0, "whole")])
def test_a_full_disk_of_one_rank_ends_all_with_the_same_line(corpus, tmp_path, teachers, at, where):
    told = run_ranks(2, with_a_full_disk, corpus, tmp_path, teachers[0], at, where)
    assert told[0] == told[1]
    assert re.fullmatch(r"data.features: cannot write .* \(No space left on device\); choose another folder", told[0])
    assert sum(run_ranks(2, on_ranks, corpus, tmp_path, teachers[0])) == {"part": 24 if at else 16, "whole": 0}[where]
