"""The two-tower model: what it returns, what is learned, and that a saved one is the same one."""

import warnings

import pytest
import torch
from PIL import Image

import contrastive.models as models
from contrastive.errors import UserError

CAPTIONS = ["open book", "apple", "woman feeding baby"]


def test_embeddings_have_unit_length(make_model, pixels):
    model = make_model()
    out = model(pixels, model.tokenize(CAPTIONS))
    for side in ("image", "text"):
        torch.testing.assert_close(out[side].norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(out["scale"], torch.tensor(1 / 0.07))


def test_uint8_pixels_are_normalised_inside(make_model, pixels):
    model = make_model().eval()
    by_hand = (pixels.float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(model.encode_image(pixels), model.encode_image(by_hand))


def test_preprocess_resizes_the_short_side_and_crops_the_centre(make_model):
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (16, 0, 48, 32))
    assert (make_model().preprocess(image)[2] == 255).all()  # the blue centre, nothing of the red sides


def test_features_that_were_computed_before_are_taken_as_they_are(make_model, pixels):
    model = make_model().eval()
    tokens = model.tokenize(CAPTIONS)
    whole, kept = model(pixels, tokens), model(model.image_features(pixels), model.text_features(tokens))
    assert torch.equal(whole["image"], kept["image"]) and torch.equal(whole["text"], kept["text"])


def test_the_scale_stays_under_its_cap(make_model):
    model = make_model(scale_max=20.0)
    model.logit_scale.data.fill_(9.0)
    model.clamp_scale()
    torch.testing.assert_close(model.logit_scale.exp(), torch.tensor(20.0))


def test_a_locked_tower_learns_its_projection_only_and_keeps_its_statistics(make_model, pixels):
    model = make_model(lock_image=True).train()
    before = model.image.trunk.bn1.running_mean.clone()
    out = model(pixels, model.tokenize(CAPTIONS))
    (out["image"] * out["text"]).sum().backward()
    learned = {key for key, parameter in model.image.named_parameters() if parameter.grad is not None}
    assert learned == {"projection.weight"}
    assert torch.equal(model.image.trunk.bn1.running_mean, before)
    assert model.text.embedding.weight.grad is not None


def test_gradient_checkpointing_gives_the_same_gradients(make_model, pixels):
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.checkpoint_gradients()
        out = model(pixels, model.tokenize(CAPTIONS))
        (out["image"] * out["text"]).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("options", [{}, {"bias": -10.0, "scale_max": 50.0}])
def test_a_saved_model_opens_equal(make_model, pixels, tmp_path, options):
    model = make_model(**options).eval()
    models.save_model(model, tmp_path / "run" / "model")
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        opened = models.load(path, device="cpu")
        assert torch.equal(opened.encode_image(pixels), model.encode_image(pixels))
        assert torch.equal(opened.encode_text(opened.tokenize(CAPTIONS)), model.encode_text(model.tokenize(CAPTIONS)))
        assert models.fingerprint(opened) == models.fingerprint(model)
        assert opened.scale_max == model.scale_max
        assert (opened.logit_bias is None) == (model.logit_bias is None)


def test_a_model_with_a_hugging_face_tower_opens_without_its_first_folder(make_model, tmp_path):
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = make_model()
    model.text = models.HuggingFaceTextTower(config | {"intermediate_size": 16, "vocab_size": 330}, dim=16)
    models.save_model(model.eval(), tmp_path)
    opened = models.load(tmp_path, device="cpu")
    tokens = model.tokenize(CAPTIONS)
    torch.testing.assert_close(opened.encode_text(tokens), model.encode_text(tokens))


def test_a_reinitialised_model_has_the_shape_and_not_the_weights(make_model):
    model = make_model()
    fresh = models.reinitialised(model, seed=5)
    assert models.describe(fresh) == models.describe(model)
    assert models.fingerprint(fresh) != models.fingerprint(model)
    assert models.fingerprint(fresh) == models.fingerprint(models.reinitialised(model, seed=5))


def test_a_bare_open_clip_name_says_that_its_weights_are_random():
    with pytest.warns(models.RandomWeightsWarning, match="RANDOM WEIGHTS"):
        models.load("RN50", device="cpu")


@pytest.mark.parametrize(("prepare", "words"), [
    (lambda p: None, "no such run or model folder"),
    (lambda p: p.mkdir(), "no model here"),
    (lambda p: p.write_text("x"), "is a file"),
])  # fmt: skip
def test_what_is_no_model_is_one_line(tmp_path, prepare, words):
    prepare(tmp_path / "thing")
    with pytest.raises(UserError, match=words):
        models.load(tmp_path / "thing")


def test_cut_off_weights_are_an_error(make_model, tmp_path):
    models.save_model(make_model(), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"), warnings.catch_warnings():
        warnings.simplefilter("error")
        models.load(tmp_path)
