"""``contrastive find lr|batch``: the figures of short trials, that nothing stays of them, and what is refused."""

import json
from pathlib import Path

import pytest

from contrastive.cli import main
from contrastive.errors import UserError
from contrastive.finding import Size, find_rate, find_sizes, parse_bytes, sizes_text, suggested_chunk
from contrastive.shards import open_index
from tests.tiny import tiny_config, write_corpus, write_recipe

MIB = 2**20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    open_index(folder / "shards")  # the index lies beside the shards from the first opening on, whoever opens them
    return folder


@pytest.fixture
def recipe(corpus, tmp_path) -> Path:
    return write_recipe(corpus, tmp_path / "tiny.yaml")


# ---- the learning rate


def test_a_rate_is_found_and_nothing_stays_of_the_trial(recipe, corpus, tmp_path, capsys) -> None:
    before = sorted(corpus.rglob("*"))
    files = ["--json", str(tmp_path / "lr.json"), "--plot", str(tmp_path / "lr.png")]
    options = ["--from", "1e-5", "--to", "10", "--steps", "40", f"run.dir={tmp_path}/run"]
    assert main(["find", "lr", str(recipe), *options, *files]) == 0
    assert not (tmp_path / "run").exists() and sorted(corpus.rglob("*")) == before
    found = json.loads((tmp_path / "lr.json").read_text())
    assert found["rates"][0] == 1e-5 and len(found["rates"]) == len(found["losses"]) <= 40
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert f"steepest descent    {found['steepest']:.1e}" in said and "the recipe has      optim.lr 1.0e-03" in said


def test_the_same_trial_gives_the_same_losses(corpus, tmp_path) -> None:
    config = tiny_config(corpus, tmp_path / "run")
    first, second = (find_rate(config, low=1e-5, high=1.0, steps=20) for _ in range(2))
    assert first == second


def test_the_losses_are_those_of_training_at_these_rates(corpus, tmp_path) -> None:
    """Next to a rate of nothing each batch's loss is that of the starting weights, as of a run that learns nothing."""
    from contrastive.pretrain import pretrain

    exact = ["model.image.kwargs.proj_drop_rate=0.0", "model.text.dropout=0.0", "data.validation=null"]
    config = tiny_config(corpus, tmp_path / "run", *exact, "optim.lr=1e-12", "train.steps=20")
    pretrain(config, quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = find_rate(config, low=1e-12, high=2e-12, steps=20)
    assert found.losses == pytest.approx([row["train/loss"] for row in rows if "train/loss" in row], rel=1e-5)


# ---- the batch


def test_sizes_double_up_to_the_batch_of_a_process(corpus, tmp_path) -> None:
    config = tiny_config(corpus, tmp_path / "run", "train.global_batch=40")
    sizes = list(find_sizes(config, memory=8 * 1024 * MIB, processes=2, seconds=0.01))
    assert [size.pairs for size in sizes] == [8, 16, 20]
    assert all(size.rate and size.peak for size in sizes)
    assert sizes_text(config, sizes, 2) == "train.chunk: null: the whole batch of 20 pairs a process fits"
    assert not (tmp_path / "run").exists()


def test_a_limit_is_kept(corpus, tmp_path) -> None:
    """A tower whose activations double with the pairs: the limit, set between two sizes, is where it ends."""
    wide = ["model.image.size=64", "model.image.kwargs.patch_size=4", "train.global_batch=4096"]
    config = tiny_config(corpus, tmp_path / "run", *wide)
    free = []
    for size in find_sizes(config, memory=8 * 1024 * MIB, seconds=0.01):
        free.append(size)
        if size.pairs == 256:
            break
    peaks = {size.pairs: size.peak for size in free}
    assert peaks[256] > peaks[128] + 40 * MIB  # or the limit between them would be within the noise
    limited = list(find_sizes(config, memory=(peaks[128] + peaks[256]) // 2, seconds=0.01))
    assert [size.pairs for size in limited if size.rate is not None] == [8, 16, 32, 64, 128]
    assert limited[-1] == Size(256, None, None)


def test_the_command_suggests_a_chunk_and_names_what_did_not_fit(recipe, monkeypatch, capsys, tmp_path) -> None:
    sizes = [Size(8, 100.0, MIB), Size(16, 120.0, 2 * MIB), Size(32, None, None)]
    monkeypatch.setattr("contrastive.finding.find_sizes", lambda *_, **__: iter(sizes))
    options = ["--memory", "1GiB", "--json", str(tmp_path / "b.json"), "train.global_batch=64"]
    assert main(["find", "batch", str(recipe), *options]) == 0
    said = capsys.readouterr().out
    assert "32  does not fit" in said and said.endswith("train.chunk: 16\n")
    assert [row["pairs"] for row in json.loads((tmp_path / "b.json").read_text())] == [8, 16, 32]


@pytest.mark.parametrize(("rates", "chunk"), [
    ([100, 150, 200, None], 32),
    ([100, 200, 195, None], 32),  # as fast, within 5 %: the larger
    ([100, 200, 150, None], 16),  # a larger one that is slower
    ([100, 150, 200, 210], None),
])  # fmt: skip
def test_the_chunk_is_the_largest_that_is_about_as_fast_as_any(rates, chunk) -> None:
    assert suggested_chunk([Size(8 * 2**i, rate, None) for i, rate in enumerate(rates)], batch=64) == chunk


def test_a_model_with_batch_statistics_is_told_its_largest_batch(corpus, tmp_path) -> None:
    config = tiny_config(corpus, tmp_path / "run", "model.image={name: resnet18, size: 32}", "train.global_batch=64")
    sizes = [Size(8, 10.0, MIB), Size(16, 11.0, MIB), Size(32, None, None)]
    assert sizes_text(config, sizes, 1).startswith("train.global_batch: 16 at most: this model takes batch statistics")


# ---- mistakes

LOCKED = ["model.image.locked=true", "model.text.locked=true"]
FEATURES = ["data.cache=features", *LOCKED, "data.augment={crop: [1, 1], ratio: 1}"]


@pytest.mark.parametrize(("text", "expected"), [
    ("4GiB", 4 * 1024**3), ("1.5 GiB", 1536 * MIB), ("800MB", 800_000_000), ("4096B", 4096), ("2KiB", 2048),
])  # fmt: skip
def test_sizes_of_memory(text, expected) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["4 gigs", "", "-1GiB", "0GiB"])
def test_what_is_no_size_is_refused(text) -> None:
    with pytest.raises(UserError, match="expected a size such as 4GiB"):
        parse_bytes(text)


def test_a_size_without_a_unit_is_asked_for_one() -> None:
    with pytest.raises(UserError, match="--memory 2: of which unit"):
        parse_bytes("2")


@pytest.mark.parametrize(("options", "words"), [
    (["lr", "--from", "1", "--to", "0.1"], "--from 1 --to 0.1: give two rates"),
    (["lr", "--from", "0"], "--from 0 --to 1: give two rates"),
    (["lr", "--steps", "5"], "--steps 5: give at least 20"),
    (["lr", "--plot", "x.xyz"], "--plot x.xyz: give a file that ends in .png, .svg, .pdf"),
    (["lr", "--memory", "1GiB"], "--memory is not for `find lr`"),
    (["batch", "--from", "1"], "--from is not for `find batch`"),
    (["batch", "--processes", "0"], "--processes 0"),
    (["batch", *FEATURES], "data.cache features"),
    (["batch", "--memory", "1MiB"], "not even 8 pairs fit"),
    (["batch", "--memory", "8GiB", "model.image.name=nothing"], "model.image.name"),
])  # fmt: skip
def test_a_mistake_is_one_line(recipe, capsys, options, words) -> None:
    assert main(["find", options[0], str(recipe), *options[1:]]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_cpu_needs_a_limit(recipe, capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert main(["find", "batch", str(recipe)]) == 2
    assert "say what a process may take, such as --memory 4GiB" in capsys.readouterr().err
