"""One definition of a picture: the upright RGB pixels of 8 bits that a viewer shows."""

import functools
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from contrastive.orientation import orientation_of, turn

STRIP = 1 << 20  # pixels that are laid over white at a time: no second copy of a large picture is made


class Unshowable(ValueError):
    """An image whose values have no agreed meaning as brightness; `reason` is the same text for the same fault."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture that a viewer shows: RGB, upright (EXIF), transparency over white, deep pixels scaled to 8 bits.

    Deep grey pixels keep black black: 16 bits are divided by 256. Of 32-bit integers and floats the largest value
    decides, see `_scaled`. Embedded colour profiles are not applied.

    Raises:
        Unshowable: values below 0 or not finite.
        OSError: the image is damaged, and was not loaded yet.
    """
    if image.mode == "RGB" and not image.info:  # nothing is known of it that could change it
        return image
    rgb = flatten(image)  # loads it, which `orientation_of` needs
    return turn(rgb, orientation_of(image))


def flatten(image: Image.Image) -> Image.Image:
    """`to_rgb` without turning; `image` itself where it is RGB already."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    key = _Key(image)  # before loading, when Pillow drops what it needs
    image.load()
    if key:
        return key.over_white(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_deep(image)).convert("RGB")
    if _has_alpha(image):
        return _over_white(image)
    if image.mode == "LAB":
        return _from_lab(image)
    return image.convert("RGB")


def _has_alpha(image: Image.Image) -> bool:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return True
    palette = image.palette
    return image.mode == "P" and palette is not None and palette.mode.endswith("A")


def _over_white(image: Image.Image) -> Image.Image:
    whole = Image.new("RGB", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        strip = strip.convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        whole.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return whole


class _Key:
    """The one colour of a PNG that is transparent (tRNS), compared at the depth of the file.

    Pillow gives pixels of 8 bits for most depths, and the colour as the file has it: of 1, 2, 4 or 16 bits.
    True where there is such a colour and Pillow's own conversion would compare unlike numbers.
    """

    def __init__(self, image: Image.Image) -> None:
        self.color = image.info.get("transparency") if image.mode in ("1", "L", "RGB", "I;16") else None
        tiles = getattr(image, "tile", None) or [("", (), 0, "")]
        raw = tiles[0][3]
        raw = raw[0] if isinstance(raw, tuple) and raw else raw
        self.low_bytes: np.ndarray | None = None
        if image.mode == "RGB" and self.color is not None and raw == "RGB;16B":
            self.low_bytes = _low_bytes(image)
        # a sample of n bits becomes one of 8 by this factor
        self.factor = {"1": 255, "L;1": 255, "L;2": 85, "L;4": 17}.get(raw, 1)
        self.wanted = self.color is not None and (
            image.mode == "I;16" or self.low_bytes is not None or self.factor > 1 or _largest(self.color) > 255
        )

    def __bool__(self) -> bool:
        return self.wanted

    def over_white(self, image: Image.Image) -> Image.Image:
        color: Any = self.color
        values = np.asarray(image)
        if image.mode == "I;16":
            clear, shown = values == color, (values >> 8).astype(np.uint8)
        elif image.mode == "RGB":
            high, low = np.asarray(color) >> 8, np.asarray(color) & 255
            clear, shown = (values == high).all(axis=2), values.copy()
            if self.low_bytes is not None:
                clear &= (self.low_bytes == low).all(axis=2)
        else:
            shown = np.asarray(image.convert("L")).copy()
            clear = shown == color * self.factor
        shown[clear] = 255
        return Image.fromarray(shown).convert("RGB")


def _largest(color: Any) -> int:
    return max(color) if isinstance(color, tuple) else color if isinstance(color, int) else 0


def _low_bytes(image: Image.Image) -> np.ndarray | None:
    """The lower byte of each sample of an unloaded 16-bit RGB PNG, of which Pillow gives the higher."""
    file = image.fp  # type: ignore[attr-defined]
    if file is None:
        return None
    place = file.tell()
    file.seek(0)
    other = PngImagePlugin.PngImageFile(io.BytesIO(file.read()))
    file.seek(place)
    other.tile = [(*tile[:3], "RGB;16L") for tile in other.tile]  # type: ignore[misc]
    return np.asarray(other)


def _deep(image: Image.Image) -> np.ndarray:
    """The grey values of a deep image as uint8 (height, width)."""
    tags: Any = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        grey = (values >> (4 if tags.get(258) == (12,) else 8)).astype(np.uint8)
    elif image.mode == "I" and image.format == "PPM":  # Pillow stretches its own range to 16 bits
        grey = (values >> 8).astype(np.uint8)
    else:
        if image.mode == "I" and tags.get(339, (2,)) == (1,):
            values = values.view(np.uint32)  # unsigned in the file, read as signed
        grey = _scaled(values)
    # Pillow inverts white-is-zero pictures of 8 bits only
    return ~grey if tags.get(262) == 0 else grey


def _scaled(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Integers of 32 bits, or floats, as uint8, by the range that they seem to be of.

    Floats up to 1 are of 0 to 1. Values up to 255 are of 8 bits, up to 65,535 of 16 bits. Larger ones, and floats
    from 1 to 16 (light above white), are of 0 to the largest of them.
    """
    floats = values.dtype.kind == "f"
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise Unshowable("pixel values that are not finite")
    if low < (-1e-3 if floats else 0):  # rounding
        raise Unshowable("pixel values below 0")
    if floats and high <= 1.001:
        white = 1.0
    elif floats and high <= 16 or high > 65_535.5:
        white = high
    else:
        white = 255.0 if high <= 255.5 else 65_535.0
    if not floats and white == 65_535:
        return (values >> 8).astype(np.uint8)  # as other pictures of 16 bits
    scaled: NDArray[np.float32] = np.empty(values.shape, np.float32)  # half the memory of float64
    np.multiply(values, 255 / white, out=scaled, casting="unsafe")
    np.round(scaled, out=scaled)
    return scaled.clip(0, 255, out=scaled).astype(np.uint8)  # clips rounding alone: `white` is the largest


def _from_lab(image: Image.Image) -> Image.Image:
    transform = _lab_transform()
    if transform is None:
        raise Unshowable("LAB colours, which this Pillow cannot convert")
    from PIL import ImageCms

    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


@functools.cache
def _lab_transform() -> Any:
    try:
        from PIL import ImageCms

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(*profiles, "LAB", "RGB")
    except Exception:  # built without littlecms
        return None
