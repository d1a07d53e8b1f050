"""An optional fast path of the loader on x86: crops, resizes and colours of a whole batch in compiled C.

torch's kernels are quick, but a small image costs as much again to hand to them. The bytes are those of `augment`, one
for one (`tests/shards/test_compiled.py`), so that a run may go on where there is no compiler.
"""

import ctypes
import functools
import hashlib
import os
import shlex
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
FLAGS = ["-O3", "-march=x86-64-v3", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC"]
_INT, _REAL, _PLACE = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


def compile_pixels() -> None:
    """Make `shape_cached` and `recolor` of this module usable: compile them, in a second, once a machine.

    They are kept in ``compiled`` of the folder that ``$CONTRASTIVE_CACHE`` names, ~/.cache/contrastive. The compiler is
    ``cc``, or that of ``$CC``.

    Raises UserError where there is no compiler, where it fails, or where the processor lacks AVX2.
    """
    reason = why_not_compiled()
    if reason is not None:
        raise UserError(f"data.compiled: {reason}; set it to auto or false, which gives the same pixels, slower")


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
        raise _Unavailable("this processor has no AVX2")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    recipe = "\0".join([SOURCE.read_text(), *compiler, *FLAGS])
    name = f"pixels-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"
    folder = remote_settings().cache_dir / "compiled"
    try:
        if not (folder / name).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as aside:  # other processes see all of it or nothing
                built = Path(aside) / name
                command = [*compiler, *FLAGS, str(SOURCE), "-o", str(built), "-lm"]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
                os.replace(built, folder / name)
        return ctypes.CDLL(str(folder / name))
    except FileNotFoundError:
        raise _Unavailable(f"no C compiler on PATH ({compiler[0]})") from None
    except subprocess.CalledProcessError as fault:
        told = fault.stderr.strip().splitlines() or [f"exit code {fault.returncode}"]
        raise _Unavailable(f"compiling failed ({told[0]})") from None
    except (OSError, subprocess.SubprocessError) as fault:
        raise _Unavailable(f"compiling failed ({fault})") from None


def shape_cached(
    cached: np.ndarray, places: np.ndarray, augment: Augment, u_nd: np.ndarray, out_nhwc: np.ndarray
) -> None:
    """`shape_pixels` of images that lie in one array, uint8 (N, height, width, 3), each by its own numbers.

    places: int64 (n,), which image each row of `out_nhwc`, uint8 (n, size, size, 3), is made of; -1: the row is left as
    it is. u_nd: float64 (n, DRAWS or more). Nothing is rotated.
    """
    assert augment.rotate == 0 and out_nhwc.shape[1] == out_nhwc.shape[2]
    for array, kind in ((cached, np.uint8), (places, np.int64), (u_nd, np.float64), (out_nhwc, np.uint8)):
        assert array.dtype == kind and array.flags.c_contiguous
    assert len(places) == len(u_nd) == len(out_nhwc) and places.max(initial=-1) < len(cached)
    failed = _library().shape_images(
        _INT(len(places)), _PLACE(cached.ctypes.data), _INT(cached.shape[1]), _INT(cached.shape[2]),
        _PLACE(places.ctypes.data), _PLACE(u_nd.ctypes.data), _INT(u_nd.shape[1]),
        _REAL(augment.crop[0]), _REAL(augment.crop[1]), _REAL(augment.ratio), _REAL(augment.flip),
        _INT(out_nhwc.shape[1]), _PLACE(out_nhwc.ctypes.data),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory to resize an image in")


def recolor(pixels_nhwc: np.ndarray, augment: Augment, u_nd: np.ndarray) -> None:
    """`contrastive.shards.augment.recolor`."""
    assert pixels_nhwc.dtype == np.uint8 and pixels_nhwc.flags.c_contiguous
    maps = color_maps(augment, u_nd)
    if maps is not None:
        matrix, level = np.ascontiguousarray(maps.matrix), np.ascontiguousarray(maps.level)
        _library().recolor_images(
            _INT(len(pixels_nhwc)), _PLACE(pixels_nhwc.ctypes.data), _INT(pixels_nhwc[0].size // 3),
            _PLACE(matrix.ctypes.data), _PLACE(level.ctypes.data), ctypes.c_int(maps.bits),
        )  # fmt: skip
