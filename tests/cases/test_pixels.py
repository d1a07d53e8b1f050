"""One definition of a picture: every path through the product sees what a viewer shows."""

import base64
import io
import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from contrastive.errors import UserError
from contrastive.evaluation import LinearProbe, ZeroShotClassifier, embed, load_classifier
from contrastive.evaluation.examples import _images
from contrastive.evaluation.items import decoded_images
from contrastive.images import to_rgb
from contrastive.orientation import jpeg_orientation
from contrastive.preprocessing import centre_square
from contrastive.shards import PairLoader, Record, Rejected, Transform, decode, make_shards, open_index, write_shards
from contrastive.shards.cache import open_cache
from contrastive.shards.card import data_card
from contrastive.shards.contact_sheet import write_contact_sheet
from contrastive.shards.decode import DECODER_VERSION, decode_image, decode_pixels, image_size
from contrastive.shards.record import IMAGE_EXTENSIONS, image_extension
from contrastive.shards.sources import open_source
from contrastive.training import check_identity
from tests.cases.pictures import LOSS, chunk, exif, photo, png, scene, tiff
from tests.evaluation.fake import ColourModel
from tests.shards.conftest import lengths

DATA = Path(__file__).parent / "data"
FORMATS = sorted(LOSS)
Pixels = NDArray[np.uint8]


def grey(data: bytes) -> list[int]:
    """The first row of a picture, which must be grey."""
    row = np.asarray(decode_image(data))[0]
    assert (row == row[:, :1]).all()
    return row[:, 0].tolist()


def reason(data: bytes) -> str:
    with pytest.raises(Rejected) as caught:
        decode_image(data)
    assert caught.value.reason
    return caught.value.reason


# ---- paths: from the bytes of a picture to its pixels, (48, 64, 3) of the upright one


def by_the_loader(data: bytes, folder: Path, cache: bool, **options: object) -> Pixels:
    """The whole picture: the loader's square takes a wide one's centre, so the rest is compared by other paths."""
    write_shards([Record("a", data, ("a caption",))], folder / "loader", overwrite=True)
    index = open_index(folder / "loader")
    loader = PairLoader(
        index, tokenize=lengths, image_size=48, augment=None, global_batch=1, steps=1, cache=cache, **options
    )
    (batch,) = loader
    assert batch.valid.all(), batch.rejected
    return batch.pixels[0].permute(1, 2, 0).numpy()


def rewritten(data: bytes, folder: Path, transform: Transform) -> Pixels:
    source = folder / "source"
    source.mkdir(exist_ok=True)
    (source / f"a.{image_extension(data)}").write_bytes(data)
    (source / "a.txt").write_text("a caption")
    make_shards(open_source(source), folder / "made", transform=transform, overwrite=True)
    written = open_index(folder / "made").image(0)
    opened = Image.open(io.BytesIO(written))
    opened.load()
    assert opened.getexif().get(274, 1) == 1
    assert np.array_equal(np.asarray(opened.convert("RGB")), np.asarray(decode_image(written)))
    return np.asarray(decode_image(written))


def from_the_contact_sheet(data: bytes, folder: Path) -> Pixels:
    write_shards([Record("a", data, ("a caption",))], folder / "sheet", overwrite=True)
    index = open_index(folder / "sheet")
    card = data_card(index, context=8)
    assert (card["images"]["width"]["most"], card["images"]["height"]["most"]) == (64, 48)
    page = write_contact_sheet(folder / "sheet.html", index, card, "sheet").read_text()
    found = re.search(r"data:image/webp;base64,([^\"]+)", page)
    assert found
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGB"))


def embedded(source: object) -> Pixels:
    """What a model's `preprocess` is given."""
    seen: list[Image.Image] = []

    class Recorder(ColourModel):
        def preprocess(self, image: Image.Image):
            seen.append(image)
            return super().preprocess(image)

    embed(Recorder(), source, text=False)
    assert [image.mode for image in seen] == ["RGB"]
    return np.asarray(seen[0])


def of_a_file(data: bytes, folder: Path) -> Pixels:
    path = folder / f"a.{image_extension(data)}"
    path.write_bytes(data)
    return embedded([path])


def of_an_example(data: bytes, folder: Path) -> Pixels:
    write_shards([Record("a", data, ("a caption",))], folder / "examples", overwrite=True)
    return np.asarray(_images(open_index(folder / "examples"), {"a"}, False)["a"])


PATHS: dict[str, Callable[[bytes, Path], Pixels]] = {
    "decode_image": lambda data, _: np.asarray(decode_image(data)),
    "decode_pixels": lambda data, _: decode_pixels(data),
    "decode_pixels with room": lambda data, _: decode_pixels(data, None, np.empty(100_000, np.uint8)).copy(),
    "a PIL image": lambda data, _: np.asarray(to_rgb(Image.open(io.BytesIO(data)))),
    "a PIL image, converted": lambda data, _: np.asarray(to_rgb(Image.open(io.BytesIO(data)).convert("RGB"))),
    "embed, a file": of_a_file,
    "embed, a PIL image": lambda data, _: embedded([Image.open(io.BytesIO(data))]),
    "shards, --format png": lambda data, folder: rewritten(data, folder, Transform(format="png")),
    "shards, --resize": lambda data, folder: rewritten(data, folder, Transform(resize=48)),
    "contact sheet": from_the_contact_sheet,
    "examples of the report": of_an_example,
}
SQUARES: dict[str, Callable[[bytes, Path], Pixels]] = {
    "loader": lambda data, folder: by_the_loader(data, folder, False),
    "loader, fast": lambda data, folder: by_the_loader(data, folder, False, decode="fast"),
    "loader, cached pixels": lambda data, folder: by_the_loader(data, folder, True),
}
# A path that writes a lossy format adds its loss to that of the source: colours at half the size.
ADDED = {"contact sheet": 12.0, "shards, --resize": 12.0}


def check(path: str, data: bytes, upright: Pixels, folder: Path, loss: float) -> None:
    if path in SQUARES:
        seen, upright = SQUARES[path](data, folder), np.asarray(centre_square(Image.fromarray(upright), 48))
    else:
        seen = PATHS[path](data, folder)
    assert seen.shape == upright.shape
    assert np.abs(seen.astype(int) - upright).mean() <= loss + ADDED.get(path, 0.0)


@pytest.mark.parametrize("path", [*PATHS, *SQUARES])
@settings(max_examples=12, deadline=None)
@given(
    orientation=st.integers(1, 8),
    format=st.sampled_from(FORMATS),
    order=st.sampled_from("<>"),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_orientation_in_any_format_is_upright_by_every_path(
    path: str, orientation: int, format: str, order: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    upright = scene(seed)
    data = photo(upright, format, orientation, order)
    assert image_size(data) == (64, 48)
    check(path, data, upright, tmp_path_factory.mktemp("path"), LOSS[format])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", FORMATS)
def test_each_orientation_of_each_format_is_turned(format: str, orientation: int) -> None:
    upright = scene(1)
    seen = np.asarray(decode_image(photo(upright, format, orientation)))
    assert np.abs(seen.astype(int) - upright).mean() <= LOSS[format]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_transparency_and_orientation_go_together(format: str, orientation: int) -> None:
    upright = scene(2, channels=4)
    upright[..., 3] = np.where(upright[..., 3] > 127, 255, 0)
    expected = np.where(upright[..., 3:] == 255, upright[..., :3], 255)
    assert np.array_equal(np.asarray(decode_image(photo(upright, format, orientation))), expected)


@pytest.mark.parametrize("with_library", [True, False])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_at_a_reduced_scale_is_turned_and_asks_for_the_upright_size(
    orientation: int, with_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_library:
        monkeypatch.setattr(decode, "simplejpeg", None)
    upright, asked = scene(3), []

    def shrink(width: int, height: int) -> float:
        asked.append((width, height))
        return 2.0

    seen = decode_pixels(photo(upright, "JPEG", orientation), shrink)
    assert asked == [(64, 48)] and seen.shape == (24, 32, 3)
    assert np.abs(seen.astype(int) - upright[::2, ::2]).mean() <= LOSS["JPEG"]


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_grey_and_cmyk_jpegs_are_turned_by_both_libraries(mode: str, orientation: int) -> None:
    upright = scene(4)[..., 0]
    image = Image.fromarray(upright).convert(mode)
    stored = {1: image, 6: image.transpose(Image.Transpose.ROTATE_90), 7: image.transpose(Image.Transpose.TRANSVERSE)}
    buffer = io.BytesIO()
    stored[orientation].save(buffer, "JPEG", quality=95, exif=exif(orientation))
    for seen in (decode_pixels(buffer.getvalue()), np.asarray(decode_image(buffer.getvalue()))):
        assert np.abs(seen[..., 0].astype(int) - upright).mean() <= LOSS["JPEG"]


def test_the_photos_of_the_case_are_one_upright_picture() -> None:
    seen = [np.asarray(decode_image(file.read_bytes())) for file in sorted((DATA / "exif_orientation").glob("*.?*g"))]
    quarters = [seen[0][12, 16], seen[0][12, 48], seen[0][36, 16], seen[0][36, 48]]
    assert [quarter.argmax() for quarter in quarters[:3]] == [0, 1, 2] and min(quarters[3][:2]) > 150 > quarters[3][2]
    assert len(seen) == 9
    for one in seen:
        assert one.shape == (48, 64, 3) and np.abs(one.astype(int) - seen[0]).mean() < 4  # eight are JPEG


# ---- where a tag may stand, and what is no tag

XMP = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
RED_GREEN = bytes([255, 0, 0, 0, 255, 0])
PROFILE = b"\nexif\n      40\n" + exif(6).hex().encode()


@pytest.mark.parametrize(
    "data",
    [
        png(2, 8, 2, RED_GREEN, before=chunk(b"eXIf", exif(6)[6:])),
        png(2, 8, 2, RED_GREEN, after=chunk(b"eXIf", exif(6)[6:])),
        png(2, 8, 2, RED_GREEN, before=chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
        png(2, 8, 2, RED_GREEN, before=chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(PROFILE))),
    ],
    ids=["before the pixels", "after the pixels", "XMP", "ImageMagick's text"],
)
def test_a_png_says_its_orientation_in_one_of_four_places(data: bytes) -> None:
    assert np.asarray(decode_image(data)).tolist() == [[[255, 0, 0]], [[0, 255, 0]]]
    assert image_size(data) == (1, 2)


def jpeg_of(*segments: tuple[int, bytes], start: bytes = b"") -> bytes:
    """A JPEG of 20 x 10 pixels with these segments after its first mark."""
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "JPEG")
    plain = buffer.getvalue()
    made = b"".join(b"\xff" + bytes([mark]) + struct.pack(">H", 2 + len(body)) + body for mark, body in segments)
    return plain[:2] + start + made + plain[2:]


@pytest.mark.filterwarnings("ignore")  # Pillow's, of `Image.open`
@pytest.mark.parametrize(
    ("segments", "start", "expected"),
    [
        ([(0xE1, exif(6))], b"", 6),
        ([(0xE2, b"x" * 65_000), (0xE2, b"\xff\xda" * 30_000), (0xE1, exif(8, ">"))], b"", 8),
        ([(0xE1, exif(6))], b"\xff\xff\xff", 6),
        ([(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)], b"", 6),
        ([(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP), (0xE1, exif(3))], b"", 3),
        ([(0xE1, exif(6)[:20]), (0xE1, b"Exif\0\0" + exif(6)[20:])], b"", 6),
        ([(0xE1, exif(0))], b"", 1),
        ([(0xE1, exif(9))], b"", 1),
        ([(0xE1, b"Exif\0\0")], b"", 1),
        ([(0xE1, b"Exif\0\0II*\0" + struct.pack("<I", 2**31))], b"", 1),
        ([(0xE1, exif(6)[:24])], b"", 1),
        ([], b"", 1),
    ],
)
def test_the_header_of_a_jpeg_is_read_as_pillow_reads_it(
    segments: list[tuple[int, bytes]], start: bytes, expected: int
) -> None:
    data = jpeg_of(*segments, start=start)
    assert jpeg_orientation(data) == jpeg_orientation(memoryview(data)) == expected
    size = (10, 20) if expected >= 5 else (20, 10)
    assert image_size(data) == decode_image(data).size == decode_pixels(data).shape[1::-1] == size
    assert to_rgb(Image.open(io.BytesIO(data))).size == size


@pytest.mark.filterwarnings("ignore")  # Pillow's, of `Image.open`
@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(["JPEG", "PNG", "WEBP"]),
    changes=st.lists(st.tuples(st.integers(0, 31), st.integers(0, 255)), min_size=1, max_size=12),
)
def test_a_damaged_exif_block_never_ends_a_run_and_all_paths_agree(format: str, changes: list[tuple[int, int]]) -> None:
    block = bytearray(exif(6))
    good = photo(scene(5), format, 6)
    at = good.index(bytes(block[6:]))
    for place, value in changes:
        block[6 + place % (len(block) - 6)] = value
    if format == "PNG":
        data = good.replace(chunk(b"eXIf", exif(6)[6:]), chunk(b"eXIf", bytes(block[6:])))
    else:
        data = good[:at] + bytes(block[6:]) + good[at + len(block) - 6 :]
    seen = np.asarray(decode_image(data))
    assert seen.shape in ((48, 64, 3), (64, 48, 3))
    assert np.array_equal(decode_pixels(data), seen)
    assert image_size(data) == seen.shape[1::-1]


@pytest.mark.parametrize("place", range(8))
def test_a_damaged_exif_block_of_an_avif_turns_nothing(place: int) -> None:
    """The container says how to turn it, and libavif reads that."""
    block = Image.Exif()
    block[271] = "the maker"
    block[274] = 6
    buffer = io.BytesIO()
    Image.fromarray(np.rot90(scene(5))).save(buffer, "AVIF", exif=block, quality=95, subsampling="4:4:4")
    data = bytearray(buffer.getvalue())
    data[max(data.find(b"II*\0"), data.find(b"MM\0*")) + place] ^= 0x55
    assert np.abs(np.asarray(decode_image(bytes(data))).astype(int) - scene(5)).mean() <= LOSS["AVIF"]


def test_a_heif_is_turned_once_where_the_camera_left_its_tag() -> None:
    upright = scene(6)
    data = photo(upright, "HEIF", 6)
    assert b"irot" in data and exif(6)[6:] in data
    assert np.abs(np.asarray(decode_image(data)).astype(int) - upright).mean() <= LOSS["HEIF"]


# ---- depth and transparency; the oracle is arithmetic


def test_the_deep_ramps_of_the_case_stay_ramps() -> None:
    files = sorted((DATA / "deep_and_transparent_pixels").glob("*.[pt][ni][gf]"))
    assert len(files) == 8
    for file in files:
        row = np.asarray(decode_image(file.read_bytes()))[0, :, 0].astype(int)
        assert row[0] == 0 and row[-1] == 255 and 3 <= np.diff(row).min() <= np.diff(row).max() <= 5, file


@settings(max_examples=40, deadline=None)
@given(depth=st.sampled_from([1, 2, 4, 8, 16]), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_the_transparent_grey_of_a_png_is_compared_at_the_files_depth(
    depth: int, seed: int, data: st.DataObject
) -> None:
    near = np.random.default_rng(seed).integers(0, min(2**depth, 600), 16)
    key = int(data.draw(st.sampled_from(near.tolist())))
    bits = "".join(f"{value:0{depth}b}" for value in near)
    row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    shown = near >> 8 if depth == 16 else near * 255 // (2**depth - 1)
    made = png(16, depth, 0, row, chunk(b"tRNS", struct.pack(">H", key)))
    assert grey(made) == np.where(near == key, 255, shown).tolist()
    assert np.asarray(to_rgb(Image.open(io.BytesIO(made))))[0, :, 0].tolist() == grey(made)


@settings(max_examples=30, deadline=None)
@given(depth=st.sampled_from([8, 16]), seed=st.integers(0, 2**32 - 1))
def test_the_transparent_colour_of_a_png_is_compared_at_the_files_depth(depth: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    colors = random.integers(0, 3, (12, 3)) + (0x1234 if depth == 16 else 7)  # some equal in all but the lowest bits
    kind = ">u2" if depth == 16 else "u1"
    made = png(12, depth, 2, colors.astype(kind).tobytes(), chunk(b"tRNS", struct.pack(">3H", *colors[0].tolist())))
    shown = np.where((colors == colors[0]).all(axis=1, keepdims=True), 255, colors >> (depth - 8))
    assert np.asarray(decode_image(made))[0].tolist() == shown.tolist()
    assert np.asarray(to_rgb(Image.open(io.BytesIO(made))))[0].tolist() == shown.tolist()


def test_a_palette_with_degrees_of_transparency_is_mixed_with_white() -> None:
    palette = chunk(b"PLTE", bytes([10, 20, 30, 0, 0, 0, 70, 80, 90])) + chunk(b"tRNS", bytes([0, 51]))
    assert np.asarray(decode_image(png(3, 8, 3, bytes([0, 1, 2]), palette)))[0].tolist() == [
        [255, 255, 255],
        [204, 204, 204],
        [70, 80, 90],
    ]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("bits", "kind", "code", "values", "expected"),
    [
        (16, 1, "H", [0, 32768, 65535], [0, 128, 255]),
        (16, 2, "h", [0, 255, 32767], [0, 0, 127]),
        (32, 2, "i", [0, 100, 255], [0, 100, 255]),
        (32, 2, "i", [0, 25700, 65535], [0, 100, 255]),
        (32, 2, "i", [0, 1 << 29, 1 << 30], [0, 128, 255]),
        (32, 3, "f", [0.0, 0.5, 1.0], [0, 128, 255]),
        (32, 3, "f", [0.0, 100.4, 255.0], [0, 100, 255]),
        (32, 3, "f", [0.0, 25700.0, 65535.0], [0, 100, 255]),
        (32, 3, "f", [0.0, 1.0, 4.0], [0, 64, 255]),
        (32, 3, "f", [0.0, 4e5, 1e6], [0, 102, 255]),
    ],
)
def test_a_deep_tiff_is_scaled(
    order: str, bits: int, kind: int, code: str, values: list[float], expected: list[int]
) -> None:
    assert grey(tiff(3, bits, struct.pack(f"{order}3{code}", *values), order, kind=kind)) == expected


def test_a_12_bit_tiff_is_scaled() -> None:
    assert grey(tiff(2, 12, bytes([0x80, 0x0F, 0xFF]))) == [128, 255]


def test_unsigned_integers_of_32_bits_are_not_read_as_negative() -> None:
    assert grey(tiff(3, 32, struct.pack("<3I", 0, 1 << 31, (1 << 32) - 1))) == [0, 128, 255]


@pytest.mark.parametrize(("bits", "kind", "code", "white"), [(16, 1, "H", 65535), (32, 3, "f", 1.0)])
def test_a_tiff_whose_zero_is_white_is_shown_so(bits: int, kind: int, code: str, white: float) -> None:
    assert grey(tiff(2, bits, struct.pack(f"<2{code}", 0, white), black=0, kind=kind)) == [255, 0]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff(2, 32, struct.pack("<2i", -1, 5), kind=2), "pixel values below 0"),
        (tiff(2, 32, struct.pack("<2f", -0.5, 5), kind=3), "pixel values below 0"),
        (tiff(2, 32, struct.pack("<2f", float("nan"), 1), kind=3), "pixel values that are not finite"),
        (tiff(2, 32, struct.pack("<2f", float("inf"), 1), kind=3), "pixel values that are not finite"),
        (tiff(2, 16, struct.pack(">2H", 1, 2), ">", black=0), "TIFF of an unusual kind: save it as PNG"),
    ],
)
def test_values_without_a_meaning_are_rejected_by_a_reason(data: bytes, expected: str) -> None:
    assert reason(data) == expected


@pytest.mark.parametrize("white", [65535, 4095, 255])
def test_a_deep_netpbm_is_scaled_by_its_own_white(white: int) -> None:
    kind = ">2H" if white > 255 else ">2B"
    assert grey(b"P5\n2 1\n%d\n" % white + struct.pack(kind, 0, white)) == [0, 255]
    assert grey(b"P5\n2 1\n65535\n" + struct.pack(">2H", 0, 200)) == [0, 0]  # dark, and not taken for 8 bits


def test_lab_colours_are_converted() -> None:
    buffer = io.BytesIO()
    Image.new("LAB", (1, 1), (255, 128, 128)).save(buffer, "TIFF")
    assert np.asarray(decode_image(buffer.getvalue())).min() >= 253  # white, but for the rounding of the profiles


def test_an_image_in_memory_is_scaled_too() -> None:
    assert np.asarray(to_rgb(Image.fromarray(np.array([[0.0, 1.0]], np.float32))))[0, :, 0].tolist() == [0, 255]
    found = embed(ColourModel(), [Image.new("RGB", (4, 4)), Image.fromarray(np.array([[-1]], np.int32))], text=False)
    assert found.failures == {"image 1": "pixel values below 0"}


# ---- formats


@pytest.mark.parametrize(
    ("name", "expected"),
    [("m1.avif", "avif"), ("IMG_2002.HEIC", "heic"), ("m3.jxl", "jxl"), ("m4.jfif", "jpg"), ("m5.JPE", "jpg")],
)
def test_modern_formats_are_told_from_their_bytes(name: str, expected: str) -> None:
    data = (DATA / "folder_with_modern_formats" / name).read_bytes()
    assert image_extension(data) == image_extension(memoryview(data)[:64]) == expected
    assert expected in IMAGE_EXTENSIONS and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def test_the_readable_pictures_of_the_folder_are_read_and_the_others_have_reasons() -> None:
    files = sorted(f for f in (DATA / "folder_with_modern_formats").iterdir() if f.suffix != ".txt")
    outcome = {}
    for file in files:
        try:
            outcome[file.name] = decode_image(file.read_bytes()).size
        except Rejected as fault:
            outcome[file.name] = fault.reason
    assert outcome.pop("README") == "not an image"
    assert outcome.pop("IMG_2002.HEIC") == "truncated or damaged"  # no more than its first bytes
    assert outcome.pop("m3.jxl") == "JPEG XL: not read; save it as JPEG or PNG"
    assert len(outcome) == 8 and set(outcome.values()) == {(64, 48)}


@pytest.mark.parametrize("format", ["JPEG2000", "PPM", "GIF", "BMP", "ICO", "TGA", "EPS", "PCX"])
def test_a_format_is_read_or_has_a_reason(format: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(scene(7)).save(buffer, format)
    data = buffer.getvalue()
    if format in ("ICO", "TGA", "EPS", "PCX"):
        assert reason(data) == "not an image"
    else:
        assert decode_image(data).size == image_size(data) == (64, 48)


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photo(scene(8), "PNG", 6))
    (tmp_path / "a.txt").write_text("a caption")
    (image,) = decoded_images(open_source(tmp_path))
    assert np.array_equal(np.asarray(image), scene(8))


@pytest.mark.parametrize("format", ["AVIF", "PNG", "WEBP", "GIF"])
def test_animations_are_rejected(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:])
    assert reason(buffer.getvalue()) == "animated"


def test_a_heic_without_its_decoder_is_counted_and_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = photo(scene(9), "HEIF", 1)
    monkeypatch.setattr(decode, "_heif", lambda: None)
    assert reason(data) == "HEIC: install contrastive[heif]"
    good = photo(scene(9), "PNG", 1)
    made = write_shards([Record("a", data, ("x",)), Record("b", good, ("y",))], tmp_path / "shards")
    assert dict(made.skipped) == {"HEIC: install contrastive[heif]": 1}


def test_a_failure_for_want_of_a_decoder_does_not_outlive_its_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set").mkdir()
    for name, format in (("a.heic", "HEIF"), ("b.png", "PNG")):
        (tmp_path / "set" / name).write_bytes(photo(scene(10), format, 6))
    write_shards(list(open_source_of(tmp_path / "set")), tmp_path / "shards")
    index = open_index(tmp_path / "shards")

    def outcome() -> tuple[list[str], dict[int, str]]:
        found = embed(ColourModel(), tmp_path / "set", text=False, cache=tmp_path / "cache")
        return found.keys, open_cache(index).rejected

    with monkeypatch.context() as without:
        without.setattr(decode, "_heif", lambda: None)
        assert outcome() == (["b.png"], {0: "HEIC: install contrastive[heif]"})
    assert outcome() == (["a.heic", "b.png"], {})


def open_source_of(folder: Path) -> list[Record]:
    return [Record(file.name, file.read_bytes(), ("a caption",)) for file in sorted(folder.iterdir())]


# ---- too many pixels


def large_jpeg(width: int, height: int, orientation: int = 1, **options: object) -> bytes:
    image = Image.new("L", (width, height))
    image.paste(255, (0, 0, width, height // 2))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif(orientation), **options)
    return buffer.getvalue()


@pytest.mark.parametrize("with_library", [True, False])
def test_a_photo_of_48_megapixels_is_decoded_in_full(with_library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_library:
        monkeypatch.setattr(decode, "simplejpeg", None)
    seen = decode_pixels(large_jpeg(8000, 6000, 6))
    assert seen.shape == (8000, 6000, 3) and (seen[10, 10, 0], seen[10, -10, 0]) == (0, 255)


@pytest.mark.parametrize("with_library", [True, False])
@pytest.mark.parametrize(("limit", "factor"), [(4_800, 1), (4_799, 2), (1_200, 2), (1_199, 4), (100, 8)])
def test_a_jpeg_above_the_limit_is_decoded_reduced(
    limit: int, factor: int, with_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_library:
        monkeypatch.setattr(decode, "simplejpeg", None)
    monkeypatch.setattr(decode, "MAX_PIXELS", limit)
    data = large_jpeg(80, 60, 6)
    size = (-(-60 // factor), -(-80 // factor))
    assert decode_pixels(data).shape == (size[1], size[0], 3) and decode_image(data).size == size
    assert image_size(data) == (60, 80)


@pytest.mark.parametrize("options", [{"progressive": True}, {"quality": 90}])
def test_what_cannot_be_decoded_in_bounded_memory_is_rejected_with_its_size(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 1_000 if "progressive" in options else 79)
    for read in (decode_image, decode_pixels, image_size):
        with pytest.raises(Rejected) as caught:
            read(large_jpeg(80, 60, **options))
        assert caught.value.reason == "too many pixels"
        assert (caught.value.detail or "").startswith("80x60, above ") and "make it smaller" in str(caught.value)


def test_a_jpeg_that_was_read_reduced_is_written_at_that_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 4_000)
    data = large_jpeg(80, 60)
    made = Transform(resize=50).apply(Record("a", data, ("x",)), decode_image(data))
    assert made.image is not None and image_size(made.image) == (40, 30)


def test_the_size_is_told_for_each_file_and_the_reason_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 1_000)
    for number, width in enumerate((20, 64, 72)):
        (tmp_path / f"{number}.png").write_bytes(photo(scene(0, width, 48 if number else 16), "PNG", 1))
    found = embed(ColourModel(), tmp_path, text=False)
    assert found.rejected == {"too many pixels": 2}
    details = [one.detail for one in found.outcomes if one.reason]
    assert [(detail or "").split(",")[0] for detail in details] == ["64x48", "72x48"]


# ---- what was made before


def test_an_image_in_memory_with_another_tag_is_another_picture(tmp_path: Path) -> None:
    def rows(orientation: int) -> NDArray[np.float32]:
        image = Image.fromarray(scene(14, 64, 64))
        image.info["exif"] = exif(orientation)
        return embed(ColourModel(), [image], text=False, features="tower", cache=tmp_path / "cache").image.copy()

    assert not np.array_equal(rows(1), rows(6))


def test_pixels_of_an_earlier_decoder_are_not_used(tmp_path: Path) -> None:
    write_shards([Record("a", photo(scene(11), "PNG", 6), ("x",))], tmp_path / "shards")
    index = open_index(tmp_path / "shards")
    old = tmp_path / "shards" / f"pixels-{index.fingerprint[:16]}.npy"
    np.save(old, np.zeros((1, 64, 48, 3), np.uint8))
    old.with_suffix(".json").write_text("{}")
    cache = open_cache(index)
    assert np.array_equal(cache.pixels[0], scene(11)) and cache.path.name.endswith(f"-{DECODER_VERSION}.npy")
    assert not old.exists() and not old.with_suffix(".json").exists()
    write_shards([Record("a", photo(scene(11), "PNG", 6), ("x",))], tmp_path / "shards", overwrite=True)


def test_embeddings_of_an_earlier_decoder_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contrastive.evaluation import stored

    (tmp_path / "a.png").write_bytes(photo(scene(12), "PNG", 6))
    for version in (DECODER_VERSION - 1, DECODER_VERSION):
        monkeypatch.setattr(stored, "DECODER_VERSION", version)
        embed(ColourModel(), [tmp_path / "a.png"], text=False, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_run_of_an_earlier_decoder_is_refused_by_one_line(tmp_path: Path) -> None:
    write_shards([Record("a", photo(scene(13), "PNG", 6), ("x",))], tmp_path / "shards")
    loader = PairLoader(
        open_index(tmp_path / "shards"), tokenize=lengths, image_size=8, augment=None, global_batch=1, steps=1
    )
    saved = {"loader": {key: value for key, value in loader.identity.items() if key != "decoder"}}
    (tmp_path / "state.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"decoder 1, now they are by 2.*choose another run.dir") as caught:
        check_identity(tmp_path, {"loader": loader.identity})
    assert "\n" not in str(caught.value)


def as_made_before(path: Path, name: str) -> None:
    """Take the decoder out of the header of a safetensors file."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(str(path), framework="numpy") as file:
        header = json.loads(file.metadata()[name])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
    del header["decoder"]
    save_file(tensors, str(path), metadata={name: json.dumps(header)})


def test_a_probe_made_before_opens_with_one_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    rows = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    LinearProbe(1.0).fit(rows, ["a", "b"] * 10).save(tmp_path / "probe", fingerprint="x", model="m")
    recwarn.clear()
    LinearProbe.load(tmp_path / "probe")
    assert not recwarn.list
    as_made_before(tmp_path / "probe", "probe")
    LinearProbe.load(tmp_path / "probe")
    (warning,) = [str(warning.message) for warning in recwarn.list]
    assert warning.endswith("made before pictures were turned upright; results on phone photos differ; build it again")


def test_a_classifier_made_before_warns_only_where_it_was_fitted_to_pictures(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    classifier = ZeroShotClassifier(ColourModel(), ["red", "blue"]).fit()
    for name, temperature in (("texts", 1.0), ("fitted", 2.0)):
        classifier.temperature_ = temperature
        classifier.save(tmp_path / name)
        as_made_before(tmp_path / name, "classifier")
        recwarn.clear()
        load_classifier(tmp_path / name)
        assert [str(warning.message).split(": ")[-1][:11] for warning in recwarn.list] == (
            ["made before"] if name == "fitted" else []
        )
