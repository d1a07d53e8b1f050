"""What the losses have in common: tiles, shapes, extremes, memory, autograd."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from contrastive.errors import UserError
from contrastive.losses import infonce, tiled
from tests.losses.dense import accuracy_loops, features, gradients, of_rows, relative_error, scalar, worst_error
from tests.losses.every_loss import TILED, VARIANTS, Variant, extras
from tests.losses.largest import LargestTensor


def call(variant: Variant, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, **further: Any) -> dict:
    further = {"ids": ids_of(len(image))} | variant.options | extras(variant, len(image)) | further
    return variant.function(image, text, scale, bias, **further)


def ids_of(rows: int) -> Tensor:
    return torch.arange(rows) * 7 % max(2, rows * 2 // 3)  # a third of the captions are there twice


def batch(rows: int, dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return *features(rows, rows, dim, dtype), scalar(9.0, dtype), scalar(-2.0, dtype)


# ---- equal to the formula, whatever the shape


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(2, 7),
    dim=st.integers(1, 6),
    scale=st.floats(0.01, 100),
    data=st.data(),
)
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_loops_for_any_shape_scale_tile_ids_and_valid_rows(
    name: str, seed: int, rows: int, dim: int, scale: float, data: st.DataObject
) -> None:
    variant = VARIANTS[name]
    image, text = features(seed, rows, dim)
    leaves = image, text, scalar(scale), scalar(-3.0)
    one_id = st.integers(0, 4)
    row_of_ids = data.draw(st.sampled_from([one_id, st.tuples(one_id, one_id)]))  # captions; captions and images
    ids = torch.tensor(data.draw(st.lists(row_of_ids, min_size=rows, max_size=rows)))
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    engine = {"tile": data.draw(st.none() | st.just("auto") | st.integers(1, rows + 1))} if variant.tiled else {}
    further = variant.options | extras(variant, rows)
    found = variant.function(*leaves, ids=ids, valid=valid, **further, **engine)
    kept = of_rows(valid, further)
    oracle = variant.loops(image[valid], text[valid], *leaves[2:], ids[valid], **kept)
    assert found["loss"].item() == pytest.approx(oracle.item(), rel=1e-9, abs=1e-9)
    # a similarity of exactly 1 or -1, as in one dimension, puts hinges exactly at 0, where several gradients are right
    if dim > 1 or "margin" not in name:
        for ours, theirs in zip(gradients(found["loss"], *leaves), gradients(oracle, *leaves), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * max(1.0, scale))
    if "accuracy" in found:
        same_caption = variant.options.get("same_caption", "negative")
        expected = accuracy_loops(image[valid], text[valid], ids[valid], same_caption)
        assert found["accuracy"].item() == pytest.approx(expected)


@settings(max_examples=12)
@given(seed=st.integers(0, 2**16), rows=st.integers(2, 9), dim=st.integers(1, 4), tile=st.integers(1, 10))
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("name", [name for name in TILED if "margin" not in name])
def test_float32_equals_float64_loops_at_every_scale(
    name: str, scale: float, seed: int, rows: int, dim: int, tile: int
) -> None:
    variant = TILED[name]
    leaves = *features(seed, rows, dim, torch.float32), scalar(scale, torch.float32), scalar(-3.0, torch.float32)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    further = variant.options | extras(variant, rows)
    loss = variant.function(*leaves, ids=ids_of(rows), tile=tile, **further)["loss"]
    oracle = variant.loops(*exact, ids_of(rows), **further)
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-5, abs=1e-5 * max(scale, 1 / scale))
    for ours, theirs in zip(gradients(loss, *leaves), gradients(oracle, *exact), strict=True):
        # logits of size `scale` are rounded by 6e-8 of it, and exponentials by as much relatively
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=3e-6 * max(1.0, scale))


@pytest.mark.parametrize("tile", [None, 3, "auto"])
@pytest.mark.parametrize("name", VARIANTS)
def test_row_that_is_not_valid_may_hold_anything_finite_and_changes_nothing(name: str, tile: int | str | None) -> None:
    variant = VARIANTS[name]
    leaves = batch(8, 5)
    valid = torch.tensor([True, True, False, True, True, False, True, True])
    image, text = (x.detach().clone() for x in leaves[:2])
    image[2], image[5], text[2] = 0, 1e3, -7
    leaves = image.requires_grad_(), text.requires_grad_(), *leaves[2:]
    further = extras(variant, 8) | {"ids": ids_of(8)} | ({"tile": tile} if variant.tiled else {})
    masked = variant.function(*leaves, valid=valid, **variant.options, **further)
    alone = variant.function(image[valid], text[valid], *leaves[2:], **variant.options, **of_rows(valid, further))
    assert masked["loss"].item() == pytest.approx(alone["loss"].item(), rel=1e-12)
    assert masked.get("accuracy", 0) == pytest.approx(alone.get("accuracy", 0))
    found, expected = (gradients(result["loss"], *leaves) for result in (masked, alone))
    assert worst_error(found, expected) < 1e-12
    assert not found[0][~valid].any() and not found[1][~valid].any()


@pytest.mark.parametrize("tile", [None, 3, "auto"])
@pytest.mark.parametrize("name", VARIANTS)
def test_batch_without_a_valid_row_has_zero_loss_and_gradient(name: str, tile: int | str | None) -> None:
    leaves = batch(4, 5)
    engine = {"tile": tile} if VARIANTS[name].tiled else {}
    loss = call(VARIANTS[name], *leaves, valid=torch.zeros(4, dtype=torch.bool), **engine)["loss"]
    assert loss == 0
    assert not any(grad.any() for grad in gradients(loss, *leaves))


# ---- degenerate features


@pytest.mark.parametrize("tile", [2, "auto"])
@pytest.mark.parametrize("name", TILED)
def test_equal_features_in_all_rows_equal_the_loops(name: str, tile: int | str) -> None:
    variant = TILED[name]
    same = torch.full((5, 4), 0.5, dtype=torch.float64)
    leaves = same.clone().requires_grad_(), same.clone().requires_grad_(), scalar(100.0), scalar(-3.0)
    found = call(variant, *leaves, tile=tile)["loss"]
    oracle = variant.loops(*leaves, ids_of(5), **variant.options, **extras(variant, 5))
    assert found.item() == pytest.approx(oracle.item(), rel=1e-12)
    if "hardest" not in name:  # of equally hard negatives, any may be the one
        for ours, theirs in zip(gradients(found, *leaves), gradients(oracle, *leaves), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.fixture
def dtypes_swept(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of every pass over the tiles, in order."""
    seen: list[torch.dtype] = []
    sweep = tiled._sweep

    def noted(batch: Any, *arguments: Any) -> Any:
        seen.append(batch.image_nD.dtype)
        return sweep(batch, *arguments)

    monkeypatch.setattr(tiled, "_sweep", noted)
    return seen


@pytest.mark.parametrize("tile", [2, "auto"])
@pytest.mark.parametrize("name", ["infonce", "infonce ignore", "infonce positive", "dcl", "sogclr", "distillation"])
def test_exact_opposites_at_scale_100_leave_float32_and_are_right_in_float64(
    name: str, tile: int | str, dtypes_swept: list[torch.dtype]
) -> None:
    variant = TILED[name]
    image = torch.tensor([[1.0], [1.0], [1.0], [1.0]])
    text = -image
    leaves = image.requires_grad_(), text.requires_grad_(), scalar(100.0, torch.float32), scalar(-3.0, torch.float32)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    further = variant.options | extras(variant, 4)
    ids = torch.tensor([0, 1, 2, 0])
    found = variant.function(*leaves, ids=ids, tile=tile, **further)["loss"]
    # every logit is -100: under a shift that keeps exp(100) in range, every sum is below what float32 can hold
    assert dtypes_swept == [torch.float32, torch.float64]
    assert found.dtype == torch.float32
    oracle = variant.loops(*exact, ids, **further)
    assert found.item() == pytest.approx(oracle.item(), rel=1e-6)
    for ours, theirs in zip(gradients(found, *leaves), gradients(oracle, *exact), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def test_ordinary_features_at_scale_100_stay_in_float32(dtypes_swept: list[torch.dtype]) -> None:
    infonce(*features(0, 64, 32, torch.float32), torch.tensor(100.0), tile=16)
    assert dtypes_swept == [torch.float32]


def test_logits_beyond_float64_are_refused_and_not_wrong() -> None:
    image = torch.ones(3, 1)
    with pytest.raises(UserError, match="logits span more than exp can hold.*scale at most 100"):
        infonce(image, -image, torch.tensor(2000.0))


# ---- memory


@pytest.mark.parametrize("kept_tiles", [0, 1, 5, 100])
@pytest.mark.parametrize("name", TILED)
def test_how_many_tiles_are_kept_changes_nothing(name: str, kept_tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, leaves = TILED[name], batch(30, 6)
    monkeypatch.setattr(tiled, "AUTO_TILE", {"cpu": 8})
    monkeypatch.setattr(tiled, "KEEP_ALL_AT_MOST", 0)
    monkeypatch.setattr(tiled, "KEEP_SOME", kept_tiles * 8 * 8 * 8)
    found = gradients(call(variant, *leaves)["loss"], *leaves)
    expected = gradients(call(variant, *leaves, tile=None)["loss"], *leaves)
    assert worst_error(found, expected) < 1e-12


@pytest.mark.parametrize("name", VARIANTS)
def test_no_tensor_is_larger_than_a_tile_or_the_features(name: str) -> None:
    rows, dim, tile = 200, 8, 50
    leaves = batch(rows, dim)
    with LargestTensor() as largest:
        # at most a few features side by side, 200 x 16, or a tile, 50 x 50; CyCLIP has three 8 x 8
        call(VARIANTS[name], *leaves, **({"tile": tile} if VARIANTS[name].tiled else {}))["loss"].backward()
    assert largest.elements <= 2 * rows * dim


@pytest.mark.parametrize("name", TILED)
def test_plain_loss_does_create_the_matrix_that_the_tiled_one_avoids(name: str) -> None:
    leaves = batch(200, 8)
    with LargestTensor() as largest:
        call(TILED[name], *leaves, tile=None)["loss"].backward()
    assert largest.elements >= 200 * 200


def saved_bytes(name: str, tile: int | None) -> int:
    leaves, seen = batch(200, 8), {}

    def note(value: Tensor) -> Tensor:
        seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        loss = call(TILED[name], *leaves, tile=tile)["loss"]
    loss.backward()
    return sum(seen.values())


@pytest.mark.parametrize("name", TILED)
def test_two_gradients_are_saved_for_backward_and_no_matrix(name: str) -> None:
    gradients_of_features = 2 * 200 * 8 * 8
    assert gradients_of_features <= saved_bytes(name, 50) <= gradients_of_features + 200  # and some 0-d tensors
    assert saved_bytes(name, None) >= 200 * 200 * 8


# ---- autograd, autocast, compile


@pytest.mark.parametrize("name", VARIANTS)
def test_autocast_changes_nothing(name: str) -> None:
    plain_leaves, leaves = batch(16, 8, torch.float32), batch(16, 8, torch.float32)
    plain = call(VARIANTS[name], *plain_leaves)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        under = call(VARIANTS[name], *leaves)["loss"]
        found = gradients(under, *leaves)
    assert under.dtype == torch.float32
    assert under == plain
    assert all(map(torch.equal, found, gradients(plain, *plain_leaves)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANTS)
def test_half_precision_features_are_promoted_and_get_gradients_of_their_own_dtype(
    name: str, dtype: torch.dtype
) -> None:
    image, text = (x.detach().to(dtype).requires_grad_() for x in features(5, 12, 8))
    scale, bias = scalar(9.0, torch.float32), scalar(-2.0, torch.float32)
    full = [x.detach().float().requires_grad_() for x in (image, text)]
    found = call(VARIANTS[name], image, text, scale, bias)["loss"]
    expected = call(VARIANTS[name], *full, scale, bias)["loss"]
    assert found.dtype == torch.float32 and found == expected
    for ours, theirs in zip(gradients(found, image, text), gradients(expected, *full), strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs.to(dtype))


@pytest.mark.parametrize("name", VARIANTS)
def test_scale_and_bias_are_in_the_graph_for_ddp_whether_the_loss_depends_on_them_or_not(name: str) -> None:
    leaves = batch(6, 4)
    torch.autograd.grad(call(VARIANTS[name], *leaves)["loss"], leaves)  # would raise if one were not used


@pytest.mark.parametrize("name", VARIANTS)
def test_value_is_the_same_where_no_gradient_is_wanted(name: str) -> None:
    leaves = batch(9, 5)
    engine = {"tile": 4} if VARIANTS[name].tiled else {}
    wanted = call(VARIANTS[name], *leaves, **engine)
    with torch.no_grad():
        unwanted = call(VARIANTS[name], *leaves, **engine)
    detached = call(VARIANTS[name], *(leaf.detach() for leaf in leaves), **engine)
    for found in (unwanted, detached):
        assert not found["loss"].requires_grad
        # without a gradient the second sweep is left out: another path, equal to rounding
        assert {k: v.item() for k, v in found.items() if v.ndim == 0} == pytest.approx(
            {k: v.item() for k, v in wanted.items() if v.ndim == 0}, rel=1e-12
        )
        assert found.keys() == wanted.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_of_one_input_alone_is_that_of_all(name: str) -> None:
    leaves = batch(9, 5)
    expected = gradients(call(VARIANTS[name], *leaves)["loss"], *leaves)
    for which in range(4):
        alone = [leaf.detach().requires_grad_(at == which) for at, leaf in enumerate(leaves)]
        (found,) = gradients(call(VARIANTS[name], *alone)["loss"], alone[which])
        torch.testing.assert_close(found, expected[which], rtol=1e-12, atol=1e-14)  # autograd goes another way


@pytest.mark.parametrize("name", TILED)
def test_second_backward_of_a_kept_graph_gives_the_same_gradients(name: str) -> None:
    leaves = batch(9, 5)
    loss = call(TILED[name], *leaves, tile=4)["loss"]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves)))


@pytest.mark.parametrize("name", TILED)
def test_gradient_follows_a_factor_behind_the_loss(name: str) -> None:
    leaves = batch(9, 5)
    loss = call(TILED[name], *leaves, tile=4)["loss"]
    expected = gradients(loss, *leaves)
    assert worst_error(gradients(-2.5 * loss, *leaves), [-2.5 * grad for grad in expected]) < 1e-14


@pytest.mark.parametrize("name", TILED)
def test_second_derivative_of_a_tiled_loss_is_refused_with_the_remedy(name: str) -> None:
    leaves = batch(9, 5)
    loss = call(TILED[name], *leaves, tile=4)["loss"]
    with pytest.raises(UserError, match="no second derivative; pass tile=None"):
        torch.autograd.grad(loss, leaves, create_graph=True)


@pytest.mark.parametrize("name", ["infonce ignore", "dcl", "siglip", "distillation", "sogclr"])
def test_plain_loss_has_the_second_derivative_of_the_formula(name: str) -> None:
    variant = TILED[name]
    leaves = batch(5, 3)
    loss = call(variant, *leaves, tile=None)["loss"]
    oracle = variant.matrix(*leaves, ids_of(5), **variant.options, **extras(variant, 5))
    found, expected = (
        torch.autograd.grad(
            sum(grad.square().sum() for grad in torch.autograd.grad(value, leaves[:2], create_graph=True)), leaves[:2]
        )
        for value in (loss, oracle)
    )
    assert expected[0].any()
    assert worst_error(found, expected) < 1e-11


class Compiled(nn.Module):
    def __init__(self, variant: Variant) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.variant = nn.Linear(5, 6).double(), nn.Linear(7, 6).double(), variant
        self.scale, self.bias = nn.Parameter(scalar(9.0)), nn.Parameter(scalar(-2.0))
        self.further = {"ids": ids_of(12)} | variant.options | extras(variant, 12)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        image, text = (nn.functional.normalize(x, dim=1) for x in (self.image(a), self.text(b)))
        return self.variant.function(image, text, self.scale, self.bias, **self.further)["loss"]


@pytest.mark.parametrize("name", ["infonce ignore", "margin hardest, ignore", "cyclip"])
def test_compiled_towers_and_loss_have_the_same_gradients(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(12, width, generator=generator, dtype=torch.float64) for width in (5, 7)]
    model = Compiled(VARIANTS[name])
    expected = gradients(model(*inputs), *model.parameters())
    compiled = torch.compile(model, backend="aot_eager")
    assert worst_error(gradients(compiled(*inputs), *model.parameters()), expected) < 1e-12


def test_own_relative_error_measures_the_norm_of_the_difference() -> None:
    # what every bound in these tests rests on
    assert relative_error(torch.tensor([3.0, 4.1]), torch.tensor([3.0, 4.0])) == pytest.approx(0.02, rel=1e-5)
