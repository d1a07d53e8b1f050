"""What losses refuse, and that they say what to do about it."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contrastive import losses
from contrastive.errors import UserError
from contrastive.losses import DCL, Distillation, InfoNCE, Margin, SigLIP, SogCLR, infonce
from tests.losses.dense import features, gradients, infonce_matrix, scalar, worst_error
from tests.losses.every_loss import TILED, VARIANTS, extras


def call(name: str, **change: Any) -> dict[str, Tensor]:
    variant = VARIANTS[name]
    arguments: dict[str, Any] = {
        "image": torch.eye(4, 5),
        "text": torch.eye(4, 5),
        "scale": torch.tensor(10.0),
        "bias": torch.tensor(-3.0),
        "ids": torch.arange(4),
    }
    return variant.function(**(arguments | variant.options | extras(variant, 4) | change))


LONG = torch.eye(4, 5) * torch.tensor([[1.0], [1.0], [1.5], [3.0]])
ZERO = torch.eye(4, 5) * torch.tensor([[1.0], [0.0], [1.0], [1.0]])
NAN = torch.eye(4, 5).index_fill(0, torch.tensor([3]), float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.eye(4, 6)}, r"image \(4, 5\) and text \(4, 6\).*project both towers to the same width"),
        ({"image": torch.eye(3, 5)}, r"image \(3, 5\) and text \(4, 5\).*as many captions as images"),
        ({"image": torch.zeros(0, 5), "text": torch.zeros(0, 5)}, "n > 0"),
        ({"image": torch.ones(5), "text": torch.ones(5)}, r"image \(5,\).*\(n, dim\), n > 0"),
        ({"image": torch.ones(4, 5, dtype=torch.int64)}, "image torch.int64.*floating-point"),
        ({"scale": torch.ones(4)}, r"scale of shape \(4,\): a loss takes a 0-d tensor"),
        ({"bias": torch.ones(4)}, r"bias of shape \(4,\): a loss takes a 0-d tensor"),
        ({"ids": torch.arange(3)}, r"ids is torch.int64 \(3,\): a loss takes torch.int64 \(4,\)"),
        ({"ids": torch.zeros(4)}, r"ids is torch.float32 \(4,\): a loss takes torch.int64"),
        ({"ids": torch.zeros(4, 3, dtype=torch.int64)}, r"ids is torch.int64 \(4, 3\): .*\(4, 2\), those of captions"),
        ({"valid": torch.ones(4, dtype=torch.int64)}, "valid is torch.int64.*a loss takes torch.bool"),
        ({"image": torch.eye(4, 5).numpy()}, "image is a ndarray: a loss takes tensors; pass torch.as_tensor"),
        ({"text": torch.eye(4, 5).numpy()}, "text is a ndarray: a loss takes tensors"),
        ({"ids": [0, 1, 2, 3]}, r"ids is a list: a loss takes tensors; pass torch.as_tensor\(ids\)"),
        ({"bias": torch.tensor(float("nan"))}, "bias nan: the logit bias must be finite; lower the learning rate"),
        ({"scale": None}, r"scale None: a loss takes a 0-d tensor, such as torch.tensor\(10.0\)"),
        ({"image": torch.ones(4, 5, 6)}, r"image \(4, 5, 6\).*\(n, dim\), n > 0: a row for each pair"),
        ({"scale": torch.tensor(0.0)}, "scale 0.0: .*above 0.*1 / temperature, not its logarithm"),
        ({"scale": torch.tensor(-2.0)}, "scale -2.0: .*lower the learning rate or cap the scale"),
        ({"scale": torch.tensor(float("nan"))}, "scale nan: the logit scale must be finite"),
        ({"scale": torch.tensor(float("inf"))}, "scale inf: the logit scale must be finite"),
        ({"image": LONG}, r"image features: row 2 has norm 1.5, 2 of 4 rows.*F.normalize.*or check=False"),
        ({"text": LONG}, "text features: row 2 has norm 1.5"),
        ({"image": ZERO}, "image features: row 1 has norm 0, 1 of 4 rows.*no direction: look at the tower"),
        ({"text": ZERO}, "text features: row 1 has norm 0"),
        ({"image": NAN.nan_to_num(torch.inf)}, "image features: row 3 has norm inf"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("name", ["infonce", "dcl", "siglip", "margin sum", "cyclip", "sogclr"])
def test_argument_that_no_loss_can_take_is_named_with_the_remedy(name: str, change: dict, message: str) -> None:
    if name == "sogclr" and "image" in change:  # its averages fit, so that what is refused is the features
        change = change | {"log_u": torch.zeros(len(change["image"]), 2)}
    with pytest.raises(UserError, match=message):
        call(name, **change)


@pytest.mark.parametrize("name", VARIANTS)
def test_global_batch_of_one_pair_is_refused(name: str) -> None:
    variant = VARIANTS[name]
    one = {"image": torch.eye(1, 5), "text": torch.eye(1, 5), "ids": torch.arange(1)} | extras(variant, 1)
    with pytest.raises(UserError, match="the global batch has one pair.*give at least 2"):
        call(name, **one)


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": 0}, "tile 0: choose 'auto', None for the plain loss, or the side of a tile"),
        ({"tile": -3}, "tile -3: choose 'auto'"),
        ({"tile": "large"}, "tile 'large': choose 'auto'"),
        ({"tile": True}, "tile True: choose 'auto'"),
        ({"exchange": "tree"}, "exchange 'tree': choose one of auto, gather, ring"),
        ({"exchange": "ring", "tile": None}, r"exchange 'ring'.*plain loss \(tile None\).*set a tile"),
    ],
    ids=str,
)
def test_tiling_that_does_not_exist_is_named_with_the_choices(name: str, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(name, **change)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("infonce", {"same_caption": "drop"}, "same_caption 'drop': choose one of negative, ignore, positive"),
        ("siglip", {"same_caption": "drop"}, "same_caption 'drop': choose one of negative, ignore, positive"),
        ("dcl", {"same_caption": "positive"}, "same_caption 'positive': choose one of negative, ignore"),
        ("sogclr", {"same_caption": "positive"}, "same_caption 'positive': choose one of negative, ignore"),
        ("margin sum", {"same_caption": "positive"}, "same_caption 'positive': choose one of negative, ignore"),
        *(
            (name, {"same_caption": "ignore", "ids": None}, "'ignore' needs the captions' ids: pass `ids`, or use 'neg")
            for name in ("infonce", "dcl", "siglip", "sogclr", "margin sum")
        ),
        ("infonce", {"label_smoothing": 1.0}, "label_smoothing 1.0: choose a share from 0 to 0.999"),
        ("infonce", {"label_smoothing": -0.1}, "label_smoothing -0.1"),
        ("siglip", {"bias": None}, "siglip needs a bias: .*start it at -10"),
        ("margin sum", {"margin": -0.1}, "margin -0.1: choose a difference of similarities, from 0 to 2"),
        ("margin sum", {"margin": float("nan")}, "margin nan"),
        ("margin sum", {"margin": 5}, "margin 5: choose a difference of similarities, from 0 to 2"),
        ("margin sum", {"hardness": 0.5}, "hardness 0.5 does nothing for 'sum' negatives; choose 'hardest'"),
        ("margin sum", {"negatives": "all"}, "negatives 'all': choose one of sum, hardest, semi-hard"),
        ("margin sum", {"hardness": 1.5}, "hardness 1.5: choose a share from 0 to 1"),
        ("margin sum", {"adaptive": -0.5}, "adaptive -0.5: choose a share from 0 to 1"),
        ("cyclip", {"in_modal": -1.0}, "in_modal -1.0: choose a finite weight of at least 0; the paper's is 0.25"),
        ("cyclip", {"cross_modal": float("nan")}, "cross_modal nan"),
        ("cyclip", {"cross_modal": float("inf")}, "cross_modal inf"),
        ("distillation", {"teacher_scale": float("inf")}, "teacher_scale inf: choose the teacher's logit scale"),
        ("sogclr", {"rho": float("nan")}, "rho nan: choose a finite number"),
        ("sogclr", {"epsilon": float("inf")}, "epsilon inf: choose a small number above 0"),
        ("distillation", {"teacher_image": None}, "teacher_image is NoneType: .* a floating-point tensor"),
        ("distillation", {"teacher_text": torch.ones(4, 5, dtype=torch.int64)}, "teacher_text is torch.int64"),
        ("sogclr", {"log_u": None}, "log_u NoneType: pass two averages a pair"),
        ("sogclr", {"gamma": 0.0}, "gamma 0.0: .*above 0 and at most 1"),
        ("sogclr", {"gamma": 1.1}, "gamma 1.1"),
        ("sogclr", {"epsilon": 0.0}, "epsilon 0.0: choose a small number above 0"),
        ("sogclr", {"log_u": torch.zeros(4)}, r"log_u \(4,\): pass two averages a pair, \(4, 2\)"),
    ],
)
def test_option_out_of_range_is_named_with_the_choices(name: str, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(name, **change)


@pytest.mark.parametrize("module", [InfoNCE, DCL, SigLIP, Margin, losses.CyCLIP])
def test_option_that_a_module_does_not_have_is_named_with_those_it_has(module: type) -> None:
    with pytest.raises(TypeError, match=f"{module.__name__} has no option 'temprature'; it has .*check"):
        module(temprature=1.0)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (None, "pass their numbers as `samples`"),
        ([0, 1, 2, 3], r"samples is list: .* takes torch.int64 \(4,\)"),
        (torch.zeros(4), r"samples is torch.float32 \(4,\): .* takes torch.int64 \(4,\)"),
        (torch.arange(3), r"samples is torch.int64 \(3,\): .* takes torch.int64 \(4,\)"),
        (torch.arange(4) + 3, "samples from 3 to 6: .* numbers below 6, the size of the data set"),
        (torch.arange(4) - 1, "samples from -1 to 2"),
    ],
    ids=["none", "list", "float", "short", "beyond", "negative"],
)
@pytest.mark.parametrize(
    "loss", [SogCLR(samples=6), Distillation(torch.eye(6), torch.eye(6))], ids=["sogclr", "distillation"]
)
def test_numbers_of_samples_that_do_not_fit_are_named(loss: torch.nn.Module, samples: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loss(torch.eye(4, 5), torch.eye(4, 5), torch.tensor(10.0), samples=samples)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SogCLR(samples=0), "samples 0: give the size of the data set"),
        (lambda: Distillation(torch.eye(6), torch.eye(5, 6)), "teacher_image has 6 rows and teacher_text 5"),
        (lambda: losses.WeightedSum([("a.b", InfoNCE(), 1.0)]), "a loss named 'a.b': .*without a dot"),
    ],
)
def test_module_that_can_not_work_is_refused_when_it_is_made(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("name", TILED)
def test_a_graph_that_is_kept_gives_the_same_gradient_again(name: str) -> None:
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    loss = call(name, scale=scale, bias=bias, image=torch.eye(4, 5).requires_grad_(), tile=2)["loss"]
    loss.backward(retain_graph=True)
    once = scale.grad.clone(), bias.grad.clone()
    loss.backward()
    assert torch.equal(scale.grad, 2 * once[0]) and torch.equal(bias.grad, 2 * once[1])


def test_weight_of_a_sum_that_is_not_finite_is_named() -> None:
    with pytest.raises(UserError, match="weight of infonce nan: choose a finite number"):
        losses.WeightedSum([("infonce", InfoNCE(), float("nan"))])


# ---- the check of values, and how it is switched off


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16), rows=st.integers(2, 8), bad=st.integers(0, 7), value=st.sampled_from([0.0, torch.inf])
)
def test_first_bad_row_is_named_by_its_number(seed: int, rows: int, bad: int, value: float) -> None:
    image, text = (x.detach() for x in features(seed, rows, 3))
    text[bad % rows] = value
    with pytest.raises(UserError, match=f"text features: row {bad % rows} has norm"):
        infonce(image, text, torch.tensor(1.0))


@pytest.mark.parametrize("tile", [None, "auto"])
def test_without_the_check_features_of_any_length_are_taken_as_they_are(tile: int | str | None) -> None:
    image, text = (3 * x.detach() for x in features(0, 6, 4))
    leaves = image.requires_grad_(), text.requires_grad_(), scalar(2.0)
    loss, oracle = infonce(*leaves, check=False, tile=tile)["loss"], infonce_matrix(*leaves, None, torch.arange(6))
    assert worst_error([loss, *gradients(loss, *leaves)], [oracle, *gradients(oracle, *leaves)]) < 1e-12


@pytest.mark.parametrize("name", VARIANTS)
def test_every_loss_checks_by_default_on_a_cpu_and_can_be_told_not_to(name: str) -> None:
    with pytest.raises(UserError, match="row 2 has norm 1.5"):
        call(name, image=LONG)
    assert call(name, image=LONG, check=False)["loss"].isfinite()


def test_features_rounded_to_bfloat16_pass_the_check() -> None:
    image, text = features(1, 64, 512, torch.bfloat16)
    infonce(image, text, torch.tensor(10.0), check=True)


def test_row_that_is_not_valid_is_not_checked() -> None:
    valid = torch.tensor([True, True, True, False])
    bad = torch.eye(4, 5).index_fill(0, torch.tensor([3]), 0.0)
    assert infonce(bad, bad, torch.tensor(10.0), valid=valid)["loss"].isfinite()


def test_scale_and_bias_of_one_element_are_taken_whatever_their_shape() -> None:
    image, text = features(2, 5, 4)
    flat = infonce(image, text, torch.tensor(10.0), torch.tensor(-1.0))["loss"]
    scale, bias = torch.tensor([10.0], requires_grad=True), torch.tensor([[-1.0]], requires_grad=True)
    found = infonce(image, text, scale, bias)["loss"]
    assert found == flat and found.ndim == 0
    assert [grad.shape for grad in torch.autograd.grad(found, (scale, bias))] == [(1,), (1, 1)]
