"""From a picture to the pixels that a model takes, as a value that is saved with the model.

Legend: H, W = `size`, C = 3 channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from contrastive.errors import UserError
from contrastive.images import to_rgb

RESIZE_MODES = ("shortest", "longest", "squash")
STRIP = 30  # how many times longer than the part that is cut out of it
INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Preprocessing:
    """The evaluation transform of an image tower: resizing, and the mean and std of its pixels.

    Its pixels are those of open_clip 3.3's ``image_transform(..., is_train=False)``. That resizes with bicubic
    interpolation for "shortest" and a size that is not square, whatever `interpolation` says; so does this.

    Args:
        mean, std: of each channel, in units of 255 grey levels; std is positive.
        size: height and width of the result, pixels; one number for a square.
        resize_mode: "shortest" resizes until the picture covers the size, and cuts out the centre. "longest" resizes
            until it fits into the size, and fills what is left with `fill_color`. "squash" changes the aspect ratio.
        interpolation: "bicubic" or "bilinear", both antialiased.
        fill_color: grey level, or one level for each channel, 0 to 255; used by "longest" only.

    Raises:
        UserError: a value is not one of these.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"
    fill_color: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, _channels(name, getattr(self, name)))
        if min(self.std) <= 0:
            raise UserError(f"preprocessing.std {list(self.std)}: give three numbers above 0")
        object.__setattr__(self, "size", _size(self.size))
        # where there is nothing to fill, the colour makes no difference, and must not make one in a comparison
        object.__setattr__(self, "fill_color", _fill(self.fill_color) if self.resize_mode == "longest" else 0)
        for name, known in (("resize_mode", RESIZE_MODES), ("interpolation", tuple(INTERPOLATIONS))):
            if getattr(self, name) not in known:
                raise UserError(f"preprocessing.{name} {getattr(self, name)!r}: use {', '.join(known)}")

    # ---- using it

    def apply(self, image: Image.Image) -> NDArray[np.uint8]:
        """The pixels of a picture of any mode, uint8 (3, H, W), not normalised."""
        return np.ascontiguousarray(np.asarray(self.picture(image)).transpose(2, 0, 1))

    def picture(self, image: Image.Image) -> Image.Image:
        """`apply` as an RGB image."""
        image = to_rgb(image)
        height, width = self.size
        if self.resize_mode == "squash":
            return image.resize((width, height), INTERPOLATIONS[self.interpolation])
        if self.resize_mode == "shortest":
            return _cover(image, width, height, self.interpolation)
        resized = image.resize(_fitted(image.size, width, height), INTERPOLATIONS[self.interpolation])
        if resized.size == (width, height):
            return resized
        fill = self.fill_color if isinstance(self.fill_color, tuple) else (self.fill_color,) * 3
        whole = Image.new("RGB", (width, height), fill)
        whole.paste(resized, ((width - resized.width) // 2, (height - resized.height) // 2))
        return whole

    def reduction(self, width: int, height: int) -> float:
        """The factor by which a picture of this width and height is made smaller, on the side where it is least."""
        ratios = width / self.size[1], height / self.size[0]
        return max(ratios) if self.resize_mode == "longest" else min(ratios)

    # ---- comparing and keeping it

    @property
    def geometry(self) -> dict[str, Any]:
        """The part that decides the pixels: all but mean and std; as JSON."""
        return {name: value for name, value in self.to_dict().items() if name not in ("mean", "std")}

    @property
    def plain(self) -> bool:
        """True of CLIP's transform, which models had before others were known: shortest, bicubic, square."""
        square = self.size[0] == self.size[1]
        return square and (self.resize_mode, self.interpolation) == ("shortest", "bicubic")

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `from_dict` gives an equal one."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, saved: Any) -> Preprocessing:
        """Read what `to_dict` wrote. Raises UserError for a key that is unknown or missing."""
        names = [field.name for field in fields(cls)]
        if not isinstance(saved, dict) or not set(saved) <= set(names) or not {"mean", "std", "size"} <= set(saved):
            raise UserError(f"preprocessing {saved!r}: give mean, std and size, and of {', '.join(names[3:])} any")
        return cls(**saved)

    @classmethod
    def of_open_clip(cls, saved: dict[str, Any]) -> Preprocessing:
        """The ``preprocess_cfg`` of an open_clip model; its "random" interpolation is bicubic in evaluation."""
        names = ("mean", "std", "size", "resize_mode", "interpolation", "fill_color")
        given = {name: saved[name] for name in names if saved.get(name) is not None}
        if given.get("interpolation") == "random":
            given["interpolation"] = "bicubic"
        for name in ("mean", "std"):
            if isinstance(given.get(name), (int, float)):
                given[name] = (given[name],) * 3
        return cls(**given)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.to_dict().items())


def differences(one: Preprocessing, other: Preprocessing) -> tuple[str, str]:
    """The settings that differ, with the values of the first and of the second: "std [1, 1, 1], size [32, 32]"."""
    ours, theirs = one.to_dict(), other.to_dict()
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    first, second = (", ".join(f"{name} {of.get(name, 'none')}" for name in names) for of in (ours, theirs))
    return first, second


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """CLIP's transform, for pictures that no model sees: the shorter side becomes `size`, the centre is cut out."""
    return _cover(to_rgb(image), size, size, "bicubic")


def _cover(image: Image.Image, width: int, height: int, interpolation: str) -> Image.Image:
    """Resize until the picture covers width x height, and cut out the centre.

    What is cut off is resized too: Pillow keeps the place of a part in float32 and chooses the order of its two passes
    by the part's shape, so that resizing the part alone is up to 4 grey levels away (Pillow 13, a photograph of
    427 x 640 at 224). A strip's part is resized alone: the whole would take gigabytes.
    """
    if width == height:
        short = min(image.size)
        resized = int(width * image.width / short), int(width * image.height / short)  # torchvision truncates
    else:
        ratio = min(image.width / width, image.height / height)
        resized = round(image.width / ratio), round(image.height / ratio)
        interpolation = "bicubic"  # as in open_clip, see `Preprocessing`
    left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
    if max(resized[0] / width, resized[1] / height) > STRIP:
        x, y = image.width / resized[0], image.height / resized[1]
        box = left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height)
        return image.resize((width, height), INTERPOLATIONS[interpolation], box=box)
    whole = image.resize(resized, INTERPOLATIONS[interpolation])
    return whole.crop((left, top, left + width, top + height))


def _fitted(sides: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """The largest width and height of these sides' aspect ratio that fit; a line of one pixel at least."""
    ratio = max(sides[0] / width, sides[1] / height)
    return max(1, round(sides[0] / ratio)), max(1, round(sides[1] / ratio))


def _channels(name: str, given: Any) -> tuple[float, ...]:
    numbers = _numbers(given, (int, float))
    if numbers is None or len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
        raise UserError(f"preprocessing.{name} {given!r}: give three numbers, such as [0.5, 0.5, 0.5]")
    return tuple(float(number) for number in numbers)


def _size(given: Any) -> tuple[int, int]:
    numbers = (given,) * 2 if _numbers([given], int) else _numbers(given, int)
    if numbers is None or len(numbers) != 2 or min(numbers) < 1:
        raise UserError(f"preprocessing.size {given!r}: give height and width in pixels, such as [224, 224]")
    return int(numbers[0]), int(numbers[1])


def _fill(given: Any) -> int | tuple[int, ...]:
    numbers = _numbers([given], int) or _numbers(given, int)
    if numbers is None or len(numbers) not in (1, 3) or not all(0 <= number <= 255 for number in numbers):
        raise UserError(f"preprocessing.fill_color {given!r}: give a grey level from 0 to 255, or three levels")
    return int(numbers[0]) if len(set(numbers)) == 1 else tuple(int(number) for number in numbers)


def _numbers(given: Any, kind: Any) -> list[Any] | None:
    """The numbers of a sequence; None for anything else."""
    if isinstance(given, str) or not isinstance(given, (Sequence, np.ndarray)):
        return None
    plain = [number.item() if isinstance(number, np.generic) else number for number in given]
    alike = all(isinstance(number, kind) and not isinstance(number, bool) for number in plain)
    return plain if alike else None
