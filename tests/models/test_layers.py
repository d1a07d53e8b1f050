"""Which layer of its tower a parameter is in: timm's own answer, and towers counted by hand."""

import json

import pytest
import timm
from timm.optim import param_groups_layer_decay
from torch import nn

from contrastive.errors import UserError
from contrastive.models import HuggingFaceTextTower, TimmImageTower, TransformerTextTower, open_clip_model
from contrastive.models.layers import layers_of

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
RESNET = {"channels": (8, 8, 16, 16), "layers": (1, 2, 1, 1)}


@pytest.mark.parametrize(("name", "size", "kwargs"), [("vit_tiny_patch16_224", 16, VIT), ("resnet18", 32, RESNET)])
def test_rates_of_a_timm_tower_are_those_of_timm(name, size, kwargs):
    tower = TimmImageTower(name, 16, size, kwargs=kwargs)
    options = kwargs | ({"img_size": size} if name.startswith("vit") else {})
    whole = timm.create_model(name, num_classes=16, **options)  # its head stands where the projection does
    groups = param_groups_layer_decay(whole, layer_decay=0.5)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    expected = {name: scales[id(p)] for name, p in whole.named_parameters() if not name.startswith(("head", "fc"))}
    layers = layers_of(tower)
    last = layers["projection.weight"]
    found = {name[len("trunk.") :]: 0.5 ** (last - n) for name, n in layers.items() if name != "projection.weight"}
    assert found == expected and min(found.values()) == 0.5 ** (1 + sum(kwargs.get("layers", [kwargs.get("depth")])))


def test_layers_of_a_text_transformer():
    layers = layers_of(TransformerTextTower(50, 16, 8, width=16, depth=2, heads=2))
    assert {layers["embedding.weight"], layers["position"]} == {0}
    assert layers["blocks.0.qkv.weight"] == layers["blocks.0.mlp.2.bias"] == 1
    assert layers["blocks.1.out.weight"] == layers["norm.weight"] == 2
    assert layers["projection.weight"] == 3 == max(layers.values())


def test_a_bag_of_words_has_two_layers():
    assert layers_of(TransformerTextTower(50, 16, 8, width=16, depth=0)) == {
        "embedding.weight": 0,
        "projection.weight": 1,
    }


def test_layers_of_a_hugging_face_encoder():
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    layers = layers_of(HuggingFaceTextTower(config | {"intermediate_size": 16, "vocab_size": 330}, dim=16))
    assert {n for name, n in layers.items() if ".embeddings." in name} == {0}
    assert {n for name, n in layers.items() if ".layer.1." in name} == {2}
    assert layers["projection.weight"] == 3


@pytest.mark.parametrize("vision", [{"layers": 2, "width": 32, "head_width": 16, "patch_size": 8}, [1, 2, 1, 1]])
def test_layers_of_the_towers_of_open_clip(tmp_path, vision):
    vision = vision if isinstance(vision, dict) else {"layers": vision, "width": 8}
    text = {"context_length": 16, "vocab_size": 100, "width": 16, "heads": 2, "layers": 2}
    config = {"embed_dim": 16, "vision_cfg": {"image_size": 32, **vision}, "text_cfg": text}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    model = open_clip_model(str(tmp_path / "tiny.json"))
    image, text_layers = model.layers("image"), model.layers("text")
    assert text_layers["text.model.token_embedding.weight"] == text_layers["text.model.positional_embedding"] == 0
    assert text_layers["text.model.transformer.resblocks.1.mlp.c_fc.weight"] == 2
    assert text_layers["text.model.ln_final.weight"] == 2 and text_layers["text.model.text_projection"] == 3
    assert image["image.visual.conv1.weight"] == 0
    if "head_width" in vision:
        assert image["image.visual.class_embedding"] == image["image.visual.ln_pre.weight"] == 0
        assert image["image.visual.transformer.resblocks.0.attn.in_proj_weight"] == 1
        assert image["image.visual.ln_post.weight"] == 2 and image["image.projection"] == 3
    else:
        assert image["image.visual.bn3.weight"] == 0 and image["image.visual.layer1.0.conv1.weight"] == 1
        assert image["image.visual.layer2.1.conv1.weight"] == 3 and image["image.visual.layer4.0.conv1.weight"] == 5
        assert image["image.visual.attnpool.q_proj.weight"] == 5
        assert image["image.visual.attnpool.c_proj.weight"] == 6 == max(image.values())


def test_a_tower_without_blocks_is_refused():
    tower = nn.Linear(2, 2)
    tower.projection_parameters = lambda: []
    with pytest.raises(UserError, match="layer_decay: the layers of a Linear"):
        layers_of(tower)
