"""Training-time changes to an image, drawn from given uniform numbers so that they can be replayed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from contrastive.errors import UserError

DRAWS = 13  # uniform numbers that one image takes
TOGETHER, SIDE = 16, 16  # images whose colours are changed at a time, and pixels of each that stand side by side
_LUMA_1000 = (299, 587, 114)  # thousandths: ITU-R 601, as PIL's greyscale


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


def augment_pixels(pixels: np.ndarray, size: int, augment: Augment, u: Sequence[float], fill: int = 255) -> np.ndarray:
    """A crop of an RGB image, uint8 (height, width, 3), resized to (size, size, 3) and changed; u: DRAWS numbers."""
    shaped = np.array(shape_pixels(pixels, size, augment, u, fill), order="C")
    recolor(shaped[None], augment, np.asarray(u)[None])
    return shaped


def shape_pixels(pixels: np.ndarray, size: int, augment: Augment, u: Sequence[float], fill: int = 255) -> np.ndarray:
    """`augment_pixels` but for the colours; may be a view of `pixels`."""
    height, width, _ = pixels.shape
    box = crop_of(width, height, augment, u)
    angle = math.radians(augment.rotate * (2 * u[4] - 1))
    pixels = _crop(pixels, size, box) if angle == 0 else _turned_crop(pixels, size, box, angle, fill)
    return pixels[:, ::-1] if u[5] < augment.flip else pixels


def crop_of(width: int, height: int, augment: Augment, u: Sequence[float]) -> tuple[float, float, float, float]:
    """Left, top, width and height of the crop, in pixels of an image of this size."""
    area = (augment.crop[0] + (augment.crop[1] - augment.crop[0]) * u[0]) * width * height
    aspect = augment.ratio ** (2 * u[1] - 1)
    crop_width, crop_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
    shrink = min(1.0, width / crop_width, height / crop_height)  # keeps the aspect where the crop would not fit
    crop_width, crop_height = crop_width * shrink, crop_height * shrink
    return u[2] * (width - crop_width), u[3] * (height - crop_height), crop_width, crop_height


def _crop(pixels: np.ndarray, size: int, box: tuple[float, float, float, float]) -> np.ndarray:
    """Cut out whole pixels and resize, bicubic and antialiased, as torchvision's RandomResizedCrop.

    torch's kernel for bytes takes a sixth of the time of Pillow's, and differs from it by at most a few grey levels.
    """
    left, top, width, height = box
    x, y = min(round(left), pixels.shape[1] - 1), min(round(top), pixels.shape[0] - 1)
    part = pixels[y : max(y + 1, round(top + height)), x : max(x + 1, round(left + width))]
    if part.shape[:2] == (size, size):
        return part
    part = part if part.flags.writeable else np.array(part)  # torch wants to be able to write
    # The layout decides how the result comes out: this one is that of the batch, and a third faster too.
    part_nchw = torch.from_numpy(part)[None].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    resized = F.interpolate(part_nchw, (size, size), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _turned_crop(
    pixels: np.ndarray, size: int, box: tuple[float, float, float, float], angle: float, fill: int
) -> np.ndarray:
    image = Image.fromarray(pixels)
    left, top, crop_width, crop_height = box
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
    turned = image.transform(
        (size, size),
        Image.Transform.AFFINE,
        (a, b, c, d, e, f),
        Image.Resampling.BILINEAR,
        fillcolor=(fill, fill, fill),
    )
    return np.asarray(turned)


def recolor(pixels_nhwc: np.ndarray, augment: Augment, u_nd: np.ndarray) -> None:
    """Change the colours of n images in place, each by its own numbers, float64 (n, DRAWS or more).

    Brightness, contrast, saturation, grey and tint are one affine map of an image's colours, and one pass over them: a
    third of the time that Pillow takes image by image. Its sums are whole numbers, so that they are the same in any
    order, on any machine, and in compiled code. (Not where a program has lowered float32's precision of products, by
    `torch.set_float32_matmul_precision("medium")` or autocast.)
    """
    assert pixels_nhwc.flags.c_contiguous  # or a copy would be changed
    maps = color_maps(augment, u_nd)
    if maps is None:
        return
    # Products of three numbers are too short to be quick: several pixels stand side by side, each with its own block.
    # Few images at a time stay in a core's cache.
    count = len(pixels_nhwc)
    side = math.gcd(pixels_nhwc[0].size // 3, SIDE)
    blocks = torch.zeros(min(count, TOGETHER), side, 3, side, 3)
    own = blocks.diagonal(dim1=1, dim2=3)  # (n, channel, channel of the result, pixel)
    matrix_n33 = torch.from_numpy(maps.matrix).float().mT[..., None]
    colors = pixels_nhwc.reshape(count, -1, 3 * side)
    for start in range(0, count, TOGETHER):
        some = slice(start, min(start + TOGETHER, count))
        n = some.stop - start
        before = torch.from_numpy(colors[some]).float()
        sums = before.sum(dim=1, dtype=torch.float64).view(n, side, 3).sum(dim=1).numpy()
        offset = torch.from_numpy(maps.offset(sums, colors[0].size // 3, some)).float()
        own[:n] = matrix_n33[some]
        after = torch.baddbmm(offset.repeat(1, side)[:, None], before, blocks[:n].view(n, 3 * side, 3 * side))
        np.copyto(colors[some], after.mul_(0.5**maps.bits).clamp_(0, 255).numpy(), casting="unsafe")  # cuts off


@dataclass(frozen=True)
class ColorMaps:
    """What colours of n images become: ``(matrix @ color + offset) / 2 ** bits``, cut off to a byte.

    matrix: int32 (n, 3, 3), rows are channels of the result. level: float64 (n, 3), what each channel gains for each
    step of the image's mean brightness, which contrast turns about.
    """

    matrix: np.ndarray
    level: np.ndarray
    bits: int

    def offset(self, sums: np.ndarray, count: int, some: slice) -> np.ndarray:
        """float64 (n, 3) of whole numbers, from the sums of the channels of some of the images, of `count` pixels."""
        mean = sums @ np.array(_LUMA_1000, np.float64) / (1000.0 * count)
        return np.rint(self.level[some] * mean[:, None] * 2**self.bits) + 2 ** (self.bits - 1)  # for half a step


def color_maps(augment: Augment, u_nd: np.ndarray) -> ColorMaps | None:
    """The colour changes that the numbers give n images; None for none at all."""
    brightness, contrast, saturation = (1 + augment.color * (2 * u_nd[:, 6:9] - 1)).T
    saturation = np.where(u_nd[:, 9] < augment.grayscale, 0.0, saturation)
    # u[10], stretched, gives the tint's first channel: it is uniform, given that it is below the probability.
    drawn = np.stack([u_nd[:, 10] / (augment.tint or 1.0), u_nd[:, 11], u_nd[:, 12]], axis=1)
    tint = np.where(u_nd[:, 10:11] < augment.tint, 1 - drawn / 2, 1.0)
    if (brightness == 1).all() and (contrast == 1).all() and (saturation == 1).all() and (tint == 1).all():
        return None
    luma = np.array(_LUMA_1000) / 1000
    matrix = saturation[:, None, None] * np.eye(3) + (1 - saturation)[:, None, None] * luma
    matrix *= (tint * (brightness * contrast)[:, None])[:, :, None]
    # As fine as 16 bits leave for the largest coefficient: compiled code multiplies two at a time. float32, which holds
    # whole numbers up to 2^24, takes the largest sum then, of three products and the offset, in any order.
    strongest = 1 + augment.color
    bits = int(math.log2((2**15 - 1) / strongest**3))
    largest = 255 * strongest * (strongest * (1 + 2 * augment.color) + augment.color) + 1
    assert largest * 2**bits <= 2**24
    return ColorMaps(np.rint(matrix * 2**bits).astype(np.int32), tint * ((1 - contrast) * brightness)[:, None], bits)
