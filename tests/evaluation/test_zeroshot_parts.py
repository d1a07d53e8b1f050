"""What stands on zero-shot weights: prompts, hierarchy, lint, thresholds, the file."""

import json

import numpy as np
import open_clip
import pytest
import torch

import contrastive
from contrastive.errors import UserError
from contrastive.evaluation import ZeroShotClassifier, embed, embed_texts, label_order_difference, template_spread
from contrastive.evaluation.hierarchy import Hierarchy
from contrastive.evaluation.labels import lint_labels
from contrastive.evaluation.prompts import class_prompts, embed_prompts
from contrastive.evaluation.templates import read_templates
from contrastive.models import TwoTower, load, open_clip_model
from tests.evaluation.fake import NAMES, square
from tests.evaluation.test_commands import save_random_model
from tests.models.test_open_clip_towers import TINY

PARENTS = {"red": "warm", "yellow": "warm", "warm": "colour", "blue": "cold"}


def tiny_clip(tmp_path, name="tiny-zero") -> TwoTower:
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps({**TINY, "custom_text": True}))
    open_clip.add_model_config(str(path))
    torch.manual_seed(3)
    return open_clip_model(str(path)).eval()


# ---- prompts


@pytest.mark.parametrize(
    ("name", "expected"),
    [("openai80", open_clip.OPENAI_IMAGENET_TEMPLATES), ("openai7", open_clip.SIMPLE_IMAGENET_TEMPLATES)],
)
def test_the_named_ensembles_are_open_clips(name, expected):
    assert read_templates(name) == tuple(template("{}") for template in expected)


def test_weights_equal_those_of_open_clips_builder(tmp_path):
    ours, labels = tiny_clip(tmp_path), ["dog", "golden retriever", "golden eagle"]
    torch.manual_seed(3)
    peer = open_clip.create_model("tiny-zero").eval()
    expected = open_clip.build_zero_shot_classifier(
        peer, open_clip.SimpleTokenizer(), labels, open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    assert ours.shares_prefixes
    found = ZeroShotClassifier(ours, labels, "openai80").weights_
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_prompts_given_twice_get_the_embeddings_of_the_plain_way_in_their_order(tmp_path):
    model, prompts = tiny_clip(tmp_path), ["a dog", "x", "a dog on a mat", "a dog"]
    np.testing.assert_allclose(embed_prompts(model, prompts), embed_texts(model, prompts), atol=1e-5)


def test_prompts_by_label_and_aliases(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"tv": ["a {} set", "a screen"], "cat": "a {}"}))
    aliases = {"tv": ["television", "TV"]}
    expected = [["a television set", "a screen", "a TV set"], ["a cat"]]
    assert class_prompts(["tv", "cat"], str(file), aliases) == expected
    assert class_prompts(["tv", "cat"], ["a {}"], aliases) == [["a television", "a TV"], ["a cat"]]


def test_labels_with_different_numbers_of_prompts_are_each_their_own_mean(model):
    classifier = ZeroShotClassifier(model, ["warm", "blue"], {"warm": ["red", "yellow", "green"], "blue": ["{}"]})
    for column, prompts in zip(classifier.weights_.T, [["red", "yellow", "green"], ["blue"]], strict=True):
        mean = embed_texts(model, prompts).mean(axis=0)
        np.testing.assert_allclose(column, mean / np.linalg.norm(mean), atol=1e-6)


@pytest.mark.parametrize(
    ("templates", "aliases", "message"),
    [
        ({"red": ["a"]}, None, "none for blue"),
        ({"red": ["a"], "blue": ["b"], "green": ["c"]}, None, "no such label: green"),
        ({"red": ["a"], "blue": []}, None, "'blue' has an empty one"),
        (None, {"pink": ["rose"]}, "aliases: no such label: pink"),
        ("missing.json", None, "no such file"),
    ],
)
def test_prompts_that_cannot_be_meant_are_told(templates, aliases, message):
    with pytest.raises(UserError, match=message):
        class_prompts(["red", "blue"], templates, aliases)


# ---- template spread


def test_the_spread_has_the_accuracies_of_classifiers_built_one_by_one(model):
    images = [square(name, shade) for name in NAMES for shade in (0, 60, 120)]
    features, target = embed(model, images).image, np.repeat(np.arange(4), 3)
    templates = ["{} green", "{}", "blue red {}"]
    found = template_spread(model, features, target, NAMES, templates)

    def top1(wordings):
        return ZeroShotClassifier(model, NAMES, wordings).score(features, np.asarray(NAMES)[target])

    assert found["ensemble"]["value"] == top1(templates)
    assert found["names_only"]["value"] == top1(None)
    singles = {template: top1([template]) for template in templates}
    assert {row["template"]: row["top1"] for row in found["templates"]} == singles
    assert len(set(singles.values())) > 1  # else a template mistaken for another would not show
    assert found["single"]["std"] == pytest.approx(np.std(list(singles.values())))
    assert found["single"]["low"] == min(singles.values()) and found["single"]["high"] == max(singles.values())


def test_weights_do_not_depend_on_the_order_of_labels(tmp_path):
    model = tiny_clip(tmp_path)
    assert label_order_difference(model, ["dog", "golden retriever", "cat", "golden eagle"], "openai7") < 1e-5


def test_the_canary_sings_where_a_label_depends_on_its_neighbours(model):
    def leaky(tokens):
        encoded = plain(tokens)
        return encoded + encoded[:1]

    plain, model.encode_text = model.encode_text, leaky
    assert label_order_difference(model, NAMES, seed=1) > 1e-2
    assert any("order of the labels" in line for line in ZeroShotClassifier(model, NAMES).lint())


# ---- hierarchy


def test_a_parents_probability_is_the_sum_of_its_childrens(model):
    classifier = ZeroShotClassifier(model, NAMES, parents=PARENTS)  # red, green, blue, yellow
    images = [square(name) for name in NAMES]
    leaves = classifier.predict_proba(images)
    assert classifier.level_names(1) == ["warm", "green", "cold"]
    expected = np.stack([leaves[:, 0] + leaves[:, 3], leaves[:, 1], leaves[:, 2]], axis=1)
    np.testing.assert_allclose(classifier.predict_proba(images, level=1), expected, rtol=1e-6)
    assert classifier.predict(images, level=1).tolist() == ["warm", "green", "cold", "warm"]
    assert classifier.level_names(2) == ["colour", "green", "cold"]


@pytest.mark.parametrize(
    ("parents", "level", "message"),
    [
        ({"red": "warm", "warm": "red"}, 0, "circle"),
        ({"rde": "warm"}, 0, "did you mean 'red'"),
        (PARENTS, 3, "levels 0 to 2"),
    ],
)
def test_hierarchies_that_cannot_be_meant_are_told(parents, level, message):
    with pytest.raises(UserError, match=message):
        Hierarchy(NAMES, parents).names(level)


# ---- lint


def test_lint_names_what_deserves_a_second_look():
    weights = np.asarray([[1, 0], [1, 0.1], [0, 1]], np.float32).T
    labels = ["T-shirt", "t shirt", "boot"]
    lines = lint_labels(labels, weights, prompts=[["a top"], ["b"], ["a top"]])
    assert len(lines) == 3 and "differ in spelling" in lines[0]
    assert "cosine 0.995" in lines[1] and "'T-shirt' and 'boot'" in lines[2]
    assert lint_labels(["a", "b"], np.eye(2, dtype=np.float32), prompts=[["a"], ["b"]]) == []


def test_lint_finds_the_prompts_that_the_context_cuts(tmp_path):
    classifier = ZeroShotClassifier(tiny_clip(tmp_path), ["dog", "cat " * 90, "one two"])
    cut = [line for line in classifier.lint() if "context" in line]
    assert len(cut) == 1 and cut[0].startswith("'cat cat")
    classifier.labels = ["dog", "cat " * 20]
    assert not [line for line in classifier.lint() if "context" in line]


# ---- thresholds


def test_a_temperature_is_fitted_on_the_undivided_logits_and_keeps_predictions(model):
    images = [square(name, shade) for name in NAMES for shade in (0, 60, 120)]
    truth = [name for name in NAMES for _ in range(3)]
    truth[0], truth[5] = "blue", "red"
    classifier = ZeroShotClassifier(model, NAMES).fit()
    before = classifier.predict(images).tolist()
    once = classifier.fit_temperature(images, truth).temperature_
    assert once == classifier.fit_temperature(images, truth).temperature_ != 1
    np.testing.assert_allclose(classifier.decision_function(images) * once, classifier.logits(images), rtol=1e-5)
    assert classifier.predict(images).tolist() == before


def test_none_of_these_is_told_from_the_labels(model):
    classifier = ZeroShotClassifier(model, ["red", "blue"])
    known = [square(name, shade) for name in ("red", "blue") for shade in (0, 20, 40)]
    unknown = [square("green", shade) for shade in (0, 20, 40)]
    found = classifier.fit_rejection(known, unknown)
    assert found["auroc"] == 1 and found["fpr95"] == 0 and found["kept"] == 1 and found["refused"] == 1
    assert classifier.fits([*known, *unknown]).tolist() == [True] * 6 + [False] * 3
    assert classifier.fit_rejection(known)["kept"] == 1


def test_several_labels_an_image_by_their_own_thresholds(model):
    classifier = ZeroShotClassifier(model, NAMES)
    images = [square(name) for name in NAMES]
    truth = np.eye(4, dtype=bool)
    assert (classifier.fit_thresholds(images, truth).predict_labels(images) == truth).all()


def test_a_model_with_a_bias_needs_no_thresholds(model):
    model.logit_bias = torch.tensor(-15.0)
    classifier = ZeroShotClassifier(model, NAMES)
    images = [square(name) for name in NAMES]
    expected = torch.sigmoid(torch.as_tensor(classifier.logits(images)) - 15) >= 0.5
    assert (classifier.predict_labels(images) == expected.numpy()).all() and expected.any() and not expected.all()


def test_what_was_not_fitted_is_told(model):
    classifier = ZeroShotClassifier(model, NAMES)
    with pytest.raises(UserError, match="fit_rejection"):
        classifier.fits([square("red")])
    with pytest.raises(UserError, match="fit_thresholds"):
        classifier.predict_labels([square("red")])
    with pytest.raises(UserError, match="not among the classifier's: pink"):
        classifier.fit_temperature([square("red")], ["pink"])


# ---- the file


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("zero-model"), 0)


def test_a_saved_classifier_is_the_same_without_a_text_tower(saved_model, pairs, tmp_path):
    model = load(saved_model)
    classifier = ZeroShotClassifier(model, NAMES, {name: [name, f"a {name}"] for name in NAMES}, parents=PARENTS)
    features = embed(model, pairs).image
    classifier.fit_temperature(features, NAMES * 2).fit_thresholds(features, np.tile(np.eye(4), (2, 1)))
    classifier.fit_rejection(features)
    classifier.save(tmp_path / "classifier.safetensors", model_path=saved_model)
    alone = contrastive.load_classifier(tmp_path / "classifier.safetensors")
    beside = contrastive.load_classifier(tmp_path / "classifier.safetensors", saved_model)
    for opened, images in ((alone, features), (beside, pairs)):
        np.testing.assert_allclose(opened.predict_proba(images), classifier.predict_proba(features), rtol=1e-5)
        assert (opened.predict_labels(features) == classifier.predict_labels(features)).all()
        assert opened.rejection_ == classifier.rejection_
        assert opened.level_names(1) == classifier.level_names(1)
    alone.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "classifier.safetensors").read_bytes()


def test_a_classifier_without_its_model_takes_embeddings_alone(saved_model, tmp_path):
    ZeroShotClassifier(load(saved_model), NAMES).save(tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="without its model"):
        contrastive.load_classifier(tmp_path / "c.safetensors").predict([square("red")])


def test_another_models_classifier_is_refused_with_both_hashes(saved_model, tmp_path):
    model, other = load(saved_model), load(save_random_model(tmp_path / "other", 1))
    ZeroShotClassifier(model, NAMES).save(tmp_path / "c.safetensors")
    with pytest.raises(UserError) as error:
        contrastive.load_classifier(tmp_path / "c.safetensors", other)
    for one in (model, other):
        assert contrastive.models.fingerprint(one) in str(error.value)


def test_what_is_no_classifier_is_told(tmp_path):
    (tmp_path / "c.safetensors").write_bytes(b"no")
    for name, message in (("c.safetensors", "not a classifier file"), ("d.safetensors", "no such file")):
        with pytest.raises(UserError, match=message):
            contrastive.load_classifier(tmp_path / name)


def test_features_that_are_not_finite_are_told(model):
    features = np.ones((2, 3))
    features[1, 1] = np.nan
    with pytest.raises(UserError, match="row 1 is not finite"):
        ZeroShotClassifier(model, NAMES).predict(features)


def test_a_model_opened_without_its_text_tower_has_the_same_images_and_fingerprint(saved_model):
    whole, half = load(saved_model), load(saved_model, text=False)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(half.encode_image(pixels), whole.encode_image(pixels))
    assert contrastive.models.fingerprint(half) == contrastive.models.fingerprint(whole)
    assert not [name for name in half.state_dict() if name.startswith("text.")]
    with pytest.raises(UserError, match="without its text tower"):
        half.encode_text(torch.zeros(1, 2, dtype=torch.int64))
