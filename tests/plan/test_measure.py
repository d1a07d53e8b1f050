"""Counting on a model, against formulas and against torch's own counters."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from contrastive.models import TransformerTextTower
from contrastive.models.text_towers import Block
from contrastive.plan import measure
from contrastive.plan.costs import Tower

L, E, HEADS, VOCABULARY, D = 8, 32, 2, 50, 16


def text_tower(depth: int = 2) -> TransformerTextTower:
    torch.manual_seed(0)
    return TransformerTextTower(VOCABULARY, D, L, width=E, depth=depth, heads=HEADS).train()


def encode(tower: TransformerTextTower) -> Callable[[Tensor], Tensor]:
    return lambda tokens: tower.project(tower.features(tokens))


def counted(tower: TransformerTextTower, precision: str = "fp32", *, like_cuda: bool = False) -> Tower:
    example = torch.full((1, L), VOCABULARY - 1)
    return measure.tower("text", tower, encode(tower), example, precision, like_cuda=like_cuda)


def test_parameters_are_all_numbers_of_the_tower() -> None:
    tower = text_tower()
    assert counted(tower).parameters == counted(tower).learned == sum(p.numel() for p in tower.parameters())


def test_forward_flops_of_a_transformer_are_two_m_n_k_of_each_product() -> None:
    linear = 2 * L * E * (3 * E + E + 4 * E + 4 * E)  # qkv, out, and the two of the perceptron
    attention = 2 * (2 * L * L * E)  # scores, and their product with the values: over all heads E wide
    projection = 2 * E * D
    found = counted(text_tower(depth=2)).forward
    assert found.at(1) == 2 * (linear + attention) + projection
    assert found.once == 0


def test_backward_flops_are_twice_the_linear_ones_and_five_products_of_attention() -> None:
    linear, product = 2 * L * E * 12 * E, 2 * L * L * E
    # the fused attention computes the scores again: five products for its two
    assert counted(text_tower(depth=2)).backward.at(1) == 2 * (2 * linear + 5 * product) + 2 * 2 * E * D


def test_flops_of_a_convolution_are_those_that_torch_counts() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.norm(self.conv(x)).relu().mean((2, 3)))
            return out

    net = Net()
    found = measure.tower("image", net, net, torch.zeros(1, 3, 16, 16), "fp32", like_cuda=False)
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(6, 3, 16, 16)).sum().backward()
    assert found.forward.at(6) + found.backward.at(6) == counter.get_total_flops()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_saved_at_a_batch_of_any_size_lies_on_the_line(precision: str) -> None:
    tower = text_tower()
    own = {p.untyped_storage().data_ptr() for p in tower.parameters()}
    saved = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast:
        kept = encode(tower)(torch.full((13, L), VOCABULARY - 1))
    assert kept is not None
    assert counted(tower, precision).saved.at(13) == pytest.approx(sum(saved.values()), rel=1e-3)


def test_a_locked_tower_costs_no_backward_and_saves_nothing() -> None:
    found = counted(text_tower().requires_grad_(False))
    assert (found.learned, found.backward.at(8), found.saved.at(8)) == (0, 0, 0)
    assert found.forward == counted(text_tower()).forward


def test_a_learned_projection_on_a_locked_tower_costs_its_own_gradient_alone() -> None:
    tower = text_tower().requires_grad_(False)
    tower.projection.requires_grad_(True)
    assert counted(tower).backward.at(8) == 8 * 2 * E * D  # of the weight; its input needs none


def test_gradient_checkpointing_runs_the_blocks_again_and_saves_less() -> None:
    plain, checkpointed = text_tower(), text_tower()
    checkpointed.checkpoint_gradients()
    before, after = counted(plain), counted(checkpointed)
    blocks = 2 * (2 * L * E * 12 * E + 2 * 2 * L * L * E)
    again = after.backward.at(1) - before.backward.at(1)
    # torch stops the second forward as soon as it has what backward needs: the last product's result is not needed
    assert 0.6 * blocks < again <= blocks
    assert after.forward == before.forward
    assert after.saved.at(100) < before.saved.at(100) / 3


def test_checkpointing_holds_a_block_at_a_time() -> None:
    checkpointed = text_tower(depth=8)
    checkpointed.checkpoint_gradients()
    block = counted(text_tower(depth=2)).saved.each - counted(text_tower(depth=1)).saved.each
    found = counted(checkpointed)
    working = found.peak.at(1000) - found.saved.at(1000)
    assert 1000 * block <= working < 3000 * block


def test_fake_tensors_count_as_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = counted(text_tower(), "bf16")

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("depends on numbers")

    monkeypatch.setattr(measure, "FakeTensorMode", refuse)
    real = counted(text_tower(), "bf16")
    assert (real.forward, real.backward) == (fake.forward, fake.backward)
    assert real.saved.at(64) == pytest.approx(fake.saved.at(64), rel=1e-3)


def test_the_model_keeps_its_weights() -> None:
    tower = text_tower()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    counted(tower)
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    assert all(p.grad is None for p in tower.parameters())


def test_norms_save_float32_where_cuda_would() -> None:
    block = Block(E, HEADS, 0.0)
    mask = torch.ones(1, 1, L, L, dtype=torch.bool)
    plain, cuda = (
        measure.tower(
            "x", block, lambda x: block(x.bfloat16(), mask), torch.zeros(1, L, E), "bf16", like_cuda=like_cuda
        ).saved.each
        for like_cuda in (False, True)
    )
    assert cuda - plain >= 2 * L * E * (4 - 2)  # the inputs of two norms


def test_attention_counts_as_torch_counts_its_own_kernels() -> None:
    tower = text_tower()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        encode(tower)(torch.full((3, L), VOCABULARY - 1))
    assert counted(tower).forward.at(3) == counter.get_total_flops()
