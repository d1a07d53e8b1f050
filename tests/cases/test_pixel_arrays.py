"""Pixel arrays of a wrong shape, type or range are refused in one line that names them; right ones pass."""

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as transforms

from contrastive import models
from contrastive.errors import UserError
from contrastive.evaluation import ZeroShotClassifier
from tests.cases.photographs import photographs

OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
NORMALISATIONS = {"openai": OPENAI, "unit": UNIT, "half": HALF}


def build(**normalisation) -> models.TwoTower:
    torch.manual_seed(0)
    tokenizer = models.CorpusTokenizer(models.train_tokenizer(["red", "blue"] * 3, vocab_size=40), context=4)
    shape = {"channels": (8, 8, 8, 8), "layers": (1, 1, 1, 1)}
    image = models.TimmImageTower("resnet18", 8, 32, kwargs=shape, **normalisation)
    text = models.TransformerTextTower(tokenizer.vocab_size, 8, 4, width=8, depth=1, heads=2, pad_id=tokenizer.pad_id)
    return models.TwoTower(image, text, tokenizer, 8).eval()


def normalised(model: models.TwoTower, grey: torch.Tensor) -> torch.Tensor:
    return (grey.float() - model.pixel_mean) / model.pixel_std


@pytest.fixture
def model() -> models.TwoTower:
    return build(**OPENAI)


@pytest.fixture
def grey(model) -> torch.Tensor:
    """Photographs as the model takes them, uint8 (4, 3, 32, 32)."""
    return torch.stack([model.preprocess(image) for image in photographs().values()])


def refusal(call, given) -> str:
    with pytest.raises(UserError) as error:
        call(given)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("change", "words"), [
    (lambda grey: transforms.resize(grey, [48, 48]), ("(4, 3, 48, 48) of uint8", "(n, 3, 32, 32)", "preprocess")),
    (lambda grey: grey[..., :-1], ("(4, 3, 32, 31)",)),
    (lambda grey: grey.permute(0, 2, 3, 1), ("(4, 32, 32, 3)", "pixels.permute(0, 3, 1, 2)")),
    (lambda grey: grey[0], ("(3, 32, 32)", "pixels[None]")),
    (lambda grey: grey[0].permute(1, 2, 0), ("(32, 32, 3)", "pixels.permute(2, 0, 1)")),
    (lambda grey: grey[:, :1], ("(4, 1, 32, 32)",)),
    (lambda grey: grey[0, 0], ("(32, 32) of uint8", "nor features")),
    (lambda grey: grey[:, 0, 0].float(), ("(4, 32) of float32", "(n, 8)")),
    (lambda grey: grey.long(), ("int64", "uint8 from 0 to 255")),
    (lambda grey: grey > 100, ("bool",)),
])  # fmt: skip
@pytest.mark.parametrize("entrance", ["encode_image", "image_features"])
def test_a_wrong_shape_or_type_is_named_with_a_remedy(model, grey, change, words, entrance):
    line = refusal(getattr(model, entrance), change(grey))
    assert all(word in line for word in words), line


def test_a_zero_shot_classifier_refuses_a_wrong_size_and_arrays_of_several_sizes(model, grey):
    classifier = ZeroShotClassifier(model, ["red", "blue"])
    larger = transforms.resize(grey, [48, 48])
    assert "(4, 3, 48, 48)" in refusal(classifier.predict, larger.numpy())
    line = refusal(classifier.predict, [grey[0].numpy(), larger[0].numpy()])
    assert "(3, 32, 32) and (3, 48, 48)" in line
    assert "not normalised" in refusal(classifier.predict, grey.float().numpy())


@pytest.mark.parametrize("name", NORMALISATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_normalised_photographs_pass_and_grey_levels_do_not(name, dtype, grey):
    model = build(**NORMALISATIONS[name])
    for pixels in (normalised(model, grey), normalised(model, grey[:1]), normalised(model, grey * 0)):
        models.pixels.check_normalised(pixels.to(dtype), model.preprocessing)
    for pixels in (grey, grey[1:2], grey // 8):
        line = refusal(lambda some: models.pixels.check_normalised(some, model.preprocessing), pixels.to(dtype))
        assert "not normalised with mean" in line and "uint8" in line


@pytest.mark.parametrize("name", ["openai", "half"])
def test_values_from_0_to_1_are_refused_where_they_are_not_the_normalised_range(name, grey):
    model = build(**NORMALISATIONS[name])
    assert "floats from 0" in refusal(model.encode_image, grey.float() / 255)
    assert "not normalised" in refusal(model.encode_image, transforms.resize(grey.float() / 255, [32, 32]) * 0.5 + 0.2)


def test_values_from_0_to_1_pass_where_they_are_the_normalised_range(grey):
    model = build(**UNIT)
    torch.testing.assert_close(model.encode_image(grey.float() / 255), model.encode_image(grey))


def test_a_bright_picture_passes_though_its_normalised_values_are_from_0_to_1(grey):
    model = build(**HALF)
    bright = 128 + grey // 2
    torch.testing.assert_close(model.encode_image(normalised(model, bright)), model.encode_image(bright))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(model, grey, value):
    pixels = normalised(model, grey)
    pixels[1, 2, 3, 4] = value
    assert "NaN or inf" in refusal(model.encode_image, pixels)


def test_random_numbers_pass(model):
    assert model.encode_image(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).shape == (2, 8)


def test_a_model_in_training_takes_other_sizes(model, grey):
    model.train()
    assert model.encode_image(transforms.resize(grey, [48, 48])).shape == (4, 8)
    assert model.encode_image(torch.rand(2, 3, 16, 16)).shape == (2, 8)
    assert "(4, 32, 32, 3)" in refusal(model.encode_image, grey.permute(0, 2, 3, 1))


def test_float64_pixels_of_numpy_give_the_embeddings_of_float32(model, grey):
    wide = torch.from_numpy(normalised(model, grey).numpy().astype(np.float64))
    torch.testing.assert_close(model.encode_image(wide), model.encode_image(grey))
