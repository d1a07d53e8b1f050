"""Model folders, classifiers and probes that were written before the preprocessing was saved still open."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
from PIL import Image

import contrastive
from contrastive import models
from contrastive.cli import main
from contrastive.errors import UserError
from contrastive.evaluation import LinearProbe, embed
from contrastive.models import Preprocessing

BEFORE = Path(__file__).parent / "before"


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (9 + 4 * i, 21, 3), np.uint8)) for i in range(4)]


@pytest.fixture(params=["timm", "open_clip"])
def before(request, tmp_path):
    return shutil.copytree(BEFORE / request.param, tmp_path / request.param)


def open_model(folder: Path, **options) -> models.TwoTower:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", models.AssumedPreprocessingWarning)
        return contrastive.load(folder, device="cpu", **options)


@pytest.mark.parametrize("text", [True, False])
def test_a_folder_keeps_its_fingerprint_and_its_files_give_the_same_probabilities(before, text):
    expected = json.loads((before / "expected.json").read_text())
    model = open_model(before, text=text)
    assert models.fingerprint(model) == expected["fingerprint"]
    classifier = contrastive.load_classifier(before / "classifier.safetensors", model)
    np.testing.assert_allclose(classifier.predict_proba(pictures()), expected["classifier"], rtol=1e-4)
    probe = LinearProbe.load(before / "probe.safetensors")
    rows = embed(model, pictures(), features="tower", text=False).image
    np.testing.assert_allclose(probe.predict_proba(rows), expected["probe"], rtol=1e-4)


def test_a_folder_of_timm_opens_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = contrastive.load(BEFORE / "timm", device="cpu")
    assert model.preprocessing == Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 16)


def test_an_open_clip_folder_says_in_one_line_what_is_assumed_and_how_to_repair_it():
    with pytest.warns(models.AssumedPreprocessingWarning) as caught:
        model = contrastive.load(BEFORE / "open_clip", device="cpu")
    assert model.preprocessing == Preprocessing(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, 16)
    (line,) = (str(one.message) for one in caught)
    assert "\n" not in line
    for words in ("0.48145466", "not saved", 'config.json as "preprocessing"', "export"):
        assert words in line


def test_the_warning_names_what_open_clips_own_weights_of_that_name_have(tmp_path):
    shutil.copytree(BEFORE / "open_clip" / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "name": "ViT-B-16-SigLIP"}))
    with pytest.warns(models.AssumedPreprocessingWarning, match=r"ViT-B-16-SigLIP have mean \[0.5.*squash"):
        contrastive.load(tmp_path, device="cpu")


def test_a_saved_again_folder_is_opened_without_a_warning_and_keeps_its_fingerprint(before, tmp_path):
    model = open_model(before)
    models.save_model(model, tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = contrastive.load(tmp_path / "again", device="cpu")
    assert models.fingerprint(again) == models.fingerprint(model)
    assert again.preprocessing == model.preprocessing


def repair(folder: Path, **changes) -> None:
    config = json.loads((folder / "model" / "config.json").read_text())
    config["preprocessing"] = open_model(folder).preprocessing.to_dict() | changes
    (folder / "model" / "config.json").write_text(json.dumps(config))


def test_a_repaired_folder_has_another_fingerprint_with_and_without_its_text_tower(tmp_path):
    folder = shutil.copytree(BEFORE / "open_clip", tmp_path / "open_clip")
    repair(folder, mean=[0.5, 0.5, 0.5], resize_mode="squash")
    whole, half = (contrastive.load(folder, device="cpu", text=text) for text in (True, False))
    assert whole.preprocessing.mean == (0.5, 0.5, 0.5) and whole.preprocessing.resize_mode == "squash"
    assert models.fingerprint(whole) == models.fingerprint(half)
    assert models.fingerprint(whole) != json.loads((folder / "expected.json").read_text())["fingerprint"]


def test_a_classifier_and_a_probe_from_before_the_repair_are_refused_in_one_line(tmp_path, capsys):
    folder = shutil.copytree(BEFORE / "open_clip", tmp_path / "open_clip")
    repair(folder, resize_mode="squash")
    with pytest.raises(UserError) as error:
        contrastive.load_classifier(folder / "classifier.safetensors", contrastive.load(folder, device="cpu"))
    assert "shortest" in str(error.value) and "squash" in str(error.value) and "\n" not in str(error.value)
    pictures()[0].save(tmp_path / "a.png")
    assert main(["probe", "predict", str(folder / "probe.safetensors"), str(tmp_path / "a.png"),
                 "--model", str(folder)]) == 2  # fmt: skip
    line = capsys.readouterr().err.strip()
    assert "shortest" in line and "squash" in line and "\n" not in line


def test_a_wrong_repair_is_one_line_that_names_the_folder(tmp_path):
    folder = shutil.copytree(BEFORE / "open_clip", tmp_path / "open_clip")
    repair(folder, resize_mode="stretch")
    with pytest.raises(UserError, match=r"model: config.json: preprocessing.resize_mode 'stretch': use shortest"):
        contrastive.load(folder, device="cpu")


def test_whole_numbers_as_mean_keep_their_fingerprint():
    model = open_model(BEFORE / "timm")
    tower = models.TimmImageTower("resnet18", 8, 16, mean=(0, 0, 0), std=(1, 1, 1))
    described = models.describe(models.TwoTower(tower, model.text, model.tokenizer, 8))["image"]
    assert repr(described["mean"]) == "[0, 0, 0]"  # as such it was hashed


def test_a_mean_that_was_changed_in_one_of_two_places_is_told(tmp_path):
    model = open_model(BEFORE / "timm")
    folder = models.save_model(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["image"]["mean"] = [0.1, 0.1, 0.1]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"image.mean \[0.1, 0.1, 0.1\] and preprocessing.mean \[0.4, 0.5, 0.6\]"):
        contrastive.load(folder, device="cpu")
