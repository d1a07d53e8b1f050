"""Runs in stages: what each step sees, that no sample is lost in between, and that a resumed run is the same run."""

import json
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from contrastive.build import build_model
from contrastive.errors import UserError
from contrastive.models import load
from contrastive.pretrain import dry_run, pretrain
from contrastive.training.curriculum import Curriculum, Settings
from contrastive.training.schedule import Point
from contrastive.training.step import TrainStep
from tests.distributed.spawn import run_ranks
from tests.tiny import COLOURS, tiny_config

# Forty pairs in batches of eight: five steps an epoch. The images of the recipe are 16 px, four patches of 8.
FIXED = ["train.global_batch=8", "model.image.size=32", "data.validation=null"]
EXACT = ["model.image.kwargs.proj_drop_rate=0.0", "model.text.dropout=0.0"]
STAGES = "train.curriculum=[{until: 3, size: 8, context: 3}, {until: 60%, size: 16, patch_dropout: 0.5}]"


@pytest.fixture
def steps(monkeypatch):
    """What each step got: keys, size of the pixels, tokens, and how many places entered the first block."""
    seen: list[dict] = []
    plain = TrainStep.__call__

    def call(self, batch, factor):
        row = {"keys": batch.keys, "size": tuple(batch.pixels.shape[2:]), "tokens": batch.tokens, "entered": None}
        seen.append(row)
        handles = []
        for name, part in self.two_tower.image.named_modules():
            if name.endswith(("blocks.0", "resblocks.0")):
                hook = lambda _, inputs, row=row: row.update(entered=inputs[0].shape[1])  # noqa: E731
                handles.append(part.register_forward_pre_hook(hook))
        with FlopCounterMode(display=False) as counter:
            metrics = plain(self, batch, factor)
        row["flops"] = counter.get_total_flops()
        for handle in handles:
            handle.remove()
        return metrics

    monkeypatch.setattr(TrainStep, "__call__", call)
    return seen


def weights(config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.dir) / "model" / "model.safetensors")


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


# ---- what a step sees


@pytest.mark.parametrize("workers", [0, 2])
def test_each_step_has_the_sizes_of_its_stage(make_config, steps, workers):
    pretrain(make_config(*FIXED, STAGES, "train.steps=10", f"data.workers={workers}"), quiet=True)
    assert [row["size"] for row in steps] == [(8, 8)] * 3 + [(16, 16)] * 3 + [(32, 32)] * 4
    # a class token and one patch; half of four patches; all of sixteen
    assert [row["entered"] for row in steps] == [2] * 3 + [3] * 3 + [17] * 4
    assert [row["tokens"].shape[1] for row in steps[:3]] == [3] * 3
    assert all(row["tokens"].shape[1] > 3 for row in steps[3:])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_pair_comes_once_an_epoch_in_the_order_of_a_run_without_stages(make_config, steps, workers, tmp_path):
    pretrain(make_config(*FIXED, STAGES, "train.steps=10", f"data.workers={workers}"), quiet=True)
    staged = [row["keys"] for row in steps]
    for epoch in (staged[:5], staged[5:]):  # both hold a boundary
        counts = Counter(key for keys in epoch for key in keys)
        assert len(counts) == 40 and set(counts.values()) == {1}
    steps.clear()
    pretrain(make_config(*FIXED, "train.steps=10", f"run.dir={tmp_path}/plain"), quiet=True)
    assert [row["keys"] for row in steps] == staged


def test_a_cut_caption_ends_with_its_closing_token(make_config, steps):
    config = make_config(*FIXED, STAGES, "train.steps=10")
    pretrain(config, quiet=True)
    tokenizer = load(config.run.dir).tokenizer
    end = int(tokenizer([""])[0, 0])  # all that there is of an empty caption
    cut = 0
    for row in steps[:3]:
        for key, tokens in zip(row["keys"], row["tokens"].tolist(), strict=True):
            whole = [token for token in tokenizer([caption_of(key)])[0].tolist() if token != tokenizer.pad_id]
            cut += len(whole) > 3
            expected = whole if len(whole) <= 3 else [*whole[:2], end]
            assert tokens == expected + [tokenizer.pad_id] * (3 - len(expected))
    assert cut


def caption_of(key: str) -> str:
    number = int(Path(key).stem)
    return f"{COLOURS[number % 8]} square {number // 8}"


def test_small_stages_cost_less(make_config, steps):
    pretrain(make_config(*FIXED, STAGES, "train.steps=10"), quiet=True)
    first, second, last = (steps[i]["flops"] for i in (0, 3, 9))
    assert first < 0.6 * second and second < 0.6 * last


def test_pixels_that_were_decoded_before_are_rendered_at_each_size(make_config, steps, tmp_path):
    pretrain(make_config(*FIXED, STAGES, "train.steps=10"), quiet=True)
    plain = [row["tokens"].sum() for row in steps]
    steps.clear()
    pretrain(make_config(*FIXED, STAGES, "train.steps=10", "data.cache=pixels", f"run.dir={tmp_path}/c"), quiet=True)
    assert [row["size"] for row in steps] == [(8, 8)] * 3 + [(16, 16)] * 3 + [(32, 32)] * 4
    assert [row["tokens"].sum() for row in steps] == plain


def test_a_convolutional_tower_takes_every_size(make_config, steps):
    tower = ["model.image.name=resnet18", "model.image.kwargs={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}"]
    pretrain(make_config(*FIXED, *tower, "train.curriculum=[{until: 50%, size: 16}]", "train.steps=6"), quiet=True)
    assert [row["size"] for row in steps] == [(16, 16)] * 3 + [(32, 32)] * 3


def test_an_open_clip_model_goes_through_stages(make_config, steps, tmp_path):
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    name = tmp_path / "tiny-clip.json"
    name.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    model = f"model={{kind: open_clip, name: {name}}}"
    config = make_config(
        "train.global_batch=8", model, STAGES, "train.steps=10", "train.gradient_checkpointing=true",
        "model.image.patch_dropout=0.75", "train.unmasked_tail=2",
    )  # fmt: skip
    pretrain(config, quiet=True)
    assert [row["size"] for row in steps] == [(8, 8)] * 3 + [(16, 16)] * 3 + [(32, 32)] * 4
    assert [row["entered"] for row in steps] == [2] * 3 + [3] * 3 + [5] * 2 + [17] * 2
    assert [row["tokens"].shape[1] for row in steps[:3]] == [3] * 3
    assert (torch.cat([row["tokens"][:, -1] for row in steps[:3]]) == 49407).all()


def test_a_stage_that_the_run_never_reaches_is_refused(make_config):
    config = make_config(*FIXED, "train.curriculum=[{until: 3 epochs, size: 8}]", "train.steps=10")
    with pytest.raises(UserError, match="until: 3 epochs is step 15; .* the run at step 10"):
        dry_run(config)


def test_chunks_give_the_losses_of_whole_batches_in_every_stage(make_config, tmp_path):
    curves = []
    stages = "train.curriculum=[{until: 3, size: 8, context: 3}, {until: 6, size: 16}]"
    for chunk in ("null", "3"):
        config = make_config(*FIXED, *EXACT, stages, f"train.chunk={chunk}", f"run.dir={tmp_path}/chunk-{chunk}")
        pretrain(config, quiet=True)
        rows = map(json.loads, (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines())
        curves.append([row["train/loss"] for row in rows])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


# ---- the unmasked tail


@pytest.mark.parametrize("tail, masked", [("30%", 7), (2, 8), ("1 epoch", 5), ("24 samples", 7)], ids=str)
def test_the_tail_of_the_run_sees_all_patches(make_config, steps, tail, masked):
    pretrain(
        make_config(*FIXED, "model.image.patch_dropout=0.75", f"train.unmasked_tail={tail}", "train.steps=10"),
        quiet=True,
    )
    assert [row["entered"] for row in steps] == [1 + 4] * masked + [1 + 16] * (10 - masked)


def test_which_patches_stay_is_drawn_anew(make_config, steps):
    config = make_config(*FIXED, "model.image.patch_dropout=0.75")
    model = build_model(config, trained_tokenizer()).train()
    model.set_patch_dropout(0.75)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert not torch.equal(model.image_features(pixels), model.image_features(pixels))


def test_a_saved_model_sees_all_patches_and_is_that_of_a_run_without(make_config, tmp_path):
    config = make_config(*FIXED, "model.image.patch_dropout=0.5")
    pretrain(config, quiet=True)
    saved = json.loads((Path(config.run.dir) / "model" / "config.json").read_text())
    plain = make_config(*FIXED, f"run.dir={tmp_path}/plain")
    pretrain(plain, quiet=True)
    expected = json.loads((Path(plain.run.dir) / "model" / "config.json").read_text())
    assert saved["image"] == expected["image"]
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    model = load(config.run.dir)
    assert torch.equal(model.encode_image(pixels), model.encode_image(pixels))


@pytest.mark.parametrize("overrides", [
    ["model.image.name=resnet18", "model.image.kwargs={}"],
    ["model.image.name=resnet18", "model.image.kwargs={}", "train.curriculum=[{until: 50%, patch_dropout: 0.5}]"],
])  # fmt: skip
def test_towers_without_patches_are_refused_by_name(make_config, overrides):
    rate = [] if "curriculum" in overrides[-1] else ["model.image.patch_dropout=0.5"]
    with pytest.raises(UserError, match="model.image.patch_dropout: the image tower resnet18 has no patches"):
        dry_run(make_config(*overrides, *rate))


@pytest.mark.parametrize("name, words", [
    ("mixer_s32_224", "timm's mixer_s32_224 takes images of 64 px only"),
    ("vit_tiny_patch16_224", "built for 64 px, does not take images of 40 px"),
])  # fmt: skip
def test_towers_that_do_not_take_a_size_are_refused_by_name(make_config, name, words):
    overrides = [f"model.image={{name: {name}, size: 64}}", "train.curriculum=[{until: 50%, size: 40}]"]
    with pytest.raises(UserError, match=words):
        dry_run(make_config(*overrides))


# ---- the same run again


@pytest.mark.parametrize("stops", [[1], [3], [5], [6], [7], [2, 3, 6, 9]], ids=str)
def test_resumed_in_any_stage_the_weights_are_bit_for_bit_those_of_one_run(make_config, tmp_path, stops):
    options = [*FIXED, STAGES, "train.steps=10", "train.unmasked_tail=20%", "model.image.patch_dropout=0.25"]
    whole = make_config(*options, f"run.dir={tmp_path}/whole")
    pretrain(whole, quiet=True)
    config = make_config(*options, "data.workers=1")
    for number, stop in enumerate([*stops, None]):
        pretrain(config, resume=number > 0, stop_after=stop, quiet=True)
    assert_same(weights(config), weights(whole))


def test_resuming_with_another_curriculum_is_refused(make_config):
    pretrain(make_config(*FIXED, STAGES, "train.steps=10"), stop_after=2, quiet=True)
    with pytest.raises(UserError, match="its curriculum is another one"):
        pretrain(make_config(*FIXED, "train.steps=10"), resume=True, quiet=True)
    with pytest.raises(UserError, match="its curriculum is another one"):
        other = STAGES.replace("size: 8", "size: 16")
        pretrain(make_config(*FIXED, other, "train.steps=10"), resume=True, quiet=True)


def test_a_run_of_so_many_minutes_has_its_stages_by_the_clock(make_config, steps, monkeypatch):
    from contrastive.training.trainer import Trainer

    monkeypatch.setattr(Trainer, "_slowest", lambda self, seconds: 1.0)  # each step takes a second
    stages = "train.curriculum=[{until: 25%, size: 8}, {until: 0.1m, size: 16}]"
    config = make_config(*FIXED, stages, "train.steps=null", "train.minutes=0.2", "model.image.patch_dropout=0.5")
    config = config.model_copy(update={"train": config.train.model_copy(update={"unmasked_tail": "3s"})})
    pretrain(config, stop_after=4, quiet=True)
    pretrain(config, resume=True, quiet=True)
    assert [row["size"] for row in steps] == [(8, 8)] * 3 + [(16, 16)] * 3 + [(32, 32)] * 6
    assert [row["entered"] for row in steps] == [2] * 3 + [3] * 3 + [9] * 3 + [17] * 3


def losses(rank: int, world: int, corpus: Path, folder: Path) -> list[float]:
    stages = "train.curriculum=[{until: 5, size: 8, context: 3}, {until: 60%, size: 16}]"
    config = tiny_config(corpus, folder / f"{rank}" / "run", *FIXED, *EXACT, stages, "train.steps=20")
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder / "run")})})
    pretrain(config, quiet=True)
    rows = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_two_processes_give_the_loss_curve_of_one_through_all_stages(tmp_path, corpus):
    one = run_ranks(1, losses, corpus, tmp_path / "one")[0]
    two = run_ranks(2, losses, corpus, tmp_path / "two")[0]
    assert len(one) == 20 and two == pytest.approx(one, rel=1e-4)


def sizes_by_the_clock(rank: int, world: int, corpus: Path, folder: Path) -> list[int]:
    seen: list[int] = []
    plain = TrainStep.__call__

    def call(self, batch, factor):
        seen.append(batch.pixels.shape[-1])
        time.sleep(0.05 * ((len(seen) + rank) % 2))  # now one process is slow, now the other
        return plain(self, batch, factor)

    TrainStep.__call__ = call  # type: ignore[method-assign]
    stages = "train.curriculum=[{until: 30%, size: 8}, {until: 60%, size: 16}]"
    config = tiny_config(corpus, folder / "run", *FIXED, stages, "train.steps=null", "train.minutes=0.1")
    pretrain(config, quiet=True)
    return seen


def test_by_the_clock_all_processes_change_their_stage_at_one_step(tmp_path, corpus):
    one, other = run_ranks(2, sizes_by_the_clock, corpus, tmp_path)
    assert one == other and sorted(set(one)) == [8, 16, 32]


# ---- the places of stages


def test_the_settings_of_a_stage_end_where_the_next_begin():
    small, middle, full = (Settings(size, 4, 0.5) for size in (1, 2, 3))
    curriculum = Curriculum([(Point(steps=2), small), (Point(share=0.5), middle)], full, Point(share=0.95))
    found = [curriculum.at(step, step / 20) for step in range(20)]
    assert [one.image_size for one in found] == [1] * 2 + [2] * 8 + [3] * 10
    assert [one.patch_dropout for one in found] == [0.5] * 19 + [0.0]


@pytest.mark.parametrize("steps", [3, 7, 10, 29, 100, 1000])
@pytest.mark.parametrize("percent", [10, 35, 57, 80, 95])
def test_a_share_begins_at_the_first_step_that_is_not_below_it(steps, percent):
    point = Point(share=percent / 100)
    assert [point.reached(s, s / steps) for s in range(steps)] == [100 * s >= percent * steps for s in range(steps)]


def trained_tokenizer() -> str:
    from contrastive.models import train_tokenizer

    return train_tokenizer(["red square"], 300).to_str()
