"""Compiled code makes the bytes of the plain one, and tells why where it cannot be had."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.errors import UserError
from contrastive.shards import Augment, compiled
from contrastive.shards import augment as plain
from contrastive.shards.augment import DRAWS

needs_compiler = pytest.mark.skipif(
    compiled.why_not_compiled() is not None, reason=f"compiled pixels: {compiled.why_not_compiled()}"
)


def test_where_there_is_a_compiler_and_avx2_there_is_compiled_code() -> None:
    flags = Path("/proc/cpuinfo")
    if shutil.which("cc") is None or not flags.is_file() or "avx2" not in flags.read_text():
        pytest.skip("no compiler, or not a machine that tells of its AVX2")
    if os.environ.get("ATEN_CPU_CAPABILITY") == "default":
        pytest.skip("torch was told to do without AVX2")
    assert compiled.why_not_compiled() is None


@needs_compiler
@settings(max_examples=200)
@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    size=st.integers(1, 90),
    crop=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    ratio=st.floats(1, 3),
    seed=st.integers(0, 10**6),
    threads=st.integers(1, 8),
)
def test_crops_are_those_of_torch_byte_for_byte(
    height: int, width: int, size: int, crop: tuple[float, float], ratio: float, seed: int, threads: int
) -> None:
    augment = Augment(crop=(min(crop), max(crop)), ratio=ratio, flip=0.5)
    random = np.random.default_rng(seed)
    cached = random.integers(0, 256, (4, height, width, 3), dtype=np.uint8)
    places, u = random.integers(0, 4, 6), random.random((6, DRAWS + 2))
    got = np.empty((6, size, size, 3), np.uint8)
    compiled.shape_cached(cached, places, augment, u, got, threads)
    for row, (place, numbers) in enumerate(zip(places, u.tolist(), strict=True)):
        assert np.array_equal(got[row], plain.shape_pixels(cached[place], size, augment, numbers))


@needs_compiler
@pytest.mark.parametrize("edge", [0.0, np.nextafter(1.0, 0.0)])
def test_a_crop_at_the_edge_of_an_image_reads_nothing_beyond_it(edge: float) -> None:
    augment, u = Augment(crop=(0.3, 0.3)), np.full((1, DRAWS), 0.5)
    u[:, 2:4] = edge
    around = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    other, got = around.copy(), np.empty((2, 9, 9, 3), np.uint8)
    other[[0, 2]] = 255 - other[[0, 2]]  # what lies before and behind the image in memory
    for row, images in enumerate((around, other)):
        compiled.shape_cached(images, np.array([1]), augment, u, got[row : row + 1])
    assert np.array_equal(got[0], got[1])


@needs_compiler
def test_a_row_without_a_place_is_left_as_it_is() -> None:
    images, out = np.zeros((2, 8, 8, 3), np.uint8), np.full((3, 4, 4, 3), 7, np.uint8)
    compiled.shape_cached(images, np.array([0, -1, 1]), Augment(), np.full((3, DRAWS), 0.5), out)
    assert [set(row.ravel().tolist()) for row in out] == [{0}, {7}, {0}]


@needs_compiler
@settings(max_examples=100)
@given(
    size=st.integers(1, 40),
    n=st.integers(1, 2 * plain.TOGETHER + 3),
    color=st.floats(0, 1),
    seed=st.integers(0, 10**6),
    threads=st.integers(1, 40),
)
def test_colors_are_those_of_torch_byte_for_byte(size: int, n: int, color: float, seed: int, threads: int) -> None:
    augment = Augment(color=color, grayscale=0.3, tint=0.5)
    random = np.random.default_rng(seed)
    pixels, u = random.integers(0, 256, (n, size, size, 3), dtype=np.uint8), random.random((n, DRAWS + 2))
    got, expected = pixels.copy(), pixels.copy()
    compiled.recolor(got, augment, u, threads)
    plain.recolor(expected, augment, u)
    assert np.array_equal(got, expected)


@needs_compiler
def test_the_strongest_colors_stay_whole_numbers() -> None:
    # float32 holds them up to 2^24: white, which everything makes brighter, and one pixel of another colour
    pixels = np.full((4, 32, 32, 3), 255, np.uint8)
    pixels[:, 3, 5] = [0, 255, 1]
    u = np.full((4, DRAWS), np.nextafter(1.0, 0.0))
    u[1:, 7] = 0.0
    u[2:, 6] = 0.0
    u[3:, 8] = 0.0
    for color in (0.01, 0.3, 0.5, 1.0):
        got, expected = pixels.copy(), pixels.copy()
        compiled.recolor(got, Augment(color=color), u)
        plain.recolor(expected, Augment(color=color), u)
        assert np.array_equal(got, expected)


@pytest.fixture
def nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of what is compiled, empty; afterwards all is as it was."""
    monkeypatch.setenv("CONTRASTIVE_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    forget()
    yield tmp_path / "compiled"
    forget()


def forget() -> None:
    compiled.why_not_compiled.cache_clear()
    compiled._library.cache_clear()


def test_without_a_compiler_the_reason_is_told(nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-cc")
    assert compiled.why_not_compiled() == "no C compiler on PATH (no-such-cc)"


def test_a_compiler_that_fails_is_quoted(nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_compiled.mkdir()
    broken = nothing_compiled / "cc"
    broken.write_text("#!/bin/sh\necho 'cc: internal error' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert compiled.why_not_compiled() == "compiling failed (cc: internal error)"


def test_an_empty_variable_means_the_usual_compiler(nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", "")
    assert compiled.why_not_compiled() == "no C compiler on PATH (cc)"


def test_a_variable_that_is_no_command_is_told(nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "'")
    assert str(compiled.why_not_compiled()).startswith("$CC is no command")


@needs_compiler
def test_a_folder_that_cannot_be_made_is_named(nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_compiled.write_text("a file")
    assert str(compiled.why_not_compiled()) == f"it cannot be kept in {nothing_compiled} (File exists)"


@needs_compiler
def test_what_cannot_be_loaded_is_compiled_again(nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled.why_not_compiled() is None
    (file,) = nothing_compiled.iterdir()
    other = nothing_compiled / "compiled" / file.name  # of another path, or the loader would know it already
    other.parent.mkdir()
    other.write_bytes(b"another machine's")
    monkeypatch.setenv("CONTRASTIVE_CACHE", str(nothing_compiled))
    forget()
    assert compiled.why_not_compiled() is None
    assert other.stat().st_size == file.stat().st_size


def test_a_processor_without_avx2_is_told(nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    assert compiled.why_not_compiled() == "it is for x86 processors with AVX2 only"


@needs_compiler
def test_what_is_compiled_once_is_used_again(nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    assert compiled.why_not_compiled() is None
    assert [path.suffix for path in nothing_compiled.iterdir()] == [".so"]
    forget()
    monkeypatch.setattr("subprocess.run", lambda *command, **options: pytest.fail("compiled again"))
    assert compiled.why_not_compiled() is None


def test_a_recipe_that_insists_is_told_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "why_not_compiled", lambda: "no C compiler on PATH (cc)")
    with pytest.raises(
        UserError, match=r"data.compiled true: no C compiler on PATH \(cc\); install a C compiler .* to auto or false"
    ):
        compiled.compile_pixels()
