"""From encoded bytes to pixels: a few image formats, nothing that runs code, no surprises in size."""

import io
import warnings

import numpy as np
from PIL import Image

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
    except Exception:  # PIL's plugins let many kinds of error through, and one bad file must not end a run
        raise Rejected("not an image") from None
    if image.width * image.height > MAX_PIXELS:
        raise Rejected("too many pixels")
    try:
        animated = image.format != "MPO" and getattr(image, "is_animated", False)
        if not animated:
            image.load()
            image = image if image.mode == "RGB" else _to_rgb(image)
    except Exception:
        raise Rejected("truncated or damaged") from None
    if animated:
        raise Rejected("animated")
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
    """The evaluation transform of CLIP; uint8 (3, size, size).

    The shorter side becomes `size` (bicubic, antialiased), and the centre is cut out: the same pixels as
    torchvision's Resize and CenterCrop, without resizing what is cut off.
    """
    return np.ascontiguousarray(np.asarray(square(image, size)).transpose(2, 0, 1))


def square(image: Image.Image, size: int) -> Image.Image:
    """As resize_square, but as an image."""
    short = min(image.size)
    resized = [int(size * side / short) for side in image.size]  # torchvision truncates, then rounds
    starts = [round((side - size) / 2) for side in resized]
    scales = [before / after for before, after in zip(image.size, resized, strict=True)]
    left, top = (start * scale for start, scale in zip(starts, scales, strict=True))
    right, bottom = ((start + size) * scale for start, scale in zip(starts, scales, strict=True))
    box = (left, top, min(right, image.width), min(bottom, image.height))
    return image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)
