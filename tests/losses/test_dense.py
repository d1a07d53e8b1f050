import pytest
import torch

from tests.losses.dense import features, gradients, scalar, worst_error
from tests.losses.every_loss import VARIANTS, extras


@pytest.mark.parametrize("name", VARIANTS)
def test_oracles_on_matrices_equal_those_in_loops(name: str) -> None:
    variant = VARIANTS[name]
    image, text = features(11, 13, 6)
    ids = torch.tensor([0, 1, 2, 3, 0, 5, 6, 5, 8, 0, 10, 11, 12])
    leaves = image, text, scalar(7.0), scalar(-2.0)
    further = variant.options | extras(variant, 13)
    loops, matrix = (oracle(*leaves, ids, **further) for oracle in (variant.loops, variant.matrix))
    found, expected = gradients(matrix, *leaves), gradients(loops, *leaves)
    assert expected[0].any()
    assert worst_error([matrix, *found], [loops, *expected]) < 1e-13
