"""Every key of a recipe changes what is built from it; where it would not, the recipe is refused."""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contrastive.build import build_accelerator, build_data, build_model, build_trainer, wants_training
from contrastive.builders.loss import Teacher
from contrastive.config import Config, dump_yaml, load_config
from contrastive.config.problems import _all_keys
from contrastive.errors import UserError
from contrastive.models import train_tokenizer
from contrastive.shards import open_index
from tests.tiny import tiny_config, write_corpus

# What a key of the recipe needs around it, and another value for it. Of a key in several kinds: "key (kind)".
LOCKED = ["model.image.locked=true", "model.text.locked=true", "data.augment={crop: [1, 1], ratio: 1}"]
EMA = ["optim.ema={}"]
CYCLIP = ["loss=[{kind: infonce}, {kind: cyclip}]"]
STAGE = ["train.curriculum=[{until: 50%, size: 8}]"]
STOP = ["eval.every=1", "eval.stop={}"]
CHANGES: dict[str, tuple[list[str], str]] = {
    "run.seed": ([], "1"),
    "model.image.name": ([], "vit_small_patch16_224"),
    "model.image.size": ([], "24"),
    "model.image.kwargs": ([], "{patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}"),
    "model.image.resize_mode": ([], "squash"),
    "model.image.interpolation": ([], "bilinear"),
    "model.image.fill_color": (["model.image.resize_mode=longest"], "7"),
    "model.image.mean": ([], "[0, 0, 0]"),
    "model.image.std": ([], "[1, 1, 1]"),
    "model.image.locked": ([], "true"),
    "model.image.unfreeze_at": ([], "2"),
    "model.image.lr_scale": ([], "0.5"),
    "model.image.layer_decay": ([], "0.5"),
    "model.image.lora": ([], "{targets: [fc1]}"),
    "model.image.lora.rank": (["model.image.lora={targets: [fc1]}"], "3"),
    "model.image.lora.alpha": (["model.image.lora={targets: [fc1]}"], "3"),
    "model.image.lora.dropout": (["model.image.lora={targets: [fc1]}"], "0.3"),
    "model.image.lora.targets": (["model.image.lora={targets: [fc1]}"], "[fc2]"),
    "model.image.patch_dropout": ([], "0.5"),
    "model.text.locked": ([], "true"),
    "model.text.unfreeze_at": ([], "2"),
    "model.text.lr_scale": ([], "0.5"),
    "model.text.layer_decay": ([], "0.5"),
    "model.text.lora": ([], "{}"),
    "model.text.lora.rank": (["model.text.lora={}"], "3"),
    "model.text.lora.alpha": (["model.text.lora={}"], "3"),
    "model.text.lora.dropout": (["model.text.lora={}"], "0.3"),
    "model.text.lora.targets": (["model.text.lora={}"], "[qkv]"),
    "model.text.width": ([], "64"),
    "model.text.depth": ([], "2"),
    "model.text.heads": ([], "4"),
    "model.text.pool": (["model.text.causal=true"], "end"),
    "model.text.causal": ([], "true"),
    "model.text.dropout": ([], "0.2"),
    "model.tokenizer.vocab_size": ([], "280"),
    "model.tokenizer.lowercase": ([], "false"),
    "model.tokenizer.context": ([], "6"),
    "model.dim": ([], "8"),
    "model.logit_scale.init": ([], "5"),
    "model.logit_scale.max": ([], "50"),
    "model.logit_scale.learned": ([], "false"),
    "model.logit_bias": ([], "-5"),
    "data.train": ([], "{folder}/other"),
    "data.window": ([], "1"),
    "data.workers": ([], "2"),
    "data.timeout": (["data.workers=1"], "5"),
    "data.max_skip_rate": ([], "0.5"),
    "data.decode": ([], "fast"),
    "data.cache": ([], "pixels"),
    "data.compiled": (["data.cache=pixels"], "false"),
    "data.caption_variants": ([], "0.5"),
    "data.augment.crop": ([], "[0.1, 1]"),
    "data.augment.ratio": ([], "2"),
    "data.augment.flip": ([], "0.5"),
    "data.augment.rotate": ([], "10"),
    "data.augment.color": ([], "0.5"),
    "data.augment.grayscale": ([], "0.5"),
    "data.augment.tint": ([], "0.5"),
    "loss.same_caption": ([], "negative"),
    "loss.label_smoothing": ([], "0.1"),
    "loss.tile": ([], "3"),
    "loss.exchange": ([], "gather"),
    "loss.check": ([], "false"),
    "loss.weight": (CYCLIP, "loss=[{kind: infonce}, {kind: cyclip, weight: 2}]"),
    "loss.margin": (["loss={kind: margin}"], "0.4"),
    "loss.negatives": (["loss={kind: margin}"], "hardest"),
    "loss.warmup_steps": (["loss={kind: margin, negatives: hardest}"], "3"),
    "loss.adaptive": (["loss={kind: margin}"], "0.5"),
    "loss.gamma": (["loss={kind: sogclr}"], "0.5"),
    "loss.epsilon": (["loss={kind: sogclr}"], "0.5"),
    "loss.rho": (["loss={kind: sogclr}"], "6.5"),
    "loss.teacher": (["loss={kind: distillation, teacher: one}"], "two"),
    "loss.teacher_scale": (["loss={kind: distillation, teacher: one}"], "5"),
    "loss.in_modal": (CYCLIP, "loss=[{kind: infonce}, {kind: cyclip, in_modal: 1}]"),
    "loss.cross_modal": (CYCLIP, "loss=[{kind: infonce}, {kind: cyclip, cross_modal: 1}]"),
    "loss.path": (["loss={kind: custom, path: 'tests.test_every_key:Own'}"], "tests.test_every_key:Other"),
    "loss.args": (["loss={kind: custom, path: 'tests.test_every_key:Own'}"], "{a: 2}"),
    "optim.lr": ([], "1e-2"),
    "optim.weight_decay": ([], "0.3"),
    "optim.betas": ([], "[0.8, 0.9]"),
    "optim.eps": ([], "1e-6"),
    "optim.warmup": ([], "3"),
    "optim.schedule": ([], "constant"),
    "optim.clip": ([], "null"),
    "optim.ema": ([], "{}"),
    "optim.ema.decay": (EMA, "0.5"),
    "optim.ema.every": (EMA, "2"),
    "optim.max_skipped": ([], "3"),
    "train.steps": ([], "9"),
    "train.samples": ([], "48"),
    "train.epochs": ([], "3"),
    "train.minutes": ([], "2"),
    "train.global_batch": ([], "8"),
    "train.curriculum": ([], "[{until: 50%, size: 8}]"),
    "train.curriculum.until": (STAGE, "train.curriculum=[{until: 25%, size: 8}]"),
    "train.curriculum.size": (STAGE, "train.curriculum=[{until: 50%, size: 24}]"),
    "train.curriculum.context": (STAGE,
                                 "train.curriculum=[{until: 50%, size: 8, context: 4}]"),
    "train.curriculum.patch_dropout": (STAGE,
                                       "train.curriculum=[{until: 50%, size: 8, patch_dropout: 0.5}]"),
    "train.unmasked_tail": (["model.image.patch_dropout=0.5"], "50%"),
    "train.chunk": ([], "5"),
    "train.gradient_checkpointing": ([], "true"),
    "train.channels_last": ([], "false"),
    "train.step_timeout": ([], "5"),
    "train.compile": ([], "towers"),
    "checkpoint.every": ([], "3"),
    "checkpoint.keep": ([], "3"),
    "checkpoint.keep_every": ([], "3"),
    "checkpoint.keep_best": (["eval.every=1"], "zeroshot/top1"),
    "eval.every": ([], "2"),
    "eval.stop": (["eval.every=1"], "{}"),
    "eval.stop.metric": (STOP, "image_to_text/recall@1"),
    "eval.stop.patience": (STOP, "5"),
    "eval.stop.min_delta": (STOP, "0.1"),
    "eval.stop.mode": (STOP, "min"),
    "track.log_every": ([], "3"),
    "track.probe": ([], "4"),
    "track.probe_every": ([], "2"),
    "track.mfu": ([], "true"),
}  # fmt: skip
# Keys that nothing built here holds, and where they are shown to have an effect.
ELSEWHERE = {
    "run.dir": "tests/faults/training/test_run_folder.py",
    "model.kind": "tests/test_config.py",
    "model.name": "tests/models/test_open_clip_towers.py",
    "model.path": "tests/training/test_start_from_a_folder.py",
    "model.pretrained": "tests/models/test_open_clip_towers.py",
    "model.image.kind": "there is one kind",
    "model.image.weights": "tests/models/test_towers.py",
    "model.text.kind": "tests/models/test_towers.py",
    "model.text.path": "tests/models/test_towers.py",
    "model.tokenizer.kind": "tests/models/test_tokenizer.py",
    "model.tokenizer.path": "tests/models/test_tokenizer.py",
    "data.validation": "tests/cli/test_train.py",
    "data.features": "tests/training/test_stored_teacher.py",
    "loss.kind": "tests/training/test_losses.py",
    "train.fused_loss": "tests/losses/test_fused.py",
    "train.precision": "tests/test_config.py, the accelerator",
    "train.sharding": "tests/distributed/test_sharding.py; on one process a note",
    "train.threads": "torch.set_num_threads in build_accelerator",
    "eval.report": "tests/cli/test_train.py",
    "eval.labelled": "tests/evaluation/test_commands.py",
    "eval.labelled.name": "the name in the results",
    "eval.labelled.train": "the file that is opened",
    "eval.labelled.test": "the file that is opened",
    "eval.labelled.invert": "tests/evaluation/test_tasks.py",
    "eval.labelled.templates": "tests/evaluation/test_tasks.py",
    "eval.labelled.tasks": "tests/evaluation/test_tasks.py",
    "track.with": "tests/training/test_trackers.py",
}
BLOCKS = ("run", "model", "model.image", "model.text", "model.tokenizer", "model.logit_scale", "data", "data.augment",
          "loss", "optim", "train", "checkpoint", "eval", "track")  # fmt: skip
# Combinations in which a key does nothing: (the other keys, the key, its value).
REFUSED = [
    (["model.tokenizer.path=a.json", "model.tokenizer.vocab_size=8000"], "model.tokenizer.vocab_size", "100"),
    (["model.tokenizer.path=a.json", "model.tokenizer.vocab_size=8000"], "model.tokenizer.lowercase", "false"),
    (["model.text.depth=0", "model.text.heads=4"], "model.text.heads", "2"),
    (["model.text.depth=0", "model.text.heads=4"], "model.text.causal", "true"),
    (["model.kind=open_clip", "model.name=ViT-B-32", "model.pretrained=openai"], "model.logit_scale.init", "10"),
    (["model.image.locked=true", "model.text.locked=true"], "train.gradient_checkpointing", "true"),
    (["loss={kind: siglip}", "model.logit_bias=-10"], "train.fused_loss", "true"),
    (["loss={kind: infonce, tile: null}"], "train.fused_loss", "true"),
    (["loss={kind: sogclr}", "model.logit_scale.learned=false"], "loss.rho", "6"),
    (["data.cache=pixels"], "data.decode", "fast"),
    ([*LOCKED, "data.cache=features"], "data.decode", "fast"),
    ([], "data.features", "somewhere"),
    (["data.workers=0"], "data.timeout", "5"),
    (["data.augment.color=0"], "data.compiled", "true"),
    (["checkpoint.every=null"], "checkpoint.keep_every", "5"),
    (["data.validation=null"], "track.probe", "10"),
    (["data.validation=null"], "track.probe_every", "10"),
    (["track.probe=null"], "track.probe_every", "10"),
    (["train.steps=null", "train.samples=100"], "optim.warmup", "50"),
    (["train.steps=null", "train.minutes=1"], "optim.warmup", "50"),
    (["train.steps=10"], "optim.warmup", "50"),
    (["model.image.locked=true", "model.text.locked=true"], "train.compile", "towers"),
    ([], "model.image.fill_color", "7"),
    (["train.gradient_checkpointing=true"], "train.compile", "towers"),
    (["track.mfu=true"], "train.compile", "towers"),
    (["train.chunk=4"], "train.compile", "towers"),
    (["train.sharding=fsdp"], "train.compile", "towers"),
    ([], "loss.weight", "2"),
    (["loss={kind: margin}"], "loss.warmup_steps", "5"),
    (["model.image.locked=true"], "model.image.layer_decay", "0.5"),
    (["model.image.locked=true"], "model.image.patch_dropout", "0.5"),
    ([], "train.unmasked_tail", "50%"),
    ([], "checkpoint.keep_best", "zeroshot/top1"),
    (["data.validation=null"], "eval.every", "5"),
    ([], "eval.labelled", "[{name: a, train: b, test: c, tasks: [zeroshot]}]"),
    ([], "eval.labelled", "[{name: a, train: b, test: c, tasks: [probe], templates: imagenet}]"),
]


class Own:
    """A loss of a recipe's own."""

    def __init__(self, a: int = 1) -> None:
        self.a = a

    def __call__(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        return {}


class Other(Own):
    """Another one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    (folder / "second").mkdir()
    other = write_corpus(folder / "second" / "corpus")
    (folder / "other").symlink_to(other / "shards")
    return folder


def configured(folder: Path, *overrides: str) -> Config:
    return tiny_config(folder, folder / "run", "checkpoint.every=2", *overrides)


def built(folder: Path, *overrides: str) -> Any:
    """All that a recipe builds, as plain values."""
    return _built(folder, tuple(overrides))


@lru_cache(maxsize=16)
def _built(folder: Path, overrides: tuple[str, ...]) -> Any:
    config = configured(folder, *overrides)
    accelerator = build_accelerator(config)
    data, choice = build_data(config), wants_training(config)
    assert choice is not None
    model = build_model(config, train_tokenizer(data.captions(), choice.vocab_size, choice.lowercase).to_str())
    teachers = {name: Teacher(torch.ones(40, 4), torch.ones(40, 4), 7.0) for name in ("one", "two")}
    trainer = build_trainer(
        config, accelerator, model, data, teachers=teachers, validate=lambda model: {},
        validation_index=open_index(f"{folder}/shards"), quiet=True,
    )  # fmt: skip
    own = config.model_dump()
    used = {"teacher": own["loss"].get("teacher")} if isinstance(own["loss"], Mapping) else {}
    return plain([trainer, model, config.data.max_skip_rate, used])


def plain(value: Any, seen: dict[int, tuple[int, Any]] | None = None) -> Any:
    """Values, tensors by their bytes, objects by what they hold; what was seen before by its number."""
    seen = {} if seen is None else seen
    if value is None or isinstance(value, (bool, int, float, str, bytes, Path, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        array = value.detach().contiguous().float().numpy() if isinstance(value, torch.Tensor) else value
        learns = getattr(value, "requires_grad", None)
        strides = value.stride() if isinstance(value, torch.Tensor) else None
        return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest(), learns, strides
    if id(value) in seen:
        return f"number {seen[id(value)][0]}"
    seen[id(value)] = len(seen), value  # the value too: else its id might be that of a later one
    if isinstance(value, Mapping):
        return [(str(key), plain(inner, seen)) for key, inner in value.items()]
    if isinstance(value, (list, tuple)):
        return [plain(inner, seen) for inner in value]
    if callable(value) and hasattr(value, "__code__"):
        return [value.__qualname__, *(plain(cell.cell_contents, seen) for cell in value.__closure__ or ())]
    ours = type(value).__module__.split(".")[0] in ("contrastive", "tests", "torch", "timm", "peft")
    name = type(value).__qualname__
    if not ours or name in ("Clock", "ShardIndex") or "Accelerator" in name:
        if hasattr(value, "param_groups"):
            return [name, plain(value.param_groups, seen)]
        return name if not hasattr(value, "to_str") else value.to_str()
    slots = {slot: getattr(value, slot, None) for slot in getattr(type(value), "__slots__", ())}
    return [name, plain({**slots, **getattr(value, "__dict__", {})}, seen)]


def keys() -> list[str]:
    return sorted({path for path, _ in _all_keys(Config)} - set(BLOCKS))


def test_every_key_is_shown_to_have_an_effect():
    assert [key for key in keys() if key not in CHANGES and key not in ELSEWHERE] == []
    assert sorted({*CHANGES, *ELSEWHERE} - set(keys())) == []


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_changes_what_is_built(key, folder):
    base, value = CHANGES[key]
    whole = value.startswith(("loss=", "train.curriculum="))
    change = value if whole else f"{key}={value}"
    change = change.replace("{folder}", str(folder))
    assert built(folder, *base) == _built.__wrapped__(folder, tuple(base)), "the same recipe builds the same"
    assert built(folder, *base) != built(folder, *base, change)


@pytest.mark.parametrize(("others", "key", "value"), REFUSED, ids=lambda part: part if isinstance(part, str) else None)
def test_a_key_that_does_nothing_is_refused(others, key, value, folder):
    configured(folder, *others)
    with pytest.raises(UserError) as caught:
        configured(folder, *others, f"{key}={value}")
    assert key in str(caught.value) and "\n" not in str(caught.value)


def test_a_written_recipe_with_all_its_keys_is_not_refused(folder, tmp_path):
    for others, *_ in REFUSED:
        config = configured(folder, *others)
        (tmp_path / "config.yaml").write_text(dump_yaml(config))
        assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("length", ["train.epochs=1", "train.samples=40"])
def test_a_warm_up_that_is_longer_than_the_run_is_refused_before_it_starts(length, folder):
    with pytest.raises(UserError, match=r"optim.warmup: 30 steps of warm-up do not fit into train.* 3 steps"):
        built(folder, "train.steps=null", length, "optim.warmup=30")
