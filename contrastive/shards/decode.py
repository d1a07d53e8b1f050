"""From encoded bytes to pixels: a few image formats, nothing that runs code, no surprises in size."""

import io
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, PngImagePlugin, WebPImagePlugin

from contrastive.images import to_rgb
from contrastive.preprocessing import centre_square
from contrastive.shards.record import Rejected, image_extension

try:
    import simplejpeg
except ImportError:  # the extra `fast`; Pillow does the same, slower
    simplejpeg = None

MAX_PIXELS = 25_000_000  # 25 MP: a 5000 × 5000 image is 75 MB of RGB
# What is to become this much smaller has a JPEG's colours repeated, not interpolated, where they are stored coarser
# than its brightness: the resize averages them anyway. 0.3 grey levels, and at a reduced scale no difference at all.
COARSE = 1.5
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# Opened without Image.open, which looks at all formats and may warn of what `MAX_PIXELS` refuses anyway.
_DIRECT = {"png": PngImagePlugin.PngImageFile, "webp": WebPImagePlugin.WebPImageFile}

# (width, height) of an image -> how many times smaller it may be decoded
Shrink = Callable[[int, int], float]


def decode_image(data: bytes | memoryview) -> Image.Image:
    """The image as RGB; transparency is laid over white.

    Raises Rejected with a reason: "not an image", "truncated or damaged", "too many pixels" (told from the
    header, before anything is decoded), "animated".
    """
    image = _open(data)
    return _load(image)


def image_size(data: bytes | memoryview) -> tuple[int, int]:
    """Width and height as the header has them. Raises Rejected as `decode_image` does before it decodes."""
    return _open(data).size


def decode_pixels(
    data: bytes | memoryview, shrink: Shrink | None = None, scratch: np.ndarray | None = None
) -> np.ndarray:
    """`decode_image` as uint8 (height, width, 3); a JPEG may come smaller, by at most `shrink`.

    scratch: uint8 (n,), which a JPEG that fits is decoded into: the result is a view of it, good until its next use.
    (The pages of fresh memory take a fifth of the time of decoding.)

    A whole JPEG comes from libjpeg-turbo either way, with the same pixels (`tests/shards/test_decode.py`); by
    simplejpeg, where it is installed, without Pillow's copies. A smaller one skips the finer part of each block's
    cosine transform: 1/2, 1/4 or 1/8 of the size. (At 5/8 to 7/8 libjpeg-turbo is slower than at full size, since it
    has vector code for the others only.)
    """
    if image_extension(data) != "jpg":
        return np.asarray(decode_image(data))
    if simplejpeg is not None:
        pixels = _with_simplejpeg(data, shrink, scratch)
        if pixels is not None:
            return pixels
    image = _open(data)
    if shrink is not None and image.mode == "RGB":
        factor = _power_of_two(shrink(*image.size))
        image.draft("RGB", (image.width // factor, image.height // factor))
    return np.asarray(_load(image))


def _with_simplejpeg(data: bytes | memoryview, shrink: Shrink | None, scratch: np.ndarray | None) -> np.ndarray | None:
    """None for what is left to Pillow: damaged files, which it tells by their reasons, and rare colour spaces."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in ("YCbCr", "Gray", "RGB"):
            return None
        if width * height > MAX_PIXELS:
            raise Rejected("too many pixels")
        smaller = 1.0 if shrink is None else shrink(width, height)
        factor = _power_of_two(smaller)
        options: dict[str, object] = {}
        if smaller >= COARSE:
            options["fastupsample"] = True
        if factor > 1:
            options |= {"min_height": height // factor, "min_width": width // factor}
        if scratch is not None and 3 * -(-height // factor) * -(-width // factor) <= len(scratch):
            options["buffer"] = scratch
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", **options)
        return pixels
    except ValueError:
        return None


def _power_of_two(factor: float) -> int:
    """The largest of 1, 2, 4 and 8 that is no more than `factor`."""
    return max(power for power in (1, 2, 4, 8) if power <= max(1.0, factor))


def resize_square(image: Image.Image, size: int) -> np.ndarray:
    """`contrastive.preprocessing.centre_square` as uint8 (3, size, size)."""
    return np.ascontiguousarray(np.asarray(centre_square(image, size)).transpose(2, 0, 1))


def _open(data: bytes | memoryview) -> Image.Image:
    """The image with its header read, its size in bounds."""
    try:
        direct = _DIRECT.get(image_extension(data) or "")
        if direct is not None:
            image: Image.Image = direct(io.BytesIO(data))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PIL's own, milder warning about large images; odd EXIF blocks
                image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise Rejected("too many pixels") from None
    except Exception:  # PIL's plugins let many kinds of error through, and one bad file must not end a run
        # what begins as one of our formats does was an image: its header is cut or damaged
        raise Rejected("truncated or damaged" if image_extension(data) else "not an image") from None
    if image.width * image.height > MAX_PIXELS:
        raise Rejected("too many pixels")
    return image


def _load(image: Image.Image) -> Image.Image:
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
