"""From encoded bytes to pixels: a few image formats, nothing that runs code, no surprises in size."""

import io
import warnings

import numpy as np
from PIL import Image

from contrastive.images import square, to_rgb
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
            image = to_rgb(image)
    except Exception:
        raise Rejected("truncated or damaged") from None
    if animated:
        raise Rejected("animated")
    return image


def resize_square(image: Image.Image, size: int) -> np.ndarray:
    """`contrastive.images.square` as uint8 (3, size, size)."""
    return np.ascontiguousarray(np.asarray(square(image, size)).transpose(2, 0, 1))
