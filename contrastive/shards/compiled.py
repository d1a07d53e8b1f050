"""An optional fast path of the loader on x86: crops, resizes and colours of a whole batch in compiled C.

torch's kernels are quick, but a small image costs as much again to hand to them. The bytes are those of `augment`, one
for one (`tests/shards/test_compiled.py`), so that a run may go on where there is no compiler.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from contrastive.errors import UserError
from contrastive.shards.augment import Augment, color_maps
from contrastive.shards.download import remote_settings

SOURCE = Path(__file__).with_name("pixels.c")
# No contraction into fused multiply-adds: a crop must round as Python's does.
FLAGS = ["-O3", "-mavx2", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC", "-pthread"]
_INT, _REAL, _PLACE = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


def compile_pixels() -> None:
    """Make `shape_cached` and `recolor` of this module usable: compile them, in a second, once a machine.

    They are kept in ``compiled`` of the folder that ``$CONTRASTIVE_CACHE`` names, ~/.cache/contrastive. The compiler is
    ``cc``, or that of ``$CC``.

    Raises UserError where there is no compiler, where it fails or its work cannot be kept, or without AVX2.
    """
    reason = why_not_compiled()
    if reason is not None:
        raise UserError(
            f"data.compiled true: {reason}; install a C compiler or name one in $CC, or set it to auto or false, which "
            "give the same pixels, slower"
        )


@functools.cache
def why_not_compiled() -> str | None:
    """Why the compiled code cannot be had here; None where it can."""
    try:
        _library()
    except _Unavailable as reason:
        return str(reason)
    return None


class _Unavailable(Exception):
    pass


@functools.cache
def _library() -> ctypes.CDLL:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        raise _Unavailable("it is for x86 processors with AVX2 only")
    try:
        compiler = shlex.split(os.environ.get("CC") or "cc")
    except ValueError as fault:
        raise _Unavailable(f"$CC is no command ({fault})") from None
    if shutil.which(compiler[0]) is None:
        raise _Unavailable(f"no C compiler on PATH ({compiler[0]})")
    # Machines that share a home may differ in their C library.
    machine = [platform.machine(), *platform.libc_ver()]
    recipe = "\0".join([SOURCE.read_text(), *compiler, *FLAGS, *machine])
    file = remote_settings().cache_dir / "compiled" / f"pixels-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"
    try:
        return ctypes.CDLL(str(file))
    except OSError:  # it is not there, or this machine cannot load it
        _compile(compiler, file)
    try:
        return ctypes.CDLL(str(file))
    except OSError as fault:
        raise _Unavailable(f"what was compiled cannot be loaded ({fault})") from None


def _compile(compiler: list[str], file: Path) -> None:
    """Other processes, which may be at it too, see all of the file or nothing."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as aside:
            built = Path(aside) / file.name
            command = [*compiler, *FLAGS, str(SOURCE), "-o", str(built), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if done.returncode or not built.is_file():
                told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                raise _Unavailable(f"compiling failed ({told[0]})")
            with open(built, "rb+") as whole:
                os.fsync(whole.fileno())  # to load what a loss of power has cut off would kill the process
            os.replace(built, file)
    except subprocess.TimeoutExpired:
        raise _Unavailable("compiling took more than a minute") from None
    except OSError as fault:
        raise _Unavailable(f"it cannot be kept in {file.parent} ({fault.strerror})") from None


def shape_cached(
    cached: np.ndarray,
    places: np.ndarray,
    augment: Augment,
    u_nd: np.ndarray,
    out_nhwc: np.ndarray,
    threads: int = 1,
) -> None:
    """`shape_pixels` of images that lie in one array, uint8 (N, height, width, 3), each by its own numbers.

    places: int64 (n,), which image each row of `out_nhwc`, uint8 (n, size, size, 3), is made of; -1: the row is left as
    it is. u_nd: float64 (n, DRAWS or more). Nothing is rotated. threads: that share the rows out, the calling one too.
    """
    assert augment.rotate == 0 and out_nhwc.shape[1] == out_nhwc.shape[2]
    for array, kind in ((cached, np.uint8), (places, np.int64), (u_nd, np.float64), (out_nhwc, np.uint8)):
        assert array.dtype == kind and array.flags.c_contiguous
    assert len(places) == len(u_nd) == len(out_nhwc) and places.max(initial=-1) < len(cached)
    failed = _library().shape_images(
        _INT(len(places)), _PLACE(cached.ctypes.data), _INT(cached.shape[1]), _INT(cached.shape[2]),
        _PLACE(places.ctypes.data), _PLACE(u_nd.ctypes.data), _INT(u_nd.shape[1]),
        _REAL(augment.crop[0]), _REAL(augment.crop[1]), _REAL(augment.ratio), _REAL(augment.flip),
        _INT(out_nhwc.shape[1]), _PLACE(out_nhwc.ctypes.data), _INT(threads),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory to resize an image in")


def recolor(pixels_nhwc: np.ndarray, augment: Augment, u_nd: np.ndarray, threads: int = 1) -> None:
    """`contrastive.shards.augment.recolor`, by so many threads."""
    assert pixels_nhwc.dtype == np.uint8 and pixels_nhwc.flags.c_contiguous
    maps = color_maps(augment, u_nd)
    if maps is not None:
        matrix, level = np.ascontiguousarray(maps.matrix), np.ascontiguousarray(maps.level)
        _library().recolor_images(
            _INT(len(pixels_nhwc)), _PLACE(pixels_nhwc.ctypes.data), _INT(pixels_nhwc[0].size // 3),
            _PLACE(matrix.ctypes.data), _PLACE(level.ctypes.data), ctypes.c_int(maps.bits), _INT(threads),
        )  # fmt: skip
