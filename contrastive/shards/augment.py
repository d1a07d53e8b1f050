"""Training-time changes to an image, drawn from given uniform numbers so that they can be replayed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from contrastive.errors import UserError

DRAWS = 13  # uniform numbers that one image takes
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL's greyscale


@dataclass(frozen=True)
class Augment:
    """How strongly images are changed.

    crop: smallest and largest share of the image's area.
    ratio: largest width : height of the crop, and its inverse the smallest.
    flip: probability of a mirror image.
    rotate: largest angle in degrees, either way; uncovered corners are filled.
    color: brightness, contrast and saturation each change by a factor in 1 ± color.
    grayscale: probability of grey.
    tint: probability of a multiplication by a light colour, 0.5 … 1 per channel, background too.
    """

    crop: tuple[float, float] = (1.0, 1.0)
    ratio: float = 4 / 3
    flip: float = 0.0
    rotate: float = 0.0
    color: float = 0.0
    grayscale: float = 0.0
    tint: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise UserError(f"augment.crop {list(self.crop)}: give two area shares, 0 < smallest <= largest <= 1")
        if self.ratio < 1:
            raise UserError(f"augment.ratio {self.ratio}: give the larger of width:height and its inverse, at least 1")
        if not 0 <= self.rotate <= 180:
            raise UserError(f"augment.rotate {self.rotate}: give degrees from 0 to 180")
        for name in ("flip", "color", "grayscale", "tint"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment.{name} {getattr(self, name)}: give a number from 0 to 1")


def augment_image(image: Image.Image, size: int, augment: Augment, u: Sequence[float], fill: int = 255) -> Image.Image:
    """A crop of an RGB image, resized to size × size and changed; u: DRAWS uniform numbers in [0, 1)."""
    image = _geometry(image, size, augment, u, fill)
    if u[5] < augment.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _colors(image, augment, u)


def _geometry(image: Image.Image, size: int, augment: Augment, u: Sequence[float], fill: int) -> Image.Image:
    width, height = image.size
    area = (augment.crop[0] + (augment.crop[1] - augment.crop[0]) * u[0]) * width * height
    aspect = augment.ratio ** (2 * u[1] - 1)
    crop_width, crop_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
    shrink = min(1.0, width / crop_width, height / crop_height)  # keeps the aspect where the crop would not fit
    crop_width, crop_height = crop_width * shrink, crop_height * shrink
    # max: where the crop is as wide as the image, rounding makes the difference -1e-15, which PIL refuses
    left, top = u[2] * max(0.0, width - crop_width), u[3] * max(0.0, height - crop_height)
    angle = math.radians(augment.rotate * (2 * u[4] - 1))
    if angle == 0:
        box = (left, top, min(left + crop_width, width), min(top + crop_height, height))
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)

    # An affine transform does not antialias: shrink large images by a whole factor first.
    factor = int(min(crop_width, crop_height) / size)
    if factor > 1:
        image = image.reduce(factor)
        left, top, crop_width, crop_height = (v / factor for v in (left, top, crop_width, crop_height))
    x_scale, y_scale = crop_width / size, crop_height / size
    a, b = math.cos(angle) * x_scale, -math.sin(angle) * y_scale
    d, e = math.sin(angle) * x_scale, math.cos(angle) * y_scale
    c = left + crop_width / 2 - (a + b) * size / 2
    f = top + crop_height / 2 - (d + e) * size / 2
    return image.transform(
        (size, size),
        Image.Transform.AFFINE,
        (a, b, c, d, e, f),
        Image.Resampling.BILINEAR,
        fillcolor=(fill, fill, fill),
    )


def _colors(image: Image.Image, augment: Augment, u: Sequence[float]) -> Image.Image:
    """Brightness, contrast, saturation, grey and tint are one affine map of the colour: one pass."""
    brightness, contrast, saturation = (1 + augment.color * (2 * v - 1) for v in u[6:9])
    if u[9] < augment.grayscale:
        saturation = 0.0
    tint = [1.0, 1.0, 1.0]
    if augment.tint and u[10] < augment.tint:
        # u[10], stretched, gives the first channel: it is uniform, given that it is below the probability.
        tint = [1 - v / 2 for v in (u[10] / augment.tint, u[11], u[12])]
    if brightness == contrast == saturation == 1 and tint == [1.0, 1.0, 1.0]:
        return image
    offset = 0.0
    if contrast != 1:
        mean = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        assert isinstance(mean, tuple)
        offset = (1 - contrast) * brightness * sum(w * m for w, m in zip(_LUMA, mean, strict=True))
    gain = brightness * contrast
    matrix: list[float] = []
    for channel in range(3):
        row = [gain * ((1 - saturation) * w + (saturation if i == channel else 0)) for i, w in enumerate(_LUMA)]
        matrix += [tint[channel] * v for v in (*row, offset)]
    return image.convert("RGB", tuple(matrix))
