"""Checks of what is given to an image tower: a wrong shape or unnormalised floats would give wrong features silently.

Legend: N images, H, W = the size of the model's preprocessing, F features before the projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive.errors import UserError
from contrastive.preprocessing import Preprocessing

FAR = 5  # times the range of normalised pixels: beyond it a value is wrong; random test input is within


def check_features(features: Tensor, width: int) -> None:
    """Raise UserError for two-dimensional input that is not features: floats (N, F), F = `width`."""
    if not features.is_floating_point() or features.shape[1] != width:
        raise UserError(
            f"pixels: {_name(features)} is neither pixels (n, 3, h, w) nor features before the projection "
            f"(n, {width}), floats; make pixels with model.preprocess(image)"
        )


def check_shape(pixels: Tensor, size: tuple[int, int] | None) -> None:
    """Raise UserError for pixels that are not uint8 or floats (N, 3, H, W).

    size: H, W; None for a model in training, which takes others on purpose (a curriculum).
    """
    shape = tuple(pixels.shape)
    wanted = f"(n, 3, {size[0]}, {size[1]})" if size else "(n, 3, h, w)"
    remedy = "make them with model.preprocess(image)"
    if len(shape) == 3 and shape[0] == 3:
        remedy = "give one picture as pixels[None]"
    elif len(shape) in (3, 4) and shape[-1] == 3 and shape[1] != 3:
        remedy = f"put the channels first, pixels.permute({'0, 3, 1, 2' if len(shape) == 4 else '2, 0, 1'})"
    if len(shape) != 4 or shape[1] != 3 or (size and shape[2:] != size):
        raise UserError(f"pixels: {_name(pixels)}, the image tower takes {wanted}; {remedy}")
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise UserError(f"pixels: {_name(pixels)}; give uint8 from 0 to 255, or normalised floats")


def check_normalised(pixels: Tensor, preprocessing: Preprocessing) -> None:
    """Raise UserError for float pixels that are clearly not normalised with the mean and std of `preprocessing`.

    These are: NaN and inf; values far outside the range of normalised pixels; whole numbers that reach beyond it, as
    grey levels do; values from 0 to 1, unless that is the range of normalised pixels, or all of them are whole grey
    levels once the normalisation is undone (a bright picture).
    """
    if not pixels.numel():
        return
    low, high = (float(end) for end in pixels.aminmax())
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise UserError("pixels: NaN or inf among the values; leave these pictures out")
    ends = [
        ((grey - mean) / std)
        for grey in (0, 1)
        for mean, std in zip(preprocessing.mean, preprocessing.std, strict=True)
    ]
    first, last = min(ends), max(ends)
    reach = FAR * (last - first)
    wrong = low < first - reach or high > last + reach
    wrong = wrong or (high > max(1.0, last) and bool((pixels == pixels.round()).all()))
    if not wrong and 0 <= low < high <= 1 and not (first >= -0.05 and last <= 1.05):
        wrong = not _whole_grey_levels(pixels, preprocessing)
    if wrong:
        mean, std = list(preprocessing.mean), list(preprocessing.std)
        raise UserError(
            f"pixels: floats from {low:.4g} to {high:.4g} are not normalised with mean {mean} and std {std}; give "
            "uint8 from model.preprocess(image), or (grey / 255 - mean) / std"
        )


def _whole_grey_levels(pixels: Tensor, preprocessing: Preprocessing) -> bool:
    mean, std = (
        torch.tensor(values, device=pixels.device).view(1, 3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    grey = (pixels.float() * std + mean) * 255
    rounding = 255 * float(std.max()) * torch.finfo(pixels.dtype).eps + 1e-3
    return bool(((grey - grey.round()).abs() <= rounding).all())


def _name(array: Tensor) -> str:
    return f"shape {tuple(array.shape)} of {str(array.dtype).removeprefix('torch.')}"
