"""Settings of open_clip whose gradients are wrong, shown by running them, and ours beside them."""

from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from contrastive.losses import infonce
from tests.distributed.spawn import run_ranks
from tests.losses.dense import features, gradients, infonce_matrix, relative_error

WORLD, ROWS, SCALE = 2, 24, 10.0
SETTINGS = {
    "default gather": {},
    "local loss without gradient": {"local_loss": True},
}


def leaves(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    image, text = features(0, ROWS, 8, dtype)
    return image, text, torch.tensor(SCALE, dtype=dtype, requires_grad=True)


def feature_and_scale_gradients(rank: int, world: int) -> dict[str, list[Tensor]]:
    """Of the global features, as an encoder shared by all ranks would get them; DDP then takes the mean over ranks."""
    n = ROWS // world
    here = slice(rank * n, (rank + 1) * n)
    found = {}
    for name, setting in SETTINGS.items():
        image, text, scale = leaves()
        loss = open_clip.ClipLoss(rank=rank, world_size=world, **setting)(image[here], text[here], scale)
        found[name] = gradients(loss, image, text, scale)
    image, text, scale = leaves()
    found["ours"] = gradients(infonce(image[here], text[here], scale)["loss"], image, text, scale)
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    ranks = run_ranks(WORLD, feature_and_scale_gradients)
    return {
        name: [torch.stack(grads).mean(dim=0) for grads in zip(*(rank[name] for rank in ranks), strict=True)]
        for name in ranks[0]
    }


@pytest.fixture(scope="module")
def true() -> list[Tensor]:
    image, text, scale = leaves()
    return gradients(infonce_matrix(image, text, scale, None, torch.arange(ROWS)), image, text, scale)


def test_peers_default_gather_gives_towers_a_fraction_and_the_scale_all_of_its_gradient(
    found: dict[str, Any], true: list[Tensor]
) -> None:
    image, text, scale = found["default gather"]
    assert relative_error(WORLD * image, true[0]) < 1e-12
    assert relative_error(WORLD * text, true[1]) < 1e-12
    assert relative_error(scale, true[2]) < 1e-12


def test_peers_local_loss_without_gathered_gradient_points_elsewhere(found: dict[str, Any], true: list[Tensor]) -> None:
    for theirs, right in zip(found["local loss without gradient"][:2], true[:2], strict=True):
        cosine = torch.nn.functional.cosine_similarity(theirs.flatten(), right.flatten(), dim=0)
        assert 0.5 < cosine < 0.999


def test_ours_are_the_true_gradients_beside_them(found: dict[str, Any], true: list[Tensor]) -> None:
    assert max(map(relative_error, found["ours"], true)) < 1e-12
