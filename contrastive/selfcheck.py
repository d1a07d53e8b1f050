"""Do the losses give the gradient that they claim, on this machine? Every way of computing one against the plain one.

The reference is the plain formula in float64: one process, the whole batch, torch's own gradient. Against it stand
several processes under DDP, tiles, the ring, large-batch caching, and lower precision, on two small towers, with
captions that repeat and a number of valid rows that differs between the processes.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from contrastive.errors import UserError
from contrastive.losses import DCL, CyCLIP, Distillation, InfoNCE, Loss, Margin, SigLIP, SogCLR, needs_of
from contrastive.training import cached_backward

ROWS, DIM = 300, 16  # of the global batch: odd numbers of rows a process on 4 processes, several tiles of 64
TILES: tuple[int | str | None, ...] = (None, 64, "auto")  # a number computes its tiles twice, "auto" keeps them here
CHUNKS = (1, 3)
# The largest relative error of a gradient that is in order. bfloat16 towers round every activation to 8 bits: what is
# shown there is the towers' precision, the loss itself is in float32.
BOUNDS = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 0.1}
PARTS = ("image tower", "text tower", "scale", "bias")


def _teacher(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 + number)
    return F.normalize(torch.randn(ROWS, 8, generator=generator, dtype=torch.float64), dim=1)


LOSSES: dict[str, Callable[..., Loss]] = {
    "infonce": lambda **o: InfoNCE(same_caption="ignore", **o),
    "infonce-positive": lambda **o: InfoNCE(same_caption="positive", label_smoothing=0.1, **o),
    "dcl": lambda **o: DCL(same_caption="ignore", **o),
    "siglip": lambda **o: SigLIP(same_caption="positive", **o),
    "margin": lambda **o: Margin(same_caption="ignore", **o),
    "margin-hardest": lambda **o: Margin(negatives="hardest", hardness=0.7, **o),
    "margin-semi-hard": lambda **o: Margin(negatives="semi-hard", **o),
    "sogclr": lambda **o: SogCLR(ROWS, rho=6.5, **o),
    "distillation": lambda **o: Distillation(_teacher(0), _teacher(1), teacher_scale=20.0, **o),
    "cyclip": lambda **o: CyCLIP(),  # it has no tiles
}


@dataclass(frozen=True)
class Case:
    """One way of computing a loss's gradient. tile None: the plain formula."""

    loss: str
    processes: int
    tile: int | str | None
    exchange: str
    chunks: int
    precision: str


@dataclass(frozen=True)
class Result:
    """A case and its relative gradient errors by part; 0 where there is no gradient, as in the reference."""

    case: Case
    errors: dict[str, float]

    @property
    def bound(self) -> float:
        return BOUNDS[self.case.precision]

    @property
    def passed(self) -> bool:
        return all(error <= self.bound for error in self.errors.values())


def check_losses(
    losses: Sequence[str],
    *,
    processes: Sequence[int] = (1, 2, 4),
    precisions: Sequence[str] = tuple(BOUNDS),
    timeout: float = 300.0,
) -> Iterator[list[Result]]:
    """The results of all cases, one list for each number of processes.

    Args:
        losses: names in `LOSSES`.
        processes: numbers of processes, each a divisor of `ROWS`; gloo on the CPU, or NCCL where there are as many
            GPUs as processes.
        timeout: seconds that a collective may take.

    Raises:
        UserError: an unknown loss, precision or a number of processes that does not divide.
    """
    for kind, given, valid in (("loss", losses, LOSSES), ("precision", precisions, BOUNDS)):
        for name in given:
            if name not in valid:
                raise UserError(f"selfcheck: unknown {kind} {name!r}; choose from {', '.join(valid)}")
    for world in processes:
        if world < 1 or ROWS % world:
            raise UserError(f"selfcheck: {world} processes do not divide {ROWS} rows; choose from 1, 2, 3, 4, 5, 6")
    references = {name: _gradients(Case(name, 1, None, "auto", 1, "float64"), 0, "cpu") for name in losses}
    for world in processes:
        cases = [
            Case(*parts)
            for parts in product(losses, [world], TILES, ("gather", "ring"), CHUNKS, precisions)
            if _differs(Case(*parts))
        ]
        yield [
            Result(case, {part: _error(found[part], references[case.loss][part]) for part in PARTS})
            for case, found in zip(cases, _run(cases, world, timeout), strict=True)
        ]


def _differs(case: Case) -> bool:
    """Whether a case is another computation than its neighbours: a ring needs tiles and several processes."""
    if case.loss == "cyclip" and case.tile is not None:
        return False
    return case.exchange == "gather" or (case.processes > 1 and case.tile is not None)


def _error(found: Tensor, expected: Tensor) -> float:
    size = float(expected.norm())
    difference = float((found.double() - expected).norm())
    if size == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / size


# ---- running the cases


def _run(cases: list[Case], world: int, timeout: float) -> list[dict[str, Tensor]]:
    """Gradients of each case, on `world` processes."""
    with tempfile.TemporaryDirectory(prefix="selfcheck-") as folder:
        multiprocessing.spawn(_rank, (world, cases, folder, timeout), nprocs=world)
        found: list[dict[str, Tensor]] = torch.load(Path(folder) / "gradients.pt", weights_only=True)
        return found


def _rank(rank: int, world: int, cases: list[Case], folder: str, timeout: float) -> None:
    on_gpus = torch.cuda.device_count() >= world
    device = f"cuda:{rank}" if on_gpus else "cpu"
    if on_gpus:
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    found = [_gradients(case, rank, device) for case in cases]
    if rank == 0:
        torch.save(found, Path(folder) / "gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


def _gradients(case: Case, rank: int, device: str) -> dict[str, Tensor]:
    """The gradient of each part, as DDP averages it over the processes."""
    dtype = torch.float64 if case.precision == "float64" else torch.float32
    towers: nn.Module = _Towers().to(device, dtype)
    if dist.is_initialized():
        towers = DistributedDataParallel(towers)
    loss = LOSSES[case.loss](tile=case.tile, exchange=case.exchange).to(device)
    n = ROWS // case.processes
    rows = slice(rank * n, (rank + 1) * n)
    pixels, tokens, ids, valid = (x[rows].to(device) for x in _batch())
    rest: dict[str, Any] = {"ids": ids, "valid": valid}
    if "samples" in needs_of(loss):
        rest["samples"] = torch.arange(rows.start, rows.stop, device=device)

    def of_output(out: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = loss(out["image"], out["text"], out["scale"], out["bias"], **rest)
        return found

    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=case.precision == "bfloat16"):
        cached_backward(towers, pixels.to(dtype), tokens.to(dtype), of_output, chunk=math.ceil(n / case.chunks))
    plain: Any = towers.module if isinstance(towers, DistributedDataParallel) else towers
    return {
        "image tower": torch.cat([p.grad.flatten() for p in plain.image.parameters()]).cpu(),
        "text tower": torch.cat([p.grad.flatten() for p in plain.text.parameters()]).cpu(),
        "scale": plain.logit_scale.grad.cpu(),
        "bias": plain.logit_bias.grad.cpu(),
    }


class _Towers(nn.Module):
    """Two small networks that agree a little, since their inputs do."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.image = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, DIM))
            self.text = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, DIM))
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-3.0))

    def forward(self, pixels: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        image, text = self.image(pixels), self.text(tokens)
        dtype = torch.promote_types(image.dtype, torch.float32)
        return {
            "image": F.normalize(image.to(dtype), dim=1),
            "text": F.normalize(text.to(dtype), dim=1),
            "scale": self.logit_scale.exp(),
            "bias": self.logit_bias,
        }


def _batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of both towers, ids that repeat, and rows that are not valid, most of them in the first quarter."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(ROWS, 12, generator=generator, dtype=torch.float64)
    tokens = pixels + torch.randn(ROWS, 12, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 2 * ROWS // 3, (ROWS,), generator=generator)
    valid = torch.rand(ROWS, generator=generator) > torch.linspace(0.4, 0, ROWS)
    return pixels, tokens, ids, valid
