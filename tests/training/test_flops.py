"""Operations of a pair against the formula 2 * M * N * K, by hand."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from contrastive.build import build_model
from contrastive.training.flops import flops_per_sample

SIDE, LENGTH, WIDTH, HIDDEN, HEADS = 8, 6, 16, 32, 4
FIRST = 2 * SIDE * SIDE * 4 * 3 * 9  # 3 -> 4 channels, 3 x 3, padded
SECOND = 2 * (SIDE // 2) ** 2 * 5 * 4 * 9  # 4 -> 5 channels, 3 x 3, stride 2
LAYER = (
    2 * LENGTH * WIDTH * 3 * WIDTH  # queries, keys, values
    + 2 * 2 * LENGTH * LENGTH * WIDTH  # similarities, and their average of values: heads share the width
    + 2 * LENGTH * WIDTH * WIDTH
    + 2 * 2 * LENGTH * WIDTH * HIDDEN
)


class Pair(nn.Module):
    def __init__(self, *, twice: bool = False) -> None:
        super().__init__()
        self.twice = twice
        self.image = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3, padding=1, stride=2)
        )
        self.words = nn.Embedding(10, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.1, batch_first=True)

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor | None]:
        words = self.words(tokens)
        text = checkpoint(self.layer, words, use_reentrant=False) if self.twice else self.layer(words)
        return {"image": self.image(pixels), "text": text, "bias": None}


def example(n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3, SIDE, SIDE), torch.randint(0, 10, (n, LENGTH))


# Backward is two products for each of forward, but for the first convolution: pixels need no gradient.
WHOLE = 2 * FIRST + 3 * SECOND + 3 * LAYER


@pytest.mark.parametrize("n", [2, 7])
def test_a_transformer_and_convolutions_cost_what_their_sizes_say(n):
    assert flops_per_sample(Pair(), *example(n)) == WHOLE


def test_what_is_frozen_has_no_backward():
    pair = Pair()
    pair.image.requires_grad_(False)
    assert flops_per_sample(pair, *example()) == FIRST + SECOND + 3 * LAYER
    pair.requires_grad_(False)
    assert flops_per_sample(pair, *example()) == FIRST + SECOND + LAYER


def test_what_checkpointing_computes_again_does_not_count():
    assert flops_per_sample(Pair(twice=True), *example()) == WHOLE


def test_precision_does_not_change_the_count():
    with torch.autocast("cpu", torch.bfloat16):
        assert flops_per_sample(Pair(), *example()) == WHOLE


def test_the_model_and_the_random_states_are_left_as_they_were():
    pair, batch = Pair(), example()
    before = {key: value.clone() for key, value in pair.state_dict().items()}
    state = torch.get_rng_state()
    flops_per_sample(pair, *batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in pair.state_dict().items())
    assert all(parameter.grad is None for parameter in pair.parameters())


def test_the_towers_of_a_recipe_count_by_their_sizes(make_config):
    """The tiny recipe's towers: width 32, one layer each, a joint space of 16."""
    model = build_model(make_config("model.tokenizer.kind=open_clip", "model.tokenizer.context=8")).train()
    tokens = torch.randint(1, 100, (2, 5))
    flops = flops_per_sample(model, torch.zeros(2, 3, 16, 16, dtype=torch.uint8), tokens)

    def layer(length: int, width: int) -> int:
        return 2 * length * width * 12 * width + 4 * length * length * width

    patches = 2 * 4 * 32 * 3 * 8 * 8  # 2 x 2 patches of 8 x 8; pixels need no gradient
    image = 2 * patches + 3 * (layer(5, 32) + 2 * 32 * 16)  # and a class token
    text = 3 * (layer(5, 32) + 2 * 32 * 16)
    assert flops == image + text
