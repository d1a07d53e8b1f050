"""An optional fast path of the softmax losses on a CPU: the exponentials of a tile and their sums in one pass of C++.

torch takes six passes over a tile. What is won is in docs/losses.md; the gradient is the same to rounding. `fuse`
compiles `fused.cpp` (ten seconds, once a machine) and switches it on for the process; nothing does so by itself.
"""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from contrastive.errors import UserError

# The compiler may use what this CPU has, but not more: the build is kept in a folder that machines may share.
INSTRUCTIONS = {"AVX512": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "AVX2": ["-march=x86-64-v3"]}
_on = False


def fuse(on: bool = True) -> None:
    """Compute float32 tiles of InfoNCE, DCL and SogCLR on the CPU by compiled code from here on, or no longer.

    Raises UserError where there is no C++ compiler or no ninja, or where compiling fails.
    """
    global _on
    if on:
        _build()
    _on = on


def _build() -> None:
    if hasattr(torch.ops.contrastive, "exp_sums"):
        return
    for tool, package in (("c++", "g++"), ("ninja", "ninja-build")):
        if shutil.which(tool) is None:
            raise UserError(f"fused losses: no {tool} on PATH to compile them with; install {package}, or do without")
    from torch.utils import cpp_extension  # slow to import

    capability = torch.backends.cpu.get_cpu_capability()
    try:
        cpp_extension.load(
            f"contrastive_fused_{capability.lower()}",
            [str(Path(__file__).with_name("fused.cpp"))],
            extra_cflags=[
                "-O3",
                "-fopenmp",
                "-fno-math-errno",
                "-fno-trapping-math",
                *INSTRUCTIONS.get(capability, []),
            ],
            is_python_module=False,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f"fused losses: compiling failed ({str(error).splitlines()[0]}); do without them") from error


def serves(x_rc: Tensor) -> bool:
    """Whether the compiled code is on and takes this tile."""
    return _on and x_rc.device.type == "cpu" and x_rc.dtype == torch.float32 and x_rc.is_contiguous()


def exp_sums_(x_rc: Tensor, shift: float, row_sum_r: Tensor, column_sum_c: Tensor, best_r: Tensor) -> None:
    """exp(x - shift) in place; its sums by row and by column are added, its largest of a row taken up in `best_r`."""
    torch.ops.contrastive.exp_sums(x_rc, shift, row_sum_r, column_sum_c, best_r)


def exp_slope_(x_rc: Tensor, shift: float, row_r: Tensor, column_c: Tensor, fresh: bool) -> None:
    """exp(x - shift) * (row + column) in place; where `fresh` is false, x holds the exponentials already."""
    torch.ops.contrastive.exp_slope(x_rc, shift, row_r, column_c, fresh)
