"""Features that are not numbers: the loss says so, and rows that are not valid do not spread it."""

import pytest
import torch

from tests.losses.dense import features, gradients, scalar
from tests.losses.every_loss import VARIANTS, extras

ROWS = 6


def call(name: str, image: torch.Tensor, text: torch.Tensor, **further: object) -> tuple[torch.Tensor, list]:
    variant = VARIANTS[name]
    leaves = image, text, scalar(9.0), scalar(-2.0)
    loss = variant.function(*leaves, ids=torch.arange(ROWS) % 4, **variant.options, **extras(variant, ROWS), **further)
    return loss["loss"], gradients(loss["loss"], image, text)


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_of_features_that_are_not_numbers_is_not_a_number(name: str) -> None:
    # and is no error: an error here would stop one rank, where the trainer stops all of them on the value
    image, text = (x.detach() for x in features(0, ROWS, 5))
    image[2] = torch.nan
    loss, _ = call(name, image.requires_grad_(), text.requires_grad_())
    assert loss.isnan()


@pytest.mark.parametrize("name", VARIANTS)
def test_row_that_is_not_valid_may_hold_anything(name: str) -> None:
    valid = torch.arange(ROWS) != 2
    found = []
    for filling in (0.0, torch.nan):
        image, text = (x.detach() for x in features(0, ROWS, 5))
        image[2] = text[2] = filling
        loss, grads = call(name, image.requires_grad_(), text.requires_grad_(), valid=valid)
        found.append([loss, *grads])
    for zero, nan in zip(*found, strict=True):
        assert nan.isfinite().all() and torch.equal(zero, nan)
