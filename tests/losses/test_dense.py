import pytest
import torch

from tests.losses.dense import features, gradients, scalar, worst_error
from tests.losses.every_loss import VARIANTS, extras

CAPTIONS = torch.tensor([0, 1, 2, 3, 0, 5, 6, 5, 8, 0, 10, 11, 12])
IMAGES = torch.tensor([0, 1, 2, 3, 4, 5, 0, 7, 8, 9, 8, 8, 12])


@pytest.mark.parametrize("ids", [CAPTIONS, torch.stack([CAPTIONS, IMAGES], dim=1)], ids=["captions", "and images"])
@pytest.mark.parametrize("name", VARIANTS)
def test_oracles_on_matrices_equal_those_in_loops(name: str, ids: torch.Tensor) -> None:
    variant = VARIANTS[name]
    image, text = features(11, 13, 6)
    leaves = image, text, scalar(7.0), scalar(-2.0)
    further = variant.options | extras(variant, 13)
    loops, matrix = (oracle(*leaves, ids, **further) for oracle in (variant.loops, variant.matrix))
    found, expected = gradients(matrix, *leaves), gradients(loops, *leaves)
    assert expected[0].any()
    assert worst_error([matrix, *found], [loops, *expected]) < 1e-13
