import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from contrastive.shards import Rejected, decode_image, image_extension, resize_square

from .conftest import encoded


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def reason(data: bytes) -> str:
    with pytest.raises(Rejected) as caught:
        decode_image(data)
    return caught.value.reason


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_known_formats_are_told_and_decoded(format: str) -> None:
    data = encoded(format=format)
    assert image_extension(data) == {"JPEG": "jpg"}.get(format, format.lower())
    image = decode_image(data)
    assert (image.mode, image.size) == ("RGB", (20, 16))


def test_pixels_are_exact() -> None:
    expected = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(decode_image(encoded(0))), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (100, 100, 100, 255))
    image.putpixel((1, 0), (100, 100, 100, 0))
    pixels = np.asarray(decode_image(saved(image.convert(mode) if mode != "P" else image.quantize(4))))
    assert pixels.tolist() == [[[100] * 3, [255] * 3]]


def test_half_transparency_is_a_mixture() -> None:
    pixels = np.asarray(decode_image(saved(Image.new("RGBA", (1, 1), (0, 0, 0, 51)))))
    assert pixels.tolist() == [[[204] * 3]]


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    image = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert np.asarray(decode_image(saved(image)))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", bytes(100)])
def test_what_is_no_image_is_rejected(data: bytes) -> None:
    assert reason(data) == "not an image"


@pytest.mark.parametrize("kept", [16, 30, 0.5], ids=["after its first bytes", "in its header", "half way"])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_image_is_called_so_wherever_it_is_cut(format: str, kept: float) -> None:
    data = encoded(size=(64, 64), format=format)
    assert reason(data[: int(kept if kept > 1 else kept * len(data))]) == "truncated or damaged"


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_rejected(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    assert reason(saved(frames[0], format, save_all=True, append_images=frames[1:])) == "animated"


def test_a_phones_jpeg_with_a_preview_is_no_animation() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    assert decode_image(saved(frames[0], "MPO", save_all=True, append_images=frames[1:])).size == (8, 8)


@pytest.mark.parametrize("side", [7300, 30000])
def test_a_large_image_is_rejected_from_its_header(side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)  # no pixels follow
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    assert reason(b"\x89PNG\r\n\x1a\n" + b"".join(body)) == "too many pixels"


@pytest.mark.parametrize("size", [(64, 64), (90, 60), (60, 91), (20, 20), (101, 37)])
def test_the_evaluation_transform_is_torchvisions(size: tuple[int, int]) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    image = Image.open(io.BytesIO(encoded(1, (8, 8)))).resize(size, Image.Resampling.BICUBIC)
    peer = transforms.Compose([transforms.Resize(30, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(30)])
    ours = resize_square(image, 30)
    assert (ours.shape, ours.dtype) == ((3, 30, 30), np.uint8)
    assert abs(ours.transpose(1, 2, 0).astype(int) - np.asarray(peer(image))).max() <= 1
