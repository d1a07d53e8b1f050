import pytest
import torch

from contrastive.losses import CyCLIP, cyclip
from tests.losses.dense import cyclip_matrix, features, gradients, relative_error, scalar, worst_error


def test_traces_of_small_products_equal_the_formula_on_all_pairs() -> None:
    image, text = features(0, 50, 8)
    loss = cyclip(image, text, scalar(10.0), in_modal=0.3, cross_modal=0.7)["loss"]
    oracle = cyclip_matrix(image, text, scalar(10.0), None, torch.arange(50), in_modal=0.3, cross_modal=0.7)
    found, expected = gradients(loss, image, text), gradients(oracle, image, text)
    assert worst_error([loss, *found], [oracle, *expected]) < 1e-12


def test_terms_are_logged_without_their_weights() -> None:
    image, text = features(1, 20, 8)
    found = cyclip(image, text, scalar(10.0), in_modal=0.3, cross_modal=0.7)
    for key in ("in_modal", "cross_modal"):
        weights = {"in_modal": 0.0, "cross_modal": 0.0, key: 1.0}
        oracle = cyclip_matrix(image, text, scalar(10.0), None, torch.arange(20), **weights)
        assert relative_error(found[key], oracle.detach()) < 1e-12
        assert not found[key].requires_grad


def test_symmetric_similarities_have_no_cross_term() -> None:
    # images in one orthonormal basis and captions in another, related by a symmetric matrix: s_ij = s_ji
    half = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    text = torch.linalg.eigh(half + half.T).eigenvectors
    symmetric = text @ torch.diag(torch.tensor([1.0, -1, 1, -1, 1, 1], dtype=torch.float64)) @ text.T
    image = torch.eye(6, dtype=torch.float64)
    assert (image @ symmetric.T - symmetric @ image.T).abs().max() < 1e-12
    assert not torch.allclose(image, symmetric)
    assert abs(cyclip(image, symmetric, scalar(10.0))["cross_modal"].item()) < 1e-12


def test_small_loss_of_float32_features_is_not_lost_between_its_traces() -> None:
    image, noise = (x.detach() for x in features(2, 200, 16))
    image, text = image.float(), torch.nn.functional.normalize(image + 1e-4 * noise, dim=1).float()
    found = cyclip(image, text, scalar(10.0, torch.float32))["loss"]
    oracle = cyclip_matrix(image.double(), text.double(), scalar(10.0), None, torch.arange(200))
    # the traces are of size B^2 / D = 2500, their difference 1e-4: float32 sums of them would say nothing
    assert relative_error(found, oracle.detach()) < 1e-5


def test_scale_has_a_gradient_of_exactly_zero() -> None:
    image, text = features(3, 6, 4)
    scale, bias = scalar(10.0), scalar(-1.0)
    assert torch.autograd.grad(cyclip(image, text, scale, bias)["loss"], (scale, bias)) == (0, 0)


def test_module_binds_the_options() -> None:
    image, text = features(4, 6, 4)
    expected = cyclip(image, text, scalar(10.0), in_modal=2.0, cross_modal=0.0)["loss"]
    assert CyCLIP(in_modal=2.0, cross_modal=0.0)(image, text, scalar(10.0))["loss"] == expected
    assert expected.item() == pytest.approx(2 * cyclip(image, text, scalar(10.0))["in_modal"].item())
