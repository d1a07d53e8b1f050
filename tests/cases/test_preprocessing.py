"""Pictures become the pixels that open_clip makes of them, and a saved model keeps that."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from contrastive import models
from contrastive.errors import UserError
from contrastive.models import Preprocessing
from tests.cases.photographs import photographs

KEYS = ("mean", "std", "interpolation", "resize_mode")
HALF = (0.5, 0.5, 0.5)


def tags_of_every_combination() -> dict[str, dict[str, Any]]:
    """One tag of each combination of preprocessing values that open_clip lists, with these values."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, tag in open_clip.list_pretrained():
        config = {key: open_clip.get_pretrained_cfg(name, tag).get(key) for key in (*KEYS, "size", "fill_color")}
        found.setdefault(json.dumps(config), (f"{name}:{tag}", config))
    return dict(found.values())


TAGS = tags_of_every_combination()


def grey_levels(transformed: torch.Tensor, config: dict[str, Any]) -> np.ndarray:
    """Normalised pixels (3, H, W) of open_clip as whole grey levels."""
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return ((transformed * std + mean) * 255).round().numpy()


@pytest.fixture
def tiny_tag(tmp_path, monkeypatch):
    """Put a tiny model with a tag's preprocessing, and with weights in a file, into open_clip's registry."""

    def register(config: dict[str, Any], size: Any) -> tuple[str, str]:
        name = f"tiny-{len(open_clip.list_models())}"
        model = {
            "embed_dim": 16,
            "vision_cfg": {"image_size": size, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
            "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 8, "heads": 2, "layers": 1},
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(model))
        open_clip.add_model_config(str(tmp_path / f"{name}.json"))
        torch.manual_seed(0)
        torch.save(open_clip.create_model(name).state_dict(), tmp_path / f"{name}.pt")
        given = {key: value for key, value in config.items() if value is not None}
        tag = {**given, "file": str(tmp_path / f"{name}.pt")}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"tag": tag})
        return name, "tag"

    return register


def test_the_registry_has_the_combinations_that_are_known_to_differ():
    assert len(TAGS) >= 8
    modes = {(config["resize_mode"], config["interpolation"]) for config in TAGS.values()}
    assert modes >= {("shortest", "bicubic"), ("shortest", "bilinear"), ("squash", "bicubic"), ("squash", "bilinear")}


@pytest.mark.parametrize("size", [32, (24, 40)], ids=["square", "wide"])
@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_gives_open_clips_pixels_and_features_before_and_after_saving(tag, size, tiny_tag, tmp_path):
    config = TAGS[tag]
    name, registered = tiny_tag(config, size)
    reference, _, transform = open_clip.create_model_and_transforms(name, pretrained=registered)
    opened = models.load(f"{name}:{registered}", device="cpu")
    again = models.load(models.save_model(opened, tmp_path / "model"), device="cpu")
    for image in photographs().values():
        expected = transform(image)
        with torch.inference_mode():
            features = reference.eval().encode_image(expected[None], normalize=True)
            for model in (opened, again):
                pixels = model.preprocess(image)
                assert np.abs(grey_levels(expected, config) - pixels.numpy()).max() <= 1
                assert float((model.encode_image(pixels[None]) * features).sum()) >= 0.99999
    assert again.preprocessing == opened.preprocessing
    assert models.fingerprint(again) == models.fingerprint(opened)


@pytest.mark.parametrize("size", [224, 378, (336, 448), (256, 128)], ids=str)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_pixels_equal_open_clips_transform(mode, interpolation, size):
    config = {"mean": HALF, "std": HALF, "resize_mode": mode, "interpolation": interpolation, "size": size}
    transform = open_clip.image_transform(
        size, False, mean=HALF, std=HALF, resize_mode=mode, interpolation=interpolation, fill_color=90
    )
    ours = Preprocessing.of_open_clip({**config, "fill_color": 90})
    for image in photographs().values():
        assert np.abs(grey_levels(transform(image), config) - ours.apply(image)).max() <= 1


sides = st.integers(1, 70)


@settings(deadline=None, max_examples=60)
@given(
    sides, sides, sides, sides, st.booleans(),
    st.sampled_from(["shortest", "longest", "squash"]), st.sampled_from(["bicubic", "bilinear"]),
)  # fmt: skip
def test_pixels_equal_open_clips_transform_for_any_sides(width, height, rows, columns, square, mode, interpolation):
    size = (rows, rows) if square else (rows, columns)
    ratio = max(width / size[1], height / size[0])
    assume(max(width, height) < 20 * min(width, height))  # a strip is another test
    assume(mode != "longest" or round(min(width, height) / ratio) > 0)  # open_clip ends there with an error
    image = photographs()["lying"].resize((width, height))
    transform = open_clip.image_transform(
        size, False, mean=HALF, std=HALF, resize_mode=mode, interpolation=interpolation
    )
    ours = Preprocessing(HALF, HALF, size, mode, interpolation).apply(image)
    assert ours.shape == (3, *size) and ours.dtype == np.uint8
    assert np.abs(grey_levels(transform(image), {"mean": HALF, "std": HALF}) - ours).max() <= 1


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_strip_is_cut_before_it_is_enlarged(size):
    ours = Preprocessing(HALF, HALF, 224).apply(Image.new("RGB", size, (10, 20, 30)))  # whole: nine gigabytes
    assert (ours == np.array([10, 20, 30]).reshape(3, 1, 1)).all()


def test_a_line_that_would_vanish_in_longest_keeps_one_pixel():
    ours = Preprocessing(HALF, HALF, (8, 8), "longest", fill_color=(0, 10, 20)).apply(Image.new("RGB", (400, 3), "red"))
    assert (ours == np.array([255, 0, 0]).reshape(3, 1, 1)).all(axis=0).sum() == 8
    assert (ours[:, 0, 0] == (0, 10, 20)).all()


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [7, (5, 9)])
def test_what_is_saved_is_read_as_an_equal_value(mode, size):
    ours = Preprocessing((0.1, 0.2, 0.3), (1, 0.5, 0.25), size, mode, "bilinear", 7)
    assert Preprocessing.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours


@pytest.mark.parametrize(("change", "words"), [
    ({"mean": (0.5, 0.5)}, "preprocessing.mean (0.5, 0.5): give three numbers"),
    ({"mean": "0.5"}, "preprocessing.mean '0.5'"),
    ({"std": (0.5, 0.0, 0.5)}, "preprocessing.std [0.5, 0.0, 0.5]: give three numbers above 0"),
    ({"std": (0.5, float("nan"), 0.5)}, "preprocessing.std"),
    ({"size": 0}, "preprocessing.size 0"),
    ({"size": (1, 2, 3)}, "preprocessing.size (1, 2, 3)"),
    ({"size": 2.5}, "preprocessing.size 2.5"),
    ({"resize_mode": "stretch"}, "preprocessing.resize_mode 'stretch': use shortest, longest, squash"),
    ({"interpolation": "nearest"}, "preprocessing.interpolation 'nearest': use bicubic, bilinear"),
    ({"resize_mode": "longest", "fill_color": 300}, "preprocessing.fill_color 300"),
])  # fmt: skip
def test_a_wrong_value_is_one_line_that_names_it(change, words):
    with pytest.raises(UserError) as error:
        replace(Preprocessing(HALF, HALF, (8, 8)), **change)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_key_is_one_line():
    with pytest.raises(UserError, match="give mean, std and size"):
        Preprocessing.from_dict({"mean": HALF, "std": HALF, "size": 8, "crop": 0.9})


def test_a_checkpoint_file_has_open_clips_defaults(tiny_tag):
    name, _ = tiny_tag({"mean": HALF, "std": HALF}, 32)
    file = open_clip.get_pretrained_cfg(name, "tag")["file"]
    found = models.load(f"{name}:{file}", device="cpu").preprocessing
    assert found == Preprocessing(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, 32)


def test_an_open_clip_config_json_has_its_own_preprocessing(tmp_path):
    config = {
        "model_cfg": {
            "embed_dim": 8,
            "vision_cfg": {"image_size": 16, "layers": 1, "width": 8, "head_width": 4, "patch_size": 8},
            "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 8, "heads": 2, "layers": 1},
        },
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "resize_mode": "squash"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    found = models.open_clip_model(str(tmp_path / "open_clip_config.json")).preprocessing
    assert found == Preprocessing((0.1, 0.2, 0.3), (1, 1, 1), 16, "squash")


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_a_folder_of_open_clip_opens_with_its_weights_and_its_preprocessing(tmp_path, tiny_tag, file):
    name, _ = tiny_tag({"mean": HALF, "std": HALF}, 32)
    model = models.load(f"{name}:tag", device="cpu")
    state = {
        key: value.contiguous() for key, value in open_clip.create_model(name, pretrained="tag").state_dict().items()
    }
    save_file(state, tmp_path / file) if file.endswith("safetensors") else torch.save(state, tmp_path / file)
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "resize_mode": "squash"}
    config = {"model_cfg": model.open_clip_config, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    found = models.load(tmp_path, device="cpu")
    assert found.preprocessing == Preprocessing((0.1, 0.2, 0.3), (1, 1, 1), 32, "squash")
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_folder_of_open_clip_without_weights_is_refused(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights beside open_clip_config.json"):
        models.load(tmp_path)
