"""From the bytes of one sample's image to the pixels that a tower takes."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from contrastive.images import square
from contrastive.shards.augment import Augment, augment_image
from contrastive.shards.decode import decode_image


def render(
    data: bytes, size: int, augment: Augment | None, u: Sequence[float], fill: int = 255, decode: str = "exact"
) -> np.ndarray:
    """uint8 (size, size, 3), RGB.

    augment: None for the evaluation transform. u: DRAWS uniform numbers in [0, 1).
    decode: "exact" decodes in full; "fast" may decode a JPEG at a reduced scale that is not below `size`.

    Raises Rejected with a reason.
    """
    return render_image(decode_image(data), size, augment, u, fill)


def render_image(
    image: Image.Image, size: int, augment: Augment | None, u: Sequence[float], fill: int = 255
) -> np.ndarray:
    """`render` for an image that is decoded."""
    image = square(image, size) if augment is None else augment_image(image, size, augment, u, fill)
    return np.asarray(image)
