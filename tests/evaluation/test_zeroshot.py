import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.errors import UserError
from contrastive.evaluation import ZeroShotClassifier, embed, embed_texts, read_templates
from tests.evaluation.fake import NAMES, square


def test_images_in_every_form_get_the_same_prediction(model, pairs):
    classifier = ZeroShotClassifier(model, NAMES)
    images = [square(name) for name in NAMES]
    pixels = torch.stack([model.preprocess(image) for image in images])
    features = embed(model, images).image
    paths = [pairs / f"{n}.png" for n in range(4)]
    for X in (images, pixels, pixels.numpy(), list(pixels), features, 7 * torch.as_tensor(features), paths):
        assert classifier.predict(X).tolist() == NAMES
    assert classifier.predict(images[2]).tolist() == ["blue"]
    assert classifier.predict(pairs).tolist() == NAMES * 2


def test_a_transparent_image_is_the_same_by_path_and_as_an_object(model, tmp_path):
    """Blue lies under full transparency, which shows where it is dropped instead of laid over white."""
    image = Image.new("RGBA", (12, 12), (0, 0, 255, 0))
    image.paste((255, 0, 0, 255), (3, 3, 9, 9))
    image.save(tmp_path / "x.png")
    classifier = ZeroShotClassifier(model, NAMES)
    by_path, by_object = (classifier.predict_proba([x]) for x in (tmp_path / "x.png", image))
    np.testing.assert_array_equal(by_path, by_object)
    assert classifier.predict([image]).tolist() != ["blue"]


def test_probabilities_are_the_softmax_of_scaled_cosines(model):
    classifier = ZeroShotClassifier(model, NAMES)
    images = [square("red"), square("green", 40)]
    logits = torch.as_tensor(embed(model, images).image @ embed_texts(model, NAMES).T) * model.logit_scale.exp()
    np.testing.assert_allclose(classifier.predict_proba(images), logits.softmax(dim=1).detach().numpy(), rtol=1e-5)


def test_a_weight_is_the_normalised_mean_over_templates(model):
    classifier = ZeroShotClassifier(model, ["red", "blue"], ["{}", "{} green", "a {} thing"])
    for column, label in zip(classifier.weights_.T, ["red", "blue"], strict=True):
        mean = embed_texts(model, [label, f"{label} green", f"a {label} thing"]).mean(axis=0)
        np.testing.assert_allclose(column, mean / np.linalg.norm(mean), atol=1e-6)
    assert classifier.weights_.shape == (3, 2)


def test_score_is_the_share_of_right_predictions(model):
    images = [square("red"), square("blue")]
    assert ZeroShotClassifier(model, NAMES).score(images, ["red", "green"]) == 0.5


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["red", "blue", "red "], "twice: red"),
        (["red", " "], "number 2 is empty"),
        ([], "none"),
        ("red", "list"),
    ],
)
def test_labels_that_cannot_be_meant_are_told(model, labels, message):
    with pytest.raises(UserError, match=message):
        ZeroShotClassifier(model, labels).fit()


def test_other_widths_and_shapes_are_told(model):
    classifier = ZeroShotClassifier(model, NAMES)
    with pytest.raises(UserError, match="width 5"):
        classifier.predict(np.zeros((2, 5)))
    with pytest.raises(UserError, match=r"\(2, 5, 5\)"):
        classifier.predict(np.zeros((2, 5, 5)))


def test_an_unreadable_image_is_told_and_not_skipped(model, tmp_path):
    square("red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no")
    with pytest.raises(UserError, match="b.png: not an image"):
        ZeroShotClassifier(model, NAMES).predict(tmp_path)


def test_templates_by_name_list_and_file(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("# my own\na {}\n\nthe {}.\n")
    assert read_templates(file) == read_templates(str(file)) == ("a {}", "the {}.")
    assert read_templates(None) == read_templates("none") == ("{}",)
    assert read_templates(["x {}"]) == read_templates("x {}") == ("x {}",)
    assert len(set(read_templates("short"))) > 1


@pytest.mark.parametrize(("spec", "message"), [(["a photo"], "no {}"), ("shrt", "none, short"), ([], "none")])
def test_templates_that_cannot_be_meant_are_told(spec, message):
    with pytest.raises(UserError, match=message):
        read_templates(spec)
