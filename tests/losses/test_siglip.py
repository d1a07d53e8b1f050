import pytest
import torch
from open_clip.loss import SigLipLoss

from contrastive.losses import SigLIP, siglip
from tests.losses.dense import features, gradients, scalar, worst_error


@pytest.mark.parametrize("engine", [{}, {"tile": 5}, {"tile": None}], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -3.0), (0.5, 2.0)])
def test_equals_open_clip_with_gradients(
    scale: float, bias: float, dtype: torch.dtype, tolerance: float, engine: dict
) -> None:
    image, text = features(0, 37, 16, dtype)
    leaves = image, text, scalar(scale, dtype), scalar(bias, dtype)
    oracle, loss = SigLipLoss()(*leaves), siglip(*leaves, **engine)["loss"]
    assert worst_error([loss, *gradients(loss, *leaves)], [oracle, *gradients(oracle, *leaves)]) < tolerance


@pytest.mark.parametrize("tile", [None, 3, "auto"])
def test_answers_of_twenty_and_more_are_not_cut_to_a_line(tile: int | str | None) -> None:
    # torch's softplus turns linear at 20: the partners, a quarter of the terms, would then be nothing
    image = text = torch.eye(4, dtype=torch.float64)
    loss = siglip(image, text, scalar(50.0), scalar(-25.0), tile=tile)["loss"]
    # every term is log(1 + exp(-25)): partners at logit 25, the others at -25
    term = torch.tensor(-25.0, dtype=torch.float64).exp().log1p().item()
    assert loss.item() == pytest.approx(4 * term, rel=1e-3, abs=0)


def test_bias_of_minus_log_of_the_others_starts_at_the_prior() -> None:
    # at that bias and no similarity the mean answer is 1 / B, and the bias has gradient 0
    image, text = torch.eye(8, 16, dtype=torch.float64), torch.eye(16, dtype=torch.float64)[8:]
    bias = scalar(-torch.tensor(7.0, dtype=torch.float64).log().item())
    (grad,) = gradients(siglip(image, text, scalar(10.0), bias)["loss"], bias)
    assert abs(grad.item()) < 1e-12


def test_module_binds_the_options() -> None:
    image, text = features(6, 6, 8)
    ids, (scale, bias) = torch.tensor([0, 0, 1, 2, 3, 3]), (scalar(10.0), scalar(-10.0))
    expected = siglip(image, text, scale, bias, ids=ids, same_caption="positive")["loss"]
    assert SigLIP(same_caption="positive")(image, text, scale, bias, ids=ids)["loss"] == expected
    assert expected != siglip(image, text, scale, bias)["loss"]
