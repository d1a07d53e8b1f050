from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from contrastive.errors import UserError
from contrastive.shards import Augment, augment_pixels
from contrastive.shards.augment import DRAWS, TOGETHER, color_maps, recolor

HALF = [0.5] * DRAWS


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def augment_image(image: Image.Image, size: int, augment: Augment, u: list[float], fill: int = 255) -> Image.Image:
    return Image.fromarray(augment_pixels(np.asarray(image), size, augment, u, fill))


def draws(**places: float) -> list[float]:
    names = [
        "area",
        "ratio",
        "x",
        "y",
        "angle",
        "flip",
        "brightness",
        "contrast",
        "saturation",
        "gray",
        "tint",
    ]
    u = list(HALF)
    for name, value in places.items():
        u[names.index(name)] = value
    return u


def test_nothing_asked_is_nothing_changed() -> None:
    image = noise(24, 24)
    assert np.array_equal(np.asarray(augment_image(image, 24, Augment(), HALF)), np.asarray(image))


@settings(max_examples=60, deadline=None)
@given(
    u=st.lists(st.floats(0, 1, exclude_max=True), min_size=DRAWS, max_size=DRAWS),
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    rotate=st.sampled_from([0, 30, 180]),
)
def test_every_draw_gives_the_size_asked_for(u: list[float], width: int, height: int, rotate: float) -> None:
    augment = Augment((0.2, 1), 2, flip=0.5, rotate=rotate, color=1, grayscale=0.5, tint=0.5)
    image = augment_image(noise(width, height), 7, augment, u)
    assert (image.mode, image.size) == ("RGB", (7, 7))


@settings(max_examples=60, deadline=None)
@given(u=st.lists(st.floats(0, 1, exclude_max=True), min_size=DRAWS, max_size=DRAWS))
def test_the_crop_keeps_to_the_area_and_the_ratio(u: list[float]) -> None:
    # Red counts columns and green rows: the corners of the result tell where the crop was.
    columns, rows = np.meshgrid(np.arange(200), np.arange(200))
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], 2).astype(np.uint8))
    result = np.asarray(augment_image(image, 100, Augment(crop=(0.3, 0.6), ratio=1.5), u)).astype(float)
    width, height = (np.ptp(result[..., i]) * 100 / 99 for i in (0, 1))
    assert 0.28 < width * height / 200**2 < 0.62
    assert 1 / 1.55 < width / height < 1.55


def test_flip_is_a_mirror_image() -> None:
    image = noise(12, 12)
    flipped = augment_image(image, 12, Augment(flip=0.5), draws(flip=0.49))
    assert np.array_equal(np.asarray(flipped), np.asarray(image)[:, ::-1])
    assert np.array_equal(np.asarray(augment_image(image, 12, Augment(flip=0.5), HALF)), np.asarray(image))


@pytest.mark.parametrize(("angle", "turns"), [(0.0, -1), (1.0, 1)])
def test_a_right_angle_turns_every_pixel_to_its_place(angle: float, turns: int) -> None:
    image = noise(16, 16)
    turned = np.asarray(augment_image(image, 16, Augment(rotate=90), draws(angle=angle)))
    inner = slice(1, -1)  # cos 90° is 6e-17 in floating point, which is outside at the edge
    difference = turned.astype(int) - np.rot90(np.asarray(image), turns)
    assert abs(difference[inner, inner]).max() <= 1  # PIL cuts off instead of rounding


def test_uncovered_corners_are_filled() -> None:
    black = Image.new("RGB", (32, 32))
    turned = np.asarray(augment_image(black, 32, Augment(rotate=45), draws(angle=1.0), fill=200))
    assert turned[0, 0].tolist() == [200] * 3
    assert turned[16, 16].tolist() == [0] * 3


def test_a_rotated_large_image_is_antialiased() -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than the result can show: it must be grey, not stripes or a moiré pattern
    turned = np.asarray(augment_image(Image.fromarray(stripes), 32, Augment(rotate=10), draws(angle=0.7)))
    assert abs(turned[8:24, 8:24].astype(int) - 127).max() <= 2


COLORS = Augment(ratio=1, color=0.2, grayscale=0.5, tint=0.5)


def step_by_step(pixels: np.ndarray, u: Sequence[float]) -> np.ndarray:
    """What `COLORS` make of an image, in float64, one change after the other."""
    luma = np.array([0.299, 0.587, 0.114])
    brightness, contrast, saturation = (1 + 0.2 * (2 * v - 1) for v in u[6:9])
    x = pixels.astype(float) * brightness
    x = (x - (x @ luma).mean()) * contrast + (x @ luma).mean()
    grey = (x @ luma)[..., None]
    x = grey + (x - grey) * saturation
    if u[9] < 0.5:
        x = np.repeat((x @ luma)[..., None], 3, axis=2)
    if u[10] < 0.5:
        x = x * [1 - u[10], 1 - u[11] / 2, 1 - u[12] / 2]
    return x


@settings(max_examples=40, deadline=None)
@given(u=st.lists(st.floats(0, 1, exclude_max=True), min_size=DRAWS, max_size=DRAWS))
def test_colors_are_those_of_step_by_step_arithmetic(u: list[float]) -> None:
    image = Image.fromarray(np.asarray(noise(10, 10)) // 4 + 90)  # far from black and white: nothing is clipped
    result = np.asarray(augment_image(image, 10, COLORS, u))
    assert abs(result - step_by_step(np.asarray(image), u)).max() < 0.51  # half a step of rounding


@pytest.mark.parametrize("size", [12, 15])  # whole blocks of pixels, and none that divides
def test_each_image_of_a_batch_is_changed_by_its_own_numbers(size: int) -> None:
    random = np.random.default_rng(0)
    before = random.integers(90, 150, (2 * TOGETHER + 5, size, size, 3), dtype=np.uint8)
    after, u = before.copy(), random.random((len(before), DRAWS + 2))
    recolor(after, COLORS, u)
    for row in range(len(before)):
        assert abs(after[row] - step_by_step(before[row], u[row].tolist())).max() < 0.51


@pytest.mark.parametrize("color", [0.0, 0.01, 0.2, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("kind", ["white", "black", "mixed", "noise"])
def test_colors_are_sums_of_whole_numbers_without_rounding(color: float, kind: str) -> None:
    random, n = np.random.default_rng(0), TOGETHER + 3
    pixels = random.integers(0, 256, (n, 20, 20, 3), dtype=np.uint8)
    if kind != "noise":
        pixels[:] = {"white": 255, "black": 0, "mixed": 255}[kind]
    if kind == "mixed":
        pixels[:, :7] = [0, 255, 1]
    u = random.random((n, DRAWS))
    u[: n // 2, 6:9] = np.nextafter(1.0, 0.0)  # the strongest that there is
    augment = Augment(color=color, grayscale=0.1, tint=0.3)
    maps = color_maps(augment, u)
    assert maps is not None
    before = pixels.reshape(n, -1, 3).astype(np.int64)
    offset = maps.offset(before.sum(axis=1).astype(float), 400, slice(None)).astype(np.int64)
    sums = np.einsum("npc,nkc->npk", before, maps.matrix.astype(np.int64)) + offset[:, None]
    recolor(pixels, augment, u)
    assert np.array_equal(pixels.reshape(n, -1, 3), np.clip(sums >> maps.bits, 0, 255))


@pytest.mark.parametrize(
    "options",
    [
        {"crop": (0.0, 1.0)},
        {"crop": (0.9, 0.5)},
        {"ratio": 0.5},
        {"rotate": 400},
        {"flip": 1.5},
        {"tint": -1},
    ],
)
def test_a_setting_out_of_range_is_named(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"augment.{next(iter(options))}"):
        Augment(**options)  # type: ignore[arg-type]


@settings(max_examples=300)
@given(
    st.integers(1, 130),
    st.integers(1, 130),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=DRAWS, max_size=DRAWS),
    st.sampled_from([0.0, 10.0]),
)
def test_an_image_of_any_shape_can_be_changed(width: int, height: int, u: list[float], rotate: float) -> None:
    augment = Augment(crop=(0.5, 1.0), ratio=4 / 3, color=0.3, tint=0.5, rotate=rotate)
    assert augment_image(noise(width, height), 16, augment, u).size == (16, 16)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 2), (1, 40), (40, 1)])
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999999])
def test_an_image_of_a_pixel_has_a_crop_too(width: int, height: int, place: float) -> None:
    u = [0.0, place, place, place, *HALF[4:]]
    augment = Augment(crop=(0.08, 1.0))
    assert augment_pixels(np.asarray(noise(width, height)), 6, augment, u).shape == (6, 6, 3)
