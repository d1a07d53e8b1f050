import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from contrastive.errors import UserError
from contrastive.shards import Filters, Record, Rejected, Transform, decode_image
from contrastive.shards.filters import repeated

from .conftest import encoded


def pair(caption: str = "a cat", size: tuple[int, int] = (20, 16)) -> Record:
    return Record("a", encoded(0, size), (caption,))


def opened(record: Record) -> Image.Image:
    assert record.image
    return Image.open(io.BytesIO(record.image))


@pytest.mark.parametrize(
    ("limits", "kept", "left_out", "reason"),
    [
        ({"min_size": 16}, pair(), pair(size=(20, 15)), "image too small"),
        ({"max_aspect": 2.0}, pair(size=(40, 20)), pair(size=(20, 41)), "image too elongated"),
        ({"min_caption": 3}, pair("abc"), pair("ab"), "caption too short"),
        ({"max_caption": 3}, pair("äöü"), pair("abcd"), "caption too long"),
        ({"min_size": 1}, pair(), replace(pair(), image=b"GIF89a, not really"), "truncated or damaged"),
    ],
)
def test_a_limit_keeps_what_reaches_it(limits: dict[str, Any], kept: Record, left_out: Record, reason: str) -> None:
    assert Filters(**limits).skip(kept) is None
    skip = Filters(**limits).skip(left_out)
    assert skip and skip.reason == reason


@pytest.mark.parametrize("what", ["image", "caption", "both"])
def test_repeats_are_those_of_a_plain_walk(what: str) -> None:
    ids = np.random.default_rng(0).integers(-9, 9, (60, 2))
    images, captions, expected = set(), set(), []
    for image, caption in ids.tolist():
        if what != "caption" and image in images:
            expected.append(1)
            continue
        images.add(image)
        expected.append(2 if what != "image" and caption in captions else 0)
        captions.add(caption)
    assert repeated(ids, what).tolist() == expected


@pytest.mark.parametrize("bad", [{"min_size": 0}, {"max_aspect": 0.5}, {"deduplicate": "text"}, {"max_aspect": np.nan}])
def test_a_senseless_limit_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(bad)).replace('_', '-')} "):
        Filters(**bad)


@pytest.mark.parametrize("bad", [{"resize": 0}, {"format": "gif"}, {"quality": 0}, {"mode": "both"}])
def test_a_senseless_transform_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="give "):
        Transform(**bad)


def apply(transform: Transform, data: bytes) -> Record:
    return transform.apply(Record("a", data, ("a",)), decode_image(data))


@pytest.mark.parametrize(
    ("mode", "size"),
    [("shorter", (15, 10)), ("longer", (10, 7))],
)
def test_the_named_side_is_shrunk(mode: str, size: tuple[int, int]) -> None:
    assert opened(apply(Transform(resize=10, mode=mode), encoded(0, (60, 40)))).size == size


def test_bytes_that_need_no_change_stay() -> None:
    data = encoded(0, (20, 16), "JPEG")
    assert apply(Transform(resize=16, format="jpeg", quality=10), data).image == data


def test_small_images_are_not_enlarged() -> None:
    assert opened(apply(Transform(resize=100, format="png"), encoded(0, (20, 16), "JPEG"))).size == (20, 16)


@pytest.mark.parametrize(
    ("format", "after"),
    [("JPEG", "JPEG"), ("WEBP", "WEBP"), ("PNG", "PNG"), ("GIF", "PNG"), ("BMP", "PNG"), ("TIFF", "PNG")],
)
def test_a_resized_image_keeps_its_format_or_is_png(format: str, after: str) -> None:
    assert opened(apply(Transform(resize=8), encoded(0, (20, 16), format))).format == after


def test_quality_reaches_the_encoder() -> None:
    data = encoded(0, (40, 40))
    low, high = (apply(Transform(format="jpeg", quality=quality), data).image for quality in (10, 95))
    assert low and high and len(low) < len(high)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_is_carried_out_and_not_kept(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    buffer = io.BytesIO()
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))  # the left half: upright, the upper one
    image.save(buffer, format, exif=exif)
    turned = opened(apply(Transform(resize=10), buffer.getvalue()))
    assert turned.size == (10, 20)
    assert not turned.getexif()
    upper, lower = np.asarray(turned.convert("L"))[[3, 16]]
    assert upper.max() < 40 and lower.min() > 215


def test_a_damaged_image_is_rejected() -> None:
    with pytest.raises(Rejected, match="truncated or damaged"):
        decode_image(encoded(0)[:60])
