"""Files that pass for images: rejected with their reason, in little memory, without running or believing anything."""

import io
import resource
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from contrastive.shards import Rejected, decode, decode_image
from contrastive.shards.decode import decode_pixels


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (60, 50)) -> Image.Image:
    channels = {"RGB": 3, "L": 1, "CMYK": 4}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), np.uint8)
    return Image.fromarray(pixels.squeeze(), mode)


def huge_png(side: int) -> bytes:
    """A good header of side x side pixels, and all of them, black: a kilobyte a megapixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + side // 8)) for _ in range(side)) + rows.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


FRAMES = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "an HTML page": (lambda: b"<!doctype html><html><body>404</body></html>", "not an image"),
    "nothing": (lambda: b"", "not an image"),
    "a FITS file": (lambda: b"SIMPLE  =                    T".ljust(80) + b"BITPIX  = 8".ljust(2800), "not an image"),
    "a PostScript program": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "50,000 x 50,000 pixels": (lambda: huge_png(50_000), "too many pixels"),
    "just above the limit": (lambda: huge_png(7_216), "too many pixels"),
    "a progressive JPEG of 53 megapixels": (
        lambda: saved(Image.new("L", (8100, 6500)), "JPEG", progressive=True),
        "too many pixels",
    ),
    "a JPEG cut short": (lambda: saved(noise(), "JPEG")[:900], "truncated or damaged"),
    "a JPEG of nothing but its mark": (lambda: b"\xff\xd8\xff\xe0", "truncated or damaged"),
    "a PNG cut short": (lambda: saved(noise(), "PNG")[:2000], "truncated or damaged"),
    "a WebP cut short": (lambda: saved(noise(), "WEBP")[:500], "truncated or damaged"),
    "an animated GIF": (lambda: saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "animated"),
    "an animated WebP": (lambda: saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "animated"),
    "an animated PNG": (lambda: saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "animated"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("read", [decode_image, decode_pixels])
def test_what_is_no_single_whole_image_is_rejected_with_its_reason(name: str, read: Callable[[bytes], object]) -> None:
    make, reason = HOSTILE[name]
    with pytest.raises(Rejected) as fault:
        read(make())
    # of a file that is cut off in its header Pillow may say either
    assert fault.value.reason == reason or (" cut " in name and fault.value.reason == "not an image")


def test_a_bomb_takes_no_memory() -> None:
    bomb = huge_png(50_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Rejected, match="too many pixels"):
        decode_pixels(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_a_bomb_of_text_in_a_png_is_not_unpacked() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 200_000_000, zip=True)
    bomb = saved(noise(), "PNG", pnginfo=text)
    assert len(bomb) < 1_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        decode_pixels(bomb)
    except Rejected:
        pass  # either is right
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize("with_library", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_of_any_colour_space_has_pillows_pixels(
    mode: str, with_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_library:
        monkeypatch.setattr(decode, "simplejpeg", None)
    data = saved(noise(mode), "JPEG", quality=85)
    assert np.array_equal(decode_pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_unusual_but_good_images_are_taken() -> None:
    grey16 = Image.fromarray(np.arange(0, 65536, 64, np.uint16).reshape(32, 32))
    assert decode_pixels(saved(grey16, "PNG")).max() > 200
    palette = noise().quantize(16)
    palette.info["transparency"] = 3
    assert decode_pixels(saved(palette, "PNG")).shape == (50, 60, 3)
