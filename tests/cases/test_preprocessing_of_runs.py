"""A recipe's preprocessing: in the model, in the loader's evaluation pixels, in its identity, and in saved files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import contrastive
from contrastive import models
from contrastive.builders.model import build_model
from contrastive.builders.trainer import build_probe
from contrastive.cli import main
from contrastive.config import load_config
from contrastive.errors import UserError
from contrastive.evaluation.belonging import identity_of
from contrastive.evaluation.stored import preprocessing_hash
from contrastive.models import Preprocessing
from contrastive.shards import Augment, PairLoader, open_index, open_source, write_shards
from tests.cases.photographs import photographs

MODES = [("shortest", "bicubic"), ("shortest", "bilinear"), ("longest", "bicubic"), ("squash", "bilinear")]
HALF = (0.5, 0.5, 0.5)
RECIPE = """
run: {{dir: {folder}/run}}
model:
  image: {{name: resnet18, size: 16, kwargs: {{channels: [8, 8, 8, 8], layers: [1, 1, 1, 1]}}}}
  text: {{width: 8, depth: 1, heads: 2}}
  tokenizer: {{kind: open_clip, context: 8}}
  dim: 8
data: {{train: {folder}/shards, validation: {folder}/shards, workers: 0}}
train: {{steps: 2, global_batch: 4, precision: fp32}}
checkpoint: {{every: null}}
track: {{with: [], probe: 4}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four photographs of different shapes, as PNG with captions and as shards, and a recipe."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "images").mkdir()
    for name, image in photographs().items():
        image.save(folder / "images" / f"{name}.png")
        (folder / "images" / f"{name}.txt").write_text(f"a {name} picture")
    write_shards(open_source(folder / "images"), folder / "shards")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return folder


def model_of(folder: Path, *overrides: str) -> models.TwoTower:
    return build_model(load_config(folder / "recipe.yaml", list(overrides))).eval()


def chosen(mode: str, interpolation: str) -> list[str]:
    return [f"model.image.resize_mode={mode}", f"model.image.interpolation={interpolation}"]


def lengths(captions: list[str]) -> np.ndarray:
    return np.array([[len(caption)] for caption in captions])


def evaluation_loader(folder: Path, **options) -> PairLoader:
    options = {"image_size": 16, "augment": None, "global_batch": 4, "steps": 1, **options}
    return PairLoader(open_index(folder / "shards"), tokenize=lengths, **options)


@pytest.mark.parametrize(("mode", "interpolation"), MODES)
def test_a_recipes_choice_is_in_the_model_and_in_its_folder(folder, tmp_path, mode, interpolation):
    model = model_of(folder, *chosen(mode, interpolation))
    assert model.preprocessing == Preprocessing(HALF, HALF, 16, mode, interpolation)
    models.save_model(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["preprocessing"]["resize_mode"] == mode
    again = models.load(tmp_path, device="cpu")
    for other in (again, models.reinitialised(model)):
        assert other.preprocessing == model.preprocessing
    assert models.fingerprint(again) == models.fingerprint(model)


def test_models_that_differ_in_preprocessing_alone_have_different_fingerprints_and_cache_keys(folder):
    changes = [chosen(*mode) for mode in MODES] + [["model.image.mean=[0.4,0.5,0.5]"], ["model.image.std=[1,0.5,0.5]"]]
    changes += [[*chosen("longest", "bicubic"), "model.image.fill_color=9"]]
    found = [model_of(folder, *change) for change in changes]
    assert len({models.fingerprint(model) for model in found}) == len(changes)
    assert len({preprocessing_hash(model) for model in found}) == len(changes)


@pytest.mark.parametrize(
    ("mode", "interpolation", "workers"), [*((*mode, 0) for mode in MODES), ("squash", "bilinear", 1)]
)
def test_the_loader_without_augmentation_gives_the_models_pixels(folder, mode, interpolation, workers):
    model = model_of(folder, *chosen(mode, interpolation))
    (batch,) = evaluation_loader(folder, preprocessing=model.preprocessing, workers=workers)
    for pixels, key in zip(batch.pixels, batch.keys, strict=True):
        assert torch.equal(pixels, model.preprocess(photographs()[Path(key).stem]))


def test_the_loader_gives_pixels_that_are_not_square(folder):
    preprocessing = Preprocessing(HALF, HALF, (12, 20), "longest", fill_color=100)
    (batch,) = evaluation_loader(folder, preprocessing=preprocessing)
    assert batch.pixels.shape == (4, 3, 12, 20)
    for pixels, key in zip(batch.pixels, batch.keys, strict=True):
        assert np.array_equal(pixels.numpy(), preprocessing.apply(photographs()[Path(key).stem]))


def test_the_loaders_identity_holds_the_evaluation_transform_only_where_it_is_used(folder):
    plain = evaluation_loader(folder).identity
    squash = Preprocessing(HALF, HALF, 16, "squash")
    assert evaluation_loader(folder, preprocessing=squash).identity != plain
    assert evaluation_loader(folder, preprocessing=Preprocessing(HALF, HALF, 16)).identity == plain
    augmented = evaluation_loader(folder, augment=Augment()).identity
    assert evaluation_loader(folder, augment=Augment(), preprocessing=squash).identity == augmented


def test_the_fixed_batch_of_a_run_is_prepared_as_the_model_does(folder):
    config = load_config(folder / "recipe.yaml", chosen("squash", "bilinear"))
    model = build_model(config).eval()
    probe = build_probe(config, model, open_index(folder / "shards"))
    assert probe is not None
    expected = {model.preprocess(image).numpy().tobytes() for image in photographs().values()}
    assert {pixels.numpy().tobytes() for pixels in probe.pixels} == expected


def test_a_trained_run_keeps_its_preprocessing_for_classifiers_and_probes(folder, tmp_path, capsys):
    run = f"run.dir={tmp_path / 'run'}"
    assert main(["train", str(folder / "recipe.yaml"), run, *chosen("squash", "bilinear")]) == 0
    model = contrastive.load(tmp_path / "run", device="cpu")
    assert model.preprocessing == Preprocessing(HALF, HALF, 16, "squash", "bilinear")
    classifier = contrastive.ZeroShotClassifier(model, ["lying", "upright"])
    classifier.save(tmp_path / "c.safetensors")
    contrastive.load_classifier(tmp_path / "c.safetensors", tmp_path / "run")
    model.preprocessing = Preprocessing(HALF, HALF, 16)
    capsys.readouterr()
    with pytest.raises(UserError) as error:
        contrastive.load_classifier(tmp_path / "c.safetensors", model)
    line = str(error.value)
    assert "resize_mode squash, interpolation bilinear" in line and "resize_mode shortest" in line


def test_a_probe_is_used_with_its_own_preprocessing_only(folder, tmp_path, capsys):
    model = model_of(folder, *chosen("longest", "bicubic"))
    models.save_model(model, tmp_path / "model")
    rows = contrastive.embed(model, list(photographs().values()), features="tower", text=False).image
    probe = contrastive.LinearProbe(1.0).fit(rows, ["a", "b", "c", "c"])
    probe.save(tmp_path / "p.safetensors", model=str(tmp_path / "model"), features="tower", **identity_of(model))
    command = ["probe", "predict", str(tmp_path / "p.safetensors"), str(folder / "images" / "lying.png")]
    assert main(command) == 0
    model.preprocessing = Preprocessing(HALF, (0.5, 0.5, 0.25), 16, "longest")
    models.save_model(model, tmp_path / "model")
    capsys.readouterr()
    assert main(command) == 2
    line = capsys.readouterr().err.strip()
    assert "std [0.5, 0.5, 0.5]" in line and "std [0.5, 0.5, 0.25]" in line and "\n" not in line


def test_models_that_differ_in_preprocessing_are_not_mixed(folder):
    one, other = model_of(folder), model_of(folder, *chosen("squash", "bicubic"))
    with pytest.raises(UserError, match="preprocessing: resize_mode shortest in the first, resize_mode squash in the"):
        models.interpolate(one, other, 0.5)


def test_a_fill_color_without_a_use_is_one_line(folder):
    with pytest.raises(UserError, match="model.image.fill_color: 9 does nothing with resize_mode shortest"):
        model_of(folder, "model.image.fill_color=9")


def test_a_model_of_images_that_are_not_square_is_not_trained_on_square_crops(folder, tmp_path):
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": [16, 24], "layers": 1, "width": 8, "head_width": 4, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    (tmp_path / "wide.json").write_text(json.dumps(config))
    before, after = RECIPE.split("model:")[0], RECIPE.split("data:")[1]
    model = f"model: {{{{kind: open_clip, name: {tmp_path}/wide.json}}}}\ndata:"
    (tmp_path / "wide.yaml").write_text((before + model + after).format(folder=folder))
    with pytest.raises(UserError, match="16 x 24 px, and training makes square crops"):
        build_model(load_config(tmp_path / "wide.yaml", []))


def test_a_size_that_the_tower_does_not_take_is_refused(folder):
    model = model_of(folder)
    with pytest.raises(UserError, match=r"preprocessing.size \[32, 32\].*takes \[16, 16\]"):
        model.preprocessing = Preprocessing(HALF, HALF, 32)
