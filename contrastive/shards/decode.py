"""From encoded bytes to pixels: a few image formats, nothing that runs code, no surprises in size."""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from contrastive.shards.record import Rejected

MAX_PIXELS = 25_000_000  # 25 MP: a 5000 × 5000 image is 75 MB of RGB
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def decode_image(data: bytes) -> Image.Image:
    """The image as RGB; transparency is laid over white.

    Raises Rejected with a reason: "not an image", "truncated or damaged", "too many pixels" (told from the
    header, before anything is decoded), "animated".
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's own, milder warning about large images; odd EXIF blocks
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise Rejected("too many pixels") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, TypeError):
        raise Rejected("not an image") from None
    if image.width * image.height > MAX_PIXELS:
        raise Rejected("too many pixels")
    try:
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise Rejected("animated")
        image.load()
        if image.mode != "RGB":
            image = _to_rgb(image)
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError):
        raise Rejected("truncated or damaged") from None
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I;16"):  # 16-bit grey: PIL's own conversion to RGB clips instead of scaling
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def resize_square(image: Image.Image, size: int) -> np.ndarray:
    """The evaluation transform: the centre square, resized (bicubic, antialiased); uint8 (3, size, size)."""
    return np.ascontiguousarray(np.asarray(square(image, size)).transpose(2, 0, 1))


def square(image: Image.Image, size: int) -> Image.Image:
    """The centre square of an RGB image, resized to size × size."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)
