"""Low-rank adapters: nothing changes at the start, what learns, and what is saved is one model without them."""

import builtins
import json

import pytest
import torch

import contrastive.models as models
from contrastive.errors import UserError
from contrastive.models.adapters import plain_state

CAPTIONS = ["open book", "red apple", "woman feeding baby"]


@pytest.fixture
def adapt(make_model):
    pytest.importorskip("peft")

    def make(tower: str = "text", model=None, **options):
        model = make_model() if model is None else model
        models.add_adapters(model, tower, **({"rank": 2, "alpha": 4.0} | options))
        return model.train()

    return make


@pytest.fixture
def open_clip(tmp_path):
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    (tmp_path / "tiny.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    return models.open_clip_model(str(tmp_path / "tiny.json"))


def train(model, pixels, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        out = model(pixels, model.tokenize(CAPTIONS))
        (out["image"] * out["text"]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_near(found, expected) -> None:
    """Equal up to rounding, which differs between code paths and CPUs: these outputs have length 1."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def outputs(model, pixels):
    with torch.no_grad():
        out = model.eval()(pixels, model.tokenize(CAPTIONS))
    return out["image"], out["text"]


@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_output_is_at_first_that_of_the_base_model(adapt, make_model, pixels, tower):
    assert_near(outputs(adapt(tower), pixels), outputs(make_model(), pixels))


def test_the_output_of_open_clip_is_at_first_that_of_the_base_model(adapt, open_clip, pixels):
    base = outputs(open_clip, pixels)
    assert_near(outputs(adapt("text", adapt("image", open_clip)), pixels), base)


def test_only_adapters_and_the_projection_learn(adapt, make_model, pixels):
    model = make_model()
    for block in ("layer1", "layer2", "layer3", "layer4"):  # timm starts with 0, which no gradient passes
        getattr(model.image.trunk, block)[0].bn2.weight.data.fill_(1.0)
    adapt("text", adapt("image", model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, pixels)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"image.projection.weight", "text.projection.weight"} < moved
    assert all("lora_" in name for name in moved - {"image.projection.weight", "text.projection.weight"})
    assert moved >= {name for name in before if "lora_B" in name}  # every adapter has an effect


def test_the_number_of_learned_parameters_is_that_counted_by_hand(adapt):
    learned = sum(p.numel() for p in adapt("text", rank=3).text.parameters() if p.requires_grad)
    width, dim = 16, 16
    qkv, out, up, down = 3 * (width + 3 * width), 3 * (width + width), 3 * (width + 4 * width), 3 * (4 * width + width)
    assert learned == qkv + out + up + down + width * dim


def test_convolutions_are_adapted_where_there_is_no_linear_map(adapt):
    model = adapt("image", rank=2)
    stem = model.image.trunk.conv1  # 3 -> 64 channels, 7 x 7, stride 2
    assert (
        sum(p.numel() for p in stem.parameters() if p.requires_grad) == 2 * 3 * 7 * 7 + 2 * stem.base_layer.out_channels
    )
    assert len(model.adapters["image"]["targets"]) == 1 + 4 * (2 + 1)  # stem; two a block and its shortcut


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_merged_model_gives_the_output_of_the_adapted_one(adapt, pixels, tmp_path, dropout):
    model = adapt("text", adapt("image", dropout=dropout), dropout=dropout)
    train(model, pixels)
    base = outputs(adapt(), pixels)
    adapted = outputs(model, pixels)
    opened = models.load(models.save_model(model, tmp_path), device="cpu")
    merged = outputs(opened, pixels)
    for before, one, other in zip(base, adapted, merged, strict=True):
        assert (one - before).abs().max() > 1e-2  # they learned
        assert_near(other, one)
    assert not any("lora" in name or "base_layer" in name for name in opened.state_dict())
    assert models.fingerprint(opened) == models.fingerprint(model)


def test_the_merged_weight_is_the_product_by_hand(adapt, pixels):
    model = adapt("text", rank=2, alpha=6.0)
    base = model.text.blocks[0].qkv.base_layer.weight.clone()
    train(model, pixels)
    layer = model.text.blocks[0].qkv
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(plain_state(model)["text.blocks.0.qkv.weight"], base + 6.0 / 2 * product)


def test_an_attention_that_calls_no_linear_map_is_left_out(adapt, open_clip, pixels):
    model = adapt("image", open_clip)
    names = model.adapters["image"]["targets"]
    assert len(names) == 4 and all(name.endswith(("mlp.c_fc", "mlp.c_proj")) for name in names)
    before = outputs(model, pixels)[0]
    train(model.train(), pixels)
    after = outputs(model, pixels)[0]
    assert (after - before).abs().max() > 1e-2
    merged = models.open_clip_model("tiny", config=model.open_clip_config)
    merged.load_state_dict(plain_state(model))
    assert_near(outputs(merged, pixels)[0], after)


@pytest.mark.parametrize(("target", "words"), [
    ("out_proj", "NonDynamicallyQuantizableLinear. cannot be adapted, as it is not called"),
    ("attn", "MultiheadAttention. cannot be adapted, as it is no linear map"),
    ("qkv", "no module of that tower is called 'qkv'; such as: .*c_fc"),
])  # fmt: skip
def test_what_cannot_be_adapted_is_refused(adapt, open_clip, target, words):
    with pytest.raises(UserError, match=rf"model.image.lora.targets: .*{words}"):
        adapt("image", open_clip, targets=[target])


def test_named_modules_alone_are_adapted(adapt):
    assert adapt("text", targets=["qkv", "mlp.0"]).adapters["text"]["targets"] == ["blocks.0.qkv", "blocks.0.mlp.0"]


def test_an_embedding_can_be_adapted(adapt, pixels, tmp_path):
    model = adapt("text", targets=["embedding"])
    before = outputs(model, pixels)[1]
    train(model.train(), pixels)
    after = outputs(model, pixels)[1]
    assert (after - before).abs().max() > 1e-2
    opened = models.load(models.save_model(model, tmp_path), device="cpu")
    assert_near(outputs(opened, pixels)[1], after)
    with pytest.raises(UserError, match="lora.dropout: 0.1 does nothing for an embedding"):
        adapt("text", targets=["embedding"], dropout=0.1)


def test_the_dropout_of_the_adapters_is_the_only_one_that_is_on(adapt, pixels):
    model = adapt("text", dropout=0.5)
    train(model, pixels)
    tokens = model.tokenize(CAPTIONS)
    assert not torch.equal(model.encode_text(tokens), model.encode_text(tokens))
    assert not model.text.blocks[0].drop.training and model.text.training is False
    model.eval()
    assert torch.equal(model.encode_text(tokens), model.encode_text(tokens))


def test_shared_beginnings_do_not_pass_the_adapters_by(adapt, make_model, pixels):
    model = make_model()
    model.text = models.TransformerTextTower(330, 16, 8, width=16, heads=2, pool="end", causal=True)
    assert model.shares_prefixes
    train(adapt("text", model), pixels)
    tokens = model.eval().tokenize(CAPTIONS)
    assert_near(model.encode_prompts(tokens), model.encode_text(tokens))


def test_gradient_checkpointing_gives_the_adapters_the_same_gradients(adapt, make_model, pixels):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = make_model()
        kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        model.image = models.TimmImageTower("vit_tiny_patch16_224", 16, 32, kwargs=kwargs)
        adapt("image", model)
        if checkpointing:
            model.checkpoint_gradients()
        out = model(pixels, model.tokenize(CAPTIONS))
        (out["image"] * out["text"]).sum().backward()
        gradients.append({name: p.grad for name, p in model.image.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[1].values()) and len(gradients[1]) == 1 + 2 * 4 * 2
    torch.testing.assert_close(gradients[0], gradients[1])


def test_adapters_are_in_the_layer_that_they_adapt(adapt):
    layers = adapt("text").layers("text")
    assert layers["text.blocks.0.qkv.lora_A.default.weight"] == layers["text.blocks.0.qkv.base_layer.weight"] == 1


def test_a_missing_peft_names_the_extra(make_model, monkeypatch):
    real = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name.partition(".")[0] == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(UserError, match=r"model.text.lora needs peft; `pip install contrastive\[lora\]`"):
        models.add_adapters(make_model(), "text", rank=2, alpha=4.0)
