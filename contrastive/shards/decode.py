"""From encoded bytes to pixels: a few image formats, nothing that runs code, no surprises in size."""

import functools
import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from contrastive.images import Unshowable, flatten, to_rgb
from contrastive.orientation import (
    jpeg_in_one_pass,
    jpeg_orientation,
    orientation_of,
    turn,
    turn_pixels,
    turned_size,
)
from contrastive.preprocessing import centre_square
from contrastive.shards.record import Rejected, image_extension

try:
    import simplejpeg
except ImportError:  # the extra `fast`; Pillow does the same, slower
    simplejpeg = None

# Of the pixels that `decode_image` gives for some file. It is part of the key of everything that is kept of pixels
# (pixel caches, embeddings, features) and of what a resumed run must have in common with the one before.
# 1: as stored. 2: upright; deep, transparent and LAB pixels as a viewer shows them.
DECODER_VERSION = 2
# The largest picture that is decoded in full: cameras of 50 megapixels give 8192 x 6144. It takes 156 MB of RGB.
MAX_PIXELS = 52_000_000
# What is to become this much smaller has a JPEG's colours repeated, not interpolated, where they are stored coarser
# than its brightness: the resize averages them anyway. 0.3 grey levels, and at a reduced scale no difference at all.
COARSE = 1.5
# The plugins of Pillow, without `Image.open`: it asks all of them, some of which run other programs or decode to know
# the size, and it warns of, or refuses, sizes that are checked here.
_PLUGINS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "jpg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "ppm": PpmImagePlugin.PpmImageFile,
    "pfm": PpmImagePlugin.PpmImageFile,
}

# (width, height) of an image -> how many times smaller it may be decoded
Shrink = Callable[[int, int], float]


def decode_image(data: bytes | memoryview) -> Image.Image:
    """The picture that a viewer shows, see `contrastive.images.to_rgb`: RGB, without metadata.

    A JPEG above MAX_PIXELS comes at 1/2, 1/4 or 1/8 of its size, the first that is not above.

    Raises:
        Rejected: "not an image", "truncated or damaged", "too many pixels" (by the header, before anything is
            decoded), "animated", the reason of `missing_decoder`, or of `contrastive.images.Unshowable`.
    """
    image = _open(data)
    if image.format == "JPEG":
        _reduce(image, data, 1)
    return _load(image, data)


def decoded(image: Image.Image) -> Image.Image:
    """`decode_image` for an image that Pillow has opened, or made. Raises Rejected."""
    try:
        return to_rgb(image)
    except Unshowable as fault:
        raise Rejected(fault.reason) from None
    except Exception:  # PIL's plugins let many kinds of error through
        raise Rejected("truncated or damaged") from None


def image_size(data: bytes | memoryview) -> tuple[int, int]:
    """Width and height of the upright picture, from the header; of a large JPEG before it is reduced.

    Raises Rejected as `decode_image` does before it decodes.
    """
    image = _open(data)
    if image.format == "JPEG":
        _reduction(*image.size, data)  # or it is rejected
        return turned_size(*image.size, jpeg_orientation(data))
    if image.format == "PNG" and _said_late(image, data):
        return decode_image(data).size
    if image.format == "TIFF":  # Pillow's own size is turned already
        return image.size
    return turned_size(*image.size, orientation_of(image))


def is_upright(data: bytes | memoryview) -> bool:
    """Whether the stored rows are the upright picture, without turning."""
    image = _open(data)
    if image.format == "JPEG":
        return jpeg_orientation(data) == 1
    if image.format == "TIFF":
        return image.getexif().get(274, 1) == 1
    if image.format == "PNG" and _said_late(image, data):
        image.load()
    return orientation_of(image) == 1


def decode_pixels(
    data: bytes | memoryview, shrink: Shrink | None = None, scratch: np.ndarray | None = None
) -> np.ndarray:
    """`decode_image` as uint8 (height, width, 3); a JPEG may come smaller, by at most `shrink` of the upright size.

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
    wanted = 1.0
    if shrink is not None and image.mode == "RGB":
        wanted = shrink(*turned_size(*image.size, jpeg_orientation(data)))
    _reduce(image, data, wanted)
    return np.asarray(_load(image, data))


def missing_decoder(extension: str) -> str | None:
    """The reason why pictures of this format (`image_extension`) cannot be decoded here, and the remedy; else None."""
    if extension == "heic" and _heif() is None:
        return "HEIC: install contrastive[heif]"
    if extension == "avif" and _avif() is None:
        return "AVIF: install pillow>=11.3"
    if extension in ("jp2", "j2k") and _jpeg_2000() is None:
        return "JPEG 2000: install a Pillow with OpenJPEG"
    return "JPEG XL: not read; save it as JPEG or PNG" if extension == "jxl" else None


def outdated(reasons: Iterable[str]) -> bool:
    """Whether one of these saved reasons for a rejection no longer holds: a decoder was installed since."""
    now = {missing_decoder(extension) for extension in ("heic", "avif", "jp2", "jxl")}
    then = ("HEIC: ", "AVIF: ", "JPEG 2000: ", "JPEG XL: ")
    return any(reason.startswith(then) and reason not in now for reason in reasons)


def check_decoder(what: str, version: Any) -> None:
    """Warn, in one line, that `what` was fitted to pictures of another decoder.

    version: the DECODER_VERSION that was saved with it; None for files that are older than the field.
    """
    if version == DECODER_VERSION:
        return
    if isinstance(version, int) and version > DECODER_VERSION:
        change = f"with decoder {version}, this contrastive has {DECODER_VERSION}; results may differ; update it"
    else:
        change = "before pictures were turned upright; results on phone photos differ; build it again"
    warnings.warn(f"{what}: made {change}", stacklevel=3)


@functools.cache
def _heif() -> Callable[[io.BytesIO], Image.Image] | None:
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        return None
    opener: Callable[[io.BytesIO], Image.Image] = HeifImageFile
    return opener


@functools.cache
def _avif() -> Callable[[io.BytesIO], Image.Image] | None:
    try:
        from PIL import AvifImagePlugin
    except ImportError:
        return None

    def opener(file: io.BytesIO) -> Image.Image:
        try:
            return AvifImagePlugin.AvifImageFile(file)
        except Exception:  # also of an EXIF block that is damaged, which turns nothing: open it without
            return AvifImagePlugin.AvifImageFile(io.BytesIO(file.getvalue().replace(b"Exif", b"none")))

    return opener if features.check("avif") else None


def _jpeg_2000() -> Callable[[io.BytesIO], Image.Image] | None:
    return Jpeg2KImagePlugin.Jpeg2KImageFile if features.check("jpg_2000") else None


# By extension: calls that give the plugin, or None where it is not installed.
_OPTIONAL = {
    "heic": lambda: _heif(),
    "avif": lambda: _avif(),
    "jp2": lambda: _jpeg_2000(),
    "j2k": lambda: _jpeg_2000(),
}


def _with_simplejpeg(data: bytes | memoryview, shrink: Shrink | None, scratch: np.ndarray | None) -> np.ndarray | None:
    """None for what is left to Pillow: damaged files, which it tells by their reasons, and rare colour spaces."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in ("YCbCr", "Gray", "RGB"):
            return None
        orientation = jpeg_orientation(data)
        smaller = 1.0 if shrink is None else shrink(*turned_size(width, height, orientation))
        factor = max(_power_of_two(smaller), _reduction(width, height, data))
        options: dict[str, object] = {}
        if smaller >= COARSE:
            options["fastupsample"] = True
        if factor > 1:
            options |= {"min_height": height // factor, "min_width": width // factor}
        if scratch is not None and 3 * -(-height // factor) * -(-width // factor) <= len(scratch):
            options["buffer"] = scratch
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", **options)
    except ValueError:
        return None
    return turn_pixels(pixels, orientation)


def _power_of_two(factor: float) -> int:
    """The largest of 1, 2, 4 and 8 that is no more than `factor`."""
    return max(power for power in (1, 2, 4, 8) if power <= max(1.0, factor))


def _reduction(width: int, height: int, data: bytes | memoryview) -> int:
    """The factor by which a JPEG must be decoded smaller, 1 in most cases. Raises Rejected where none is enough."""
    if width * height <= MAX_PIXELS:
        return 1
    for factor in (2, 4, 8):
        if -(-width // factor) * -(-height // factor) <= MAX_PIXELS and jpeg_in_one_pass(data):
            return factor
    raise _too_large(width, height)


def _too_large(width: int, height: int) -> Rejected:
    return Rejected(
        "too many pixels",
        f"{width}x{height}, above {MAX_PIXELS / 1e6:g} megapixels; make it smaller, or save it as a baseline JPEG, "
        "which is read at a reduced size",
    )


def _reduce(image: Image.Image, data: bytes | memoryview, wanted: float) -> None:
    """Let Pillow decode a JPEG smaller, by no more than `wanted`, unless there are too many pixels."""
    factor = max(_power_of_two(wanted), _reduction(*image.size, data))
    if factor > 1:
        image.draft("RGB" if image.mode == "RGB" else None, (image.width // factor, image.height // factor))


def resize_square(image: Image.Image, size: int) -> np.ndarray:
    """`contrastive.preprocessing.centre_square` as uint8 (3, size, size)."""
    return np.ascontiguousarray(np.asarray(centre_square(image, size)).transpose(2, 0, 1))


def _open(data: bytes | memoryview) -> Image.Image:
    """The image with its header read, its size in bounds but for a JPEG."""
    extension = image_extension(data)
    if extension is None and data[:2] == b"BM":  # with reserved words that are not zero: weak evidence, see there
        extension, fault = "bmp", "not an image"
    else:
        fault = "truncated or damaged"  # it begins like one of our formats: it was an image
    if extension is None:
        raise Rejected("not an image")
    plugin = _PLUGINS.get(extension)
    if plugin is None:
        missing = missing_decoder(extension)
        if missing is not None:
            raise Rejected(missing)
        plugin = _OPTIONAL[extension]()
        assert plugin is not None
    try:
        with _quiet(extension):
            image = plugin(io.BytesIO(data))
    except Exception as error:  # PIL's plugins let many kinds of error through, and one bad file must not end a run
        unusual = extension == "tiff" and "unknown pixel mode" in str(error)
        raise Rejected("TIFF of an unusual kind: save it as PNG" if unusual else fault) from None
    if image.format != "JPEG" and image.width * image.height > MAX_PIXELS:
        raise _too_large(*image.size)
    return image


def _load(image: Image.Image, data: bytes | memoryview) -> Image.Image:
    """The picture of an opened image."""
    try:
        with _quiet(image.format):
            animated = _is_animated(image, data)
            if not animated:
                picture = flatten(image)
                orientation = jpeg_orientation(data) if image.format == "JPEG" else orientation_of(image)
                if orientation != 1:
                    picture = turn(picture, orientation)
    except Unshowable as fault:
        raise Rejected(fault.reason) from None
    except Exception:
        raise Rejected("truncated or damaged") from None
    if animated:
        raise Rejected("animated")
    picture.info = {}
    return picture


def _is_animated(image: Image.Image, data: bytes | memoryview) -> bool:
    if image.format == "HEIF":  # several pictures are an album, of which a viewer shows the first
        return bytes(data[8:12]) in (b"msf1", b"hevc", b"hevx", b"hevm", b"hevs")
    return bool(getattr(image, "is_animated", False))


def _said_late(image: Image.Image, data: bytes | memoryview) -> bool:
    """Whether a PNG may have its orientation after its pixels."""
    return not image.info.get("exif") and any(mark in bytes(data) for mark in (b"eXIf", b"type exif", b"adobe.xmp"))


def _quiet(kind: str | None) -> AbstractContextManager[None]:
    """Suppress Pillow's warnings about odd EXIF blocks. PNG and WebP have none: their EXIF is not parsed."""
    return _LOUD if kind in ("png", "webp", "PNG", "WEBP") else _silence()


_LOUD = nullcontext()


@contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
