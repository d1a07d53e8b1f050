"""Towers of a pair: exact cutting of text, locking, starting weights."""

import pytest
import timm
import torch

from contrastive.errors import UserError
from contrastive.models import HuggingFaceTextTower, TimmImageTower, TransformerTextTower


def run(tower, tokens):
    return tower.project(tower.features(tokens))


# products of another length round otherwise, by the CPU
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}
SMALL = {"channels": (8, 8, 16, 16), "layers": (1, 1, 1, 1)}


@pytest.mark.parametrize("options", [
    {"depth": 0},
    {"depth": 2},
    {"depth": 2, "causal": True},
    {"depth": 2, "causal": True, "pool": "end"},
])  # fmt: skip
def test_padding_does_not_change_a_caption(options):
    torch.manual_seed(0)
    tower = TransformerTextTower(vocab_size=50, dim=8, context=12, width=16, heads=2, **options).eval()
    short = torch.tensor([[5, 6, 7, 2], [9, 2, 0, 0]])
    padded = torch.nn.functional.pad(short, (0, 8))
    torch.testing.assert_close(run(tower, short), run(tower, padded), **ROUNDING)
    torch.testing.assert_close(run(tower, short)[1:], run(tower, short[1:, :2]), **ROUNDING)


def test_depth_zero_is_the_average_of_word_embeddings():
    tower = TransformerTextTower(vocab_size=50, dim=8, context=12, width=16, depth=0)
    words = torch.tensor([[5, 6, 0]])
    expected = tower.embedding.weight[[5, 6]].mean(0) @ tower.projection.weight.T
    torch.testing.assert_close(run(tower, words)[0], expected)


def test_an_empty_caption_is_finite():
    for depth in (0, 1):
        tower = TransformerTextTower(vocab_size=50, dim=8, context=12, width=16, heads=2, depth=depth)
        assert run(tower, torch.zeros(2, 3, dtype=torch.int64)).isfinite().all()


def test_end_pooling_reads_the_last_real_token():
    torch.manual_seed(0)
    tower = TransformerTextTower(50, 8, 12, width=16, heads=2, depth=1, pool="end", causal=True).eval()
    before = run(tower, torch.tensor([[5, 6, 2, 0]]))
    assert not torch.allclose(before, run(tower, torch.tensor([[5, 6, 3, 0]])))


def test_a_hugging_face_tower_ignores_padding():
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"intermediate_size": 16, "vocab_size": 40}
    tower = HuggingFaceTextTower(config, dim=8).eval()
    short = torch.tensor([[5, 6, 7], [9, 2, 0]])
    padded = torch.nn.functional.pad(short, (0, 5))
    torch.testing.assert_close(run(tower, short), run(tower, padded), **ROUNDING)
    assert all(parameter.requires_grad for parameter in tower.parameters())


def test_starting_weights_are_taken_by_name_and_by_order(tmp_path):
    source = timm.create_model("resnet18", num_classes=5, **SMALL)
    torch.save(source.state_dict(), tmp_path / "named.pt")
    renamed = {f"other.{i}": value for i, value in enumerate(source.state_dict().values())}
    torch.save(renamed, tmp_path / "ordered.pt")
    for name in ("named.pt", "ordered.pt"):
        tower = TimmImageTower("resnet18", 8, 32, kwargs=SMALL, weights=tmp_path / name)
        torch.testing.assert_close(tower.trunk.layer4[0].conv1.weight, source.layer4[0].conv1.weight)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="does not fit"):
        TimmImageTower("resnet18", 8, 32, kwargs=SMALL, weights=tmp_path / "other.pt")


@pytest.mark.parametrize(("name", "kwargs", "words"), [
    ("resnet81", {}, "no model 'resnet81'"),
    ("resnet18", {"widths": 3}, "does not accept"),
])  # fmt: skip
def test_a_wrong_image_tower_is_one_line(name, kwargs, words):
    with pytest.raises(UserError, match=words) as caught:
        TimmImageTower(name, 8, 32, kwargs=kwargs)
    assert "\n" not in str(caught.value)
