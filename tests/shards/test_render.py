"""Rendering: exact decoding against Pillow and torchvision, fast decoding against exact."""

import io
from pathlib import Path

import numpy as np
import pytest
import torchvision.transforms.v2.functional as tv
from PIL import Image

from contrastive.shards import Augment, decode
from contrastive.shards.augment import DRAWS, crop_of
from contrastive.shards.decode import decode_image, decode_pixels
from contrastive.shards.render import render

CROP = Augment(crop=(0.9, 1.0))


@pytest.fixture(scope="module", params=["china.jpg", "flower.jpg"])
def photograph(request: pytest.FixtureRequest) -> Image.Image:
    """Real photographs, of 640 x 427 pixels."""
    images = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn")
    return Image.open(Path(images.__file__).parent / "images" / request.param).convert("RGB")


def jpeg(image: Image.Image, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [0, 1])
def test_exact_pixels_are_pillows(photograph: Image.Image, subsampling: int, progressive: int) -> None:
    data = jpeg(photograph, subsampling=subsampling, progressive=progressive)
    assert np.array_equal(decode_pixels(data), np.asarray(decode_image(data)))


def test_a_crop_is_that_of_torchvision(photograph: Image.Image) -> None:
    data, u = jpeg(photograph), np.random.default_rng(0).random(DRAWS).tolist()
    left, top, width, height = crop_of(*photograph.size, CROP, u)
    x, y = round(left), round(top)
    box = [y, x, round(top + height) - y, round(left + width) - x]
    oracle = tv.resized_crop(decode_image(data), *box, size=[224, 224], interpolation=tv.InterpolationMode.BICUBIC)
    difference = np.abs(render(data, 224, CROP, u).astype(int) - np.asarray(oracle).astype(int))
    assert difference.max() <= 8 and difference.mean() < 0.1  # torch's kernel beside Pillow's


@pytest.mark.parametrize("with_library", [True, False])
@pytest.mark.parametrize(("size", "least"), [(300, 427), (224, 427), (200, 213), (100, 106), (50, 53), (20, 53)])
def test_fast_never_decodes_below_the_size_of_the_crop(
    photograph: Image.Image, size: int, least: int, with_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_library:
        monkeypatch.setattr(decode, "simplejpeg", None)
    whole = 427 / size
    height = decode_pixels(jpeg(photograph), lambda w, h: whole).shape[0]
    assert least <= height <= least + 1
    assert height >= min(size, 427)


@pytest.mark.parametrize("size", [120, 64])
def test_fast_differs_from_exact_by_little(photograph: Image.Image, size: int) -> None:
    data = jpeg(photograph)
    for seed in range(3):
        u = np.random.default_rng(seed).random(DRAWS).tolist()
        exact, fast = (render(data, size, CROP, u, decode=how).astype(int) for how in ("exact", "fast"))
        assert not np.array_equal(exact, fast)  # it did take the short way
        assert np.abs(exact - fast).mean() < 4  # grey levels of 255


def test_fast_is_exact_where_nothing_can_be_saved(photograph: Image.Image) -> None:
    data, u = jpeg(photograph), [0.5] * DRAWS
    assert np.array_equal(render(data, 300, CROP, u), render(data, 300, CROP, u, decode="fast"))


def test_the_evaluation_transform_of_fast_decoding_has_the_same_view(photograph: Image.Image) -> None:
    data, u = jpeg(photograph), [0.5] * DRAWS
    exact, fast = (render(data, 100, None, u, decode=how).astype(int) for how in ("exact", "fast"))
    assert np.abs(exact - fast).mean() < 4
