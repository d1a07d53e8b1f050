"""From the bytes of one sample's image to the pixels that a tower takes."""

import threading
from collections.abc import Sequence

import numpy as np
from PIL import Image

from contrastive.preprocessing import Preprocessing, centre_square
from contrastive.shards.augment import Augment, crop_of, shape_pixels
from contrastive.shards.decode import decode_pixels

SCRATCH = 12_000_000  # bytes that images are decoded into, one after another: 4 MP of RGB; larger ones get their own


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.pixels = np.empty(SCRATCH, np.uint8)


_scratch = _Scratch()


def render(
    data: bytes | memoryview,
    size: int,
    augment: Augment | None,
    u: Sequence[float],
    fill: int = 255,
    decode: str = "exact",
    preprocessing: Preprocessing | None = None,
) -> np.ndarray:
    """uint8 (size, size, 3), RGB, but for the colours of `augment`: see `recolor`, which takes a whole batch.

    augment: None for the evaluation transform. u: DRAWS uniform numbers in [0, 1).
    preprocessing: the evaluation transform, uint8 (H, W, 3) of its size; None for `centre_square`.
    decode: "exact" decodes in full; "fast" may decode a JPEG at a reduced scale, of which the crop is not below `size`.

    Raises Rejected with a reason.
    """

    def shrink(width: int, height: int) -> float:
        if augment is None and preprocessing is not None:
            return preprocessing.reduction(width, height)
        _, _, crop_width, crop_height = (0, 0, width, height) if augment is None else crop_of(width, height, augment, u)
        return min(crop_width, crop_height) / size

    decoded = decode_pixels(data, shrink if decode == "fast" else None, _scratch.pixels)
    rendered = render_pixels(decoded, size, augment, u, fill, preprocessing)
    return rendered.copy() if np.may_share_memory(rendered, _scratch.pixels) else rendered


def render_pixels(
    pixels: np.ndarray,
    size: int,
    augment: Augment | None,
    u: Sequence[float],
    fill: int = 255,
    preprocessing: Preprocessing | None = None,
) -> np.ndarray:
    """`render` for an image that is decoded, uint8 (height, width, 3)."""
    if augment is None:
        image = Image.fromarray(pixels)
        return np.asarray(centre_square(image, size) if preprocessing is None else preprocessing.picture(image))
    return shape_pixels(pixels, size, augment, u, fill)
