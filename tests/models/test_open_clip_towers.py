"""open_clip models behind our interfaces give open_clip's own numbers."""

import json

import open_clip
import pytest
import torch
from PIL import Image

from contrastive.errors import UserError
from contrastive.models import open_clip_model

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
# Embeddings have length 1. Text of 9 and of 77 tokens, and our path and open_clip's, round otherwise: 1e-7 and more, by
# the CPU.
ROUNDING = {"atol": 1e-5, "rtol": 0}
CAPTIONS = ["a dog", "an open book on a wooden table", "x"]


@pytest.fixture(params=["clip", "custom_text"])
def pair(request, tmp_path):
    """Our model and open_clip's own, with the same weights."""
    config = dict(TINY, custom_text=request.param == "custom_text")
    name = f"tiny-{request.param}"
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(str(path))
    torch.manual_seed(3)
    reference = open_clip.create_model(name).eval()
    torch.manual_seed(3)
    return open_clip_model(str(path)).eval(), reference


def test_text_features_of_cut_captions_equal_those_of_the_full_context(pair):
    ours, reference = pair
    tokens = ours.tokenize(CAPTIONS)
    assert tokens.shape == (3, 9)  # start, seven words, end
    expected = reference.encode_text(open_clip.SimpleTokenizer()(CAPTIONS), normalize=True)
    torch.testing.assert_close(ours.encode_text(tokens), expected, **ROUNDING)


def test_image_features_equal_open_clips(pair):
    ours, reference = pair
    image = Image.effect_noise((57, 40), 80).convert("RGB")
    transform = open_clip.image_transform(32, is_train=False)
    expected = reference.encode_image(transform(image)[None], normalize=True)
    torch.testing.assert_close(ours.encode_image(ours.preprocess(image)[None]), expected, **ROUNDING)


def test_features_before_the_projection_give_the_embedding(pair):
    ours, _ = pair
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    features = ours.image_features(pixels)
    assert features.shape == (2, 64)
    embedding = torch.nn.functional.normalize(ours.image.project(features), dim=-1)
    torch.testing.assert_close(embedding, ours.encode_image(pixels))


def test_a_tower_that_sees_padding_gets_the_full_context(tmp_path):
    bidirectional = json.loads(json.dumps(TINY))
    bidirectional["text_cfg"] |= {"no_causal_mask": True, "pool_type": "last"}
    bidirectional["custom_text"] = True
    path = tmp_path / "tiny-bidirectional.json"
    path.write_text(json.dumps(bidirectional))
    model = open_clip_model(str(path))
    assert not model.text.cuts_text
    assert model.tokenize(CAPTIONS).shape == (3, 77)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean.*ViT-B-32"):
        open_clip_model("ViT-B-33")


def test_weights_that_cannot_be_had_are_an_error_not_random(tmp_path):
    with pytest.raises(UserError, match="weights"):
        open_clip_model("ViT-B-32", pretrained=str(tmp_path / "missing.pt"))


@pytest.mark.parametrize(
    ("weights", "hint"), [("laion2b_s34b", "did you mean laion2b_s34b_b79k"), ("xyz", "its tags are openai, ")]
)
def test_an_unknown_tag_is_one_line_with_few_tags_and_nothing_is_logged(weights, hint, caplog):
    with pytest.raises(UserError, match=f"no such tag or file; {hint}") as raised:
        open_clip_model("ViT-B-32", pretrained=weights)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 250
    assert caplog.records == []
