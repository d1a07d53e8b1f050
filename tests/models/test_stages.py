"""Towers in stages: images of another size, shorter captions, patches left out."""

import json

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from contrastive.errors import UserError
from contrastive.models import (
    CorpusTokenizer,
    OpenClipTokenizer,
    TimmImageTower,
    TransformerTextTower,
    TwoTower,
    open_clip_model,
    train_tokenizer,
)
from contrastive.models.stages import add_patch_dropout, check_contexts, check_sizes

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def timm_tower(size: int, name: str = "vit_tiny_patch16_224", **options) -> TimmImageTower:
    torch.manual_seed(0)
    return TimmImageTower(name, 16, size, kwargs=dict(VIT), **options).eval()


def two_tower(image, context: int = 8) -> TwoTower:
    tokenizer = CorpusTokenizer(train_tokenizer(["red square"], 300), context)
    return TwoTower(image, TransformerTextTower(tokenizer.vocab_size, 16, context, width=16, heads=2), tokenizer, 16)


@pytest.fixture
def open_clip_vit(tmp_path):
    """An open_clip model with a small vision transformer of this size."""

    def make(size: int, **vision) -> TwoTower:
        torch.manual_seed(0)
        vision = {"image_size": size, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32, **vision}
        text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
        name = f"small-{abs(hash(json.dumps(vision)))}"
        (tmp_path / f"{name}.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
        return open_clip_model(str(tmp_path / f"{name}.json")).eval()

    return make


# ---- another size


@pytest.mark.parametrize("size", [16, 24, 48])
def test_positions_of_a_timm_tower_are_resampled_for_another_size(size):
    """As a tower that is built for the size and has the table that timm's own function resamples."""
    tower, plain = timm_tower(32, any_size=True), timm_tower(size)
    state = tower.state_dict()
    table = resample_abs_pos_embed(state["trunk.pos_embed"], [size // 8] * 2, [4, 4], num_prefix_tokens=1)
    plain.load_state_dict({**state, "trunk.pos_embed": table})
    pixels = torch.randn(3, 3, size, size)
    torch.testing.assert_close(tower.features(pixels), plain.features(pixels))


@pytest.mark.parametrize("size", [16, 24, 48])
def test_positions_of_an_open_clip_tower_are_resampled_for_another_size(open_clip_vit, size):
    tower, plain = open_clip_vit(32).image, open_clip_vit(size).image
    state = tower.state_dict()
    key = "visual.positional_embedding"
    table = resample_abs_pos_embed(state[key][None], [size // 8] * 2, [4, 4], num_prefix_tokens=1)[0]
    plain.load_state_dict({**state, key: table})
    pixels = torch.randn(3, 3, size, size)
    torch.testing.assert_close(tower.features(pixels), plain.features(pixels))


def test_the_table_learns_from_images_of_another_size(open_clip_vit):
    timm, open_clip = timm_tower(32, any_size=True), open_clip_vit(32).image
    for tower, table in ((timm, timm.trunk.pos_embed), (open_clip, open_clip.visual.positional_embedding)):
        tower.features(torch.randn(3, 3, 16, 16)).square().sum().backward()
        assert bool(table.grad.abs().sum(-1).squeeze()[1:].all())


def test_a_tower_of_any_size_is_the_plain_one_at_its_own():
    plain, flexible = timm_tower(32), timm_tower(32, any_size=True)
    assert plain.description() == flexible.description()
    flexible.load_state_dict(plain.state_dict())
    pixels = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(flexible.features(pixels), plain.features(pixels))  # two paths of timm's: rounding


def test_a_size_that_patches_do_not_divide_is_refused(open_clip_vit):
    for model in (two_tower(timm_tower(32, any_size=True)), open_clip_vit(32)):
        check_sizes(model, [8, 40])
        with pytest.raises(UserError, match="train.curriculum: the image tower .*, does not take images of 20 px"):
            check_sizes(model, [20])


def test_attention_pooling_with_a_table_of_its_own_is_refused(open_clip_vit):
    model = open_clip_vit(32, layers=[1, 1, 1, 1], width=8, head_width=8, patch_size=None)
    with pytest.raises(UserError, match="built for 32 px, does not take images of 64 px"):
        check_sizes(model, [64])


def test_looking_for_sizes_changes_nothing():
    kwargs = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
    model = two_tower(TimmImageTower("resnet18", 16, 32, kwargs=kwargs)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_sizes(model, [16, 64])
    assert model.training and model.image.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---- patches left out


@pytest.mark.parametrize("kind", ["timm", "open_clip", "timm without a class token"])
@pytest.mark.parametrize("rate, kept", [(0.0, 16), (0.5, 8), (0.75, 4), (0.99, 1)])
def test_a_share_of_the_patches_is_left_out_in_training_only(open_clip_vit, kind, rate, kept):
    if kind == "open_clip":
        model = open_clip_vit(32)
        blocks = model.image.visual.transformer.resblocks
    else:
        plain = TimmImageTower(
            "vit_tiny_patch16_224", 16, 32,
            kwargs={**VIT, "class_token": False, "global_pool": "avg"} if kind != "timm" else VIT,
        )  # fmt: skip
        model = two_tower(plain)
        blocks = model.image.trunk.blocks
    prefix = kind != "timm without a class token"
    add_patch_dropout(model)
    entered: list[torch.Tensor] = []
    blocks[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    model.eval().encode_image(pixels)
    model.set_patch_dropout(rate)
    model.eval().encode_image(pixels)
    model.train().encode_image(pixels)
    whole, still_whole, masked = entered
    assert torch.equal(still_whole, whole)
    assert masked.shape[1] == kept + prefix
    if prefix:
        torch.testing.assert_close(masked[:, 0], whole[:, 0])  # training takes other paths than evaluation: rounding
    for few, all_of_them in zip(masked, whole, strict=True):  # each is one of the image's own, none twice
        places = few[:, None].isclose(all_of_them[None], atol=1e-5).all(-1).nonzero()[:, 1].tolist()
        assert len(places) == len(set(places)) == kept + prefix


def test_towers_without_patches_are_refused():
    model = two_tower(TimmImageTower("resnet18", 16, 32, kwargs={"layers": [1] * 4, "channels": [8] * 4}))
    with pytest.raises(UserError, match="the image tower resnet18 has no patches"):
        add_patch_dropout(model)


# ---- shorter captions


def test_a_shortened_tokenizer_keeps_the_closing_token():
    tokenizer = CorpusTokenizer(train_tokenizer(["red square of wood", "blue"], 300), 12)
    end = int(tokenizer([""])[0, 0])
    whole, short = tokenizer(["red square of wood"])[0].tolist(), tokenizer.shortened(3)(["red square of wood"])[0]
    assert short.tolist() == [*whole[:2], end] and len(whole) > 3
    assert tokenizer(["red square of wood"])[0].tolist() == whole  # the one that it is made from stays as it is


def test_open_clips_tokenizer_cuts_as_open_clip_does():
    import open_clip

    caption = "a photograph of a red square made of wood"
    found = OpenClipTokenizer().shortened(6)([caption])
    assert torch.equal(found, open_clip.tokenize([caption], context_length=6))
    assert found[0, -1] == 49407


def test_text_towers_that_want_the_full_context_are_refused():
    model = two_tower(timm_tower(32))
    check_contexts(model, [4, 8])
    with pytest.raises(UserError, match="context 9 is above the 8 tokens"):
        check_contexts(model, [9])
    model.text.cuts_text = False
    with pytest.raises(UserError, match="context 4 saves nothing with the text tower of"):
        check_contexts(model, [4])
