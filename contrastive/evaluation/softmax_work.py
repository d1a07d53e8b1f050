"""The points of softmax problems on their way to the optimum, and the steps that move them.

Shapes: see `contrastive.evaluation.softmax`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from contrastive.evaluation.lbfgs import Batch, minimise
from contrastive.evaluation.newton import Path, newton

if TYPE_CHECKING:
    from contrastive.evaluation.softmax import SoftmaxRegression

Array = NDArray[np.float64]

ROUNDS = (12, 30, 60)  # iterations before the features are rotated again; the last one repeats
TOGETHER = 16  # problems that share a weighted rotation: neighbours in strength
UNCERTAIN = 0.6  # share of the samples that the uncertainty rests on, below which a rotation pays
PROMISE = 1e-8  # of a step in float32, below which float64 takes over
DECADE = 10.0  # the largest step in strength that Newton's method goes at once
ROUGHLY = 1e-2  # tolerance of the strengths between
QUICK = 60  # iterations of L-BFGS before Newton's method takes over
MOST = 4e7  # logits held at a time: 160 MB in float32


@dataclass(frozen=True)
class Solutions:
    """P solutions on one set of features, in the order asked for.

    kkt_P: Euclidean norm of the gradient in weights and intercepts, in float64: 0 at the optimum.
    """

    coef_PKD: Array
    intercept_PK: Array
    objective_P: Array
    kkt_P: Array
    iterations_P: NDArray[np.int64]
    flops: float  # of the matrix products of features and weights or residuals


class Work:
    """The points of P problems in the coordinates of `problem`, and how they are moved."""

    def __init__(
        self, problem: SoftmaxRegression, strength_P: Tensor, weight: NDArray[np.floating] | None, precondition: bool
    ) -> None:
        self.problem, self.strength_P, self.precondition = problem, strength_P, precondition
        groups, _, directions = problem.rotated_GNR.shape
        self.point_GAKP = torch.zeros(groups, directions + 1, problem.classes, len(strength_P), dtype=torch.float64)
        self.iterations_GP = torch.zeros(groups, len(strength_P), dtype=torch.int64)
        self.flops = 0.0
        self.weight: Tensor | None = None
        if weight is not None:
            self.weight = torch.as_tensor(np.require(weight, requirements="W"), dtype=torch.float64)
            self.weight = (self.weight if self.weight.ndim == 3 else self.weight[None])[:, :, None]  # (G, N, 1, P)

    def start_from(self, coef_KD: Tensor, intercept_K: Tensor) -> None:
        problem = self.problem
        self.point_GAKP[:, :-1] = (problem.basis_GDR.transpose(1, 2) @ coef_KD.T)[..., None]
        self.point_GAKP[:, -1] = (intercept_K + problem.mean_GD @ coef_KD.T)[..., None]

    def interpolate(self, wanted: Tensor, known: Tensor) -> None:
        """Start `wanted` from the up to four nearest known strengths: Lagrange's polynomial in log C."""
        place = self.strength_P.log()
        known = known[place[known].argsort()]
        for p in wanted.tolist():
            above = int(torch.searchsorted(place[known], place[p]))
            near = (
                known[max(0, above - 2) : above + 2] if 0 < above < len(known) else known[[min(above, len(known) - 1)]]
            )
            near = near if len(near) in (2, 4) else near[-2:] if above + 2 > len(known) else near[:2]
            x = place[near]
            if len(near) > 1 and (x.diff() < 1e-9).any():
                near, x = near[:1], x[:1]
            share = torch.ones(len(near), dtype=torch.float64)
            for i in range(len(near)):
                for j in range(len(near)):
                    if i != j:
                        share[i] *= (place[p] - x[j]) / (x[i] - x[j])
            self.point_GAKP[..., p] = self.point_GAKP[..., near] @ share

    def follow(self, tolerance: float, max_iter: int, coarse_to_fine: bool, *, started: bool, polish: bool) -> None:
        """From one strength to the next on features that are in memory once: L-BFGS where that is quick, else Newton.

        Strong penalties and well-conditioned features take L-BFGS some twenty iterations, a fraction of what one block
        of the Hessian costs. From the first strength on for which `QUICK` iterations do not do, it is not tried.
        """
        problem, path = self.problem, Path()
        dtype = torch.float64 if polish else torch.float32
        features, hard = problem.rotated_GNR.to(dtype), float("inf")
        levels = levels_of(self.strength_P, DECADE) if coarse_to_fine else [self.strength_P.argsort()]
        done: list[int] = []
        for level in levels:
            interpolated = len(done) > 1 and not started
            if interpolated:
                self.interpolate(level, torch.as_tensor(done))
            path.stale = True  # from the weakest penalty back to the strongest
            for p in level.tolist():
                nearest = float(self.strength_P[done[-1]]) if done else self._easy
                if done and not interpolated:
                    self.point_GAKP[..., p] = self.point_GAKP[..., done[-1]]
                done.append(p)
                begin = self.point_GAKP[..., p].clone()
                if self.strength_P[p] < hard and self._quick(p, features, tolerance, min(QUICK, max_iter)):
                    continue
                hard = min(hard, float(self.strength_P[p]))
                if not (interpolated or started):
                    between = strengths_between(nearest, float(self.strength_P[p]))
                    if between:
                        self.point_GAKP[..., p] = begin
                    for strength in between:
                        self._newton(p, path, ROUGHLY, max_iter, strength)
                self._newton(p, path, tolerance, max_iter)

    @property
    def _easy(self) -> float:
        """A strength at which the optimum is next to 0."""
        return 1 / float(self.problem.power_GR.max())

    def _newton(self, p: int, path: Path, tolerance: float, max_iter: int, strength: float | None = None) -> None:
        """Move problem `p` by Newton's method, as if it had this strength."""
        batch = self._one(p, self.problem.rotated_GNR, strength)
        count, done = newton(batch, path, tolerance, max_iter)
        if not done and count < max_iter and strength is None:
            warnings.warn(
                "softmax regression: rounding ends Newton's method short of the optimum, "
                f"C = {self.strength_P[p]:.3g}; scale the features (their largest is to be about 1), or lower C",
                stacklevel=2,
            )
        self.point_GAKP[..., p] = batch.point_GAKP[..., 0]
        self.iterations_GP[:, p] += count
        self.flops += batch.flops

    def _quick(self, p: int, features: Tensor, tolerance: float, max_iter: int) -> bool:
        """Move problem `p` by L-BFGS; whether that was enough."""
        batch = self._one(p, features)
        promise = PROMISE if features.dtype == torch.float32 else 0.0
        count_GP, done_P = minimise(batch, self.problem.power_GR, tolerance, max_iter, promise)
        self.flops += batch.flops
        self.iterations_GP[:, p] += count_GP[:, 0]
        if batch.point_GAKP.isfinite().all():
            self.point_GAKP[..., p] = batch.point_GAKP[..., 0].double()
        return bool(done_P[0])

    def _one(self, p: int, features: Tensor, strength: float | None = None) -> Batch:
        problem, dtype = self.problem, features.dtype
        offset = None if problem.offset is None else problem.offset.to(dtype)
        strength_P = self.strength_P[[p]] if strength is None else torch.tensor([strength])
        strength_P, point = strength_P.to(dtype), self.point_GAKP[..., [p]].to(dtype)
        weight = None if problem.weight_N is None else problem.weight_N.to(dtype)[None, :, None, None]
        return Batch(
            features, problem.target, problem.sigmoid, strength_P, point, weight, offset, problem.free_intercept
        )

    def run(self, columns: Tensor, tolerance: float, promise: float, max_iter: int, dtype: torch.dtype) -> None:
        """Move problems `columns` to their optimum: rounds of L-BFGS, each on features rotated for what is left."""
        problem = self.problem
        mean_GR = torch.zeros_like(problem.power_GR)  # of the current coordinates, in those of `problem`
        turn_GRR: Tensor | None = None
        rotated, power_GR = problem.rotated_GNR.to(dtype), problem.power_GR
        left = columns
        spent = 0
        while True:
            share = 1.0
            if self.weight is not None:
                share = float(self.weight[..., left].mean())
            point = self._turned(left, mean_GR, turn_GRR)
            batch = Batch(
                rotated,
                problem.target,
                problem.sigmoid,
                self.strength_P[left].to(dtype),
                point.to(dtype),
                None if self.weight is None else self.weight[..., left].to(dtype),
                None if problem.offset is None else problem.offset.to(dtype),
                problem.free_intercept,
            )
            power = power_GR * share if self.precondition else None
            rounds = min(ROUNDS[min(spent, len(ROUNDS) - 1)] if self.precondition else max_iter, max_iter)
            count_GP, done_P = minimise(batch, power, tolerance, rounds, promise)
            spent += 1
            self.flops += batch.flops
            self.iterations_GP[:, left] += count_GP
            self._turn_back(left, batch.point_GAKP.double(), mean_GR, turn_GRR)
            left = left[~done_P]
            left = left[self.iterations_GP[:, left].amax(dim=0) < max_iter]
            if not len(left):
                return
            if not self.precondition or len(problem.rotated_GNR) > 1:
                continue
            order = left[self.strength_P[left].argsort()]
            if len(order) > TOGETHER:
                for part in order.tensor_split(-(-len(order) // TOGETHER)):
                    self.run(part, tolerance, promise, max_iter, dtype)
                return
            left = order
            weight_N, uncertain = self._uncertainty(left)
            if uncertain < UNCERTAIN:
                features = problem.rotated_GNR[0]
                if dtype == torch.float32:
                    features = features.float()
                mean_R = (weight_N.to(dtype) @ features) / weight_N.sum().to(dtype)
                if not problem.free_intercept:
                    mean_R = torch.zeros_like(mean_R)
                centred = features - mean_R
                gram = (centred * weight_N.to(dtype)[:, None]).T @ centred
                power_R, turn_RR = torch.linalg.eigh(gram.double())
                # the diagonal preconditioner multiplies by the mean of p (1 - p), which is in `gram` already
                power_GR = (power_R.clamp_min(0) / weight_N.mean())[None]
                mean_GR, turn_GRR = mean_R.double()[None], turn_RR[None]
                rotated = (centred @ turn_RR.to(dtype))[None]
                self.flops += 4.0 * features.shape[0] * features.shape[1] ** 2

    def _uncertainty(self, left: Tensor) -> tuple[Tensor, float]:
        """Mean p (1 - p) of each sample, and the share of the samples that most of it rests on (Kish)."""
        problem = self.problem
        middle = left[len(left) // 2]
        point = self.point_GAKP[0, :, :, middle].float()
        logits = problem.rotated_GNR[0].float() @ point[:-1] + point[-1]
        if problem.offset is not None:
            logits += problem.offset[0, ..., 0].float()
        chance = torch.sigmoid(logits) if problem.sigmoid else torch.softmax(logits, dim=1)
        weight_N = (chance * (1 - chance)).mean(dim=1).double()
        if self.weight is not None:
            weight_N = weight_N * self.weight[0, :, 0][:, left].mean(dim=1)
        weight_N = weight_N.clamp_min(weight_N.max() * 1e-9 + 1e-30)
        return weight_N, float(weight_N.sum() ** 2 / (weight_N**2).sum() / len(weight_N))

    def _turned(self, left: Tensor, mean_GR: Tensor, turn_GRR: Tensor | None) -> Tensor:
        point = self.point_GAKP[..., left].clone()
        point[:, -1] += torch.einsum("gr,grkp->gkp", mean_GR, point[:, :-1])
        if turn_GRR is not None:
            point[:, :-1] = torch.einsum("grs,grkp->gskp", turn_GRR, point[:, :-1])
        return point

    def _turn_back(self, left: Tensor, point: Tensor, mean_GR: Tensor, turn_GRR: Tensor | None) -> None:
        point = point.clone()
        if turn_GRR is not None:
            point[:, :-1] = torch.einsum("grs,gskp->grkp", turn_GRR, point[:, :-1])
        point[:, -1] -= torch.einsum("gr,grkp->gkp", mean_GR, point[:, :-1])
        self.point_GAKP[..., left] = point

    def solutions(self) -> list[Solutions]:
        """In the coordinates of the features, with objective and gradient in float64."""
        problem = self.problem
        objective, kkt = [], []
        shared = None if problem.weight_N is None else problem.weight_N[None, :, None, None]
        for part in torch.arange(len(self.strength_P)).split(
            max(1, int(MOST / 2 / (problem.rotated_GNR.shape[1] * problem.classes * len(problem.rotated_GNR))))
        ):
            batch = Batch(
                problem.rotated_GNR,
                problem.target,
                problem.sigmoid,
                self.strength_P[part],
                self.point_GAKP[..., part],
                shared if self.weight is None else self.weight[..., part],
                problem.offset,
                problem.free_intercept,
            )
            objective.append(batch.objective_GP)
            kkt.append(batch.gradient_GAKP.square().sum(dim=(1, 2)).sqrt())
        objective_GP, kkt_GP = torch.cat(objective, dim=-1).numpy(), torch.cat(kkt, dim=-1).numpy()
        coef_GPKD = torch.einsum("gdr,grkp->gpkd", problem.basis_GDR, self.point_GAKP[:, :-1])
        intercept_GPK = self.point_GAKP[:, -1].transpose(1, 2) - torch.einsum(
            "gpkd,gd->gpk", coef_GPKD, problem.mean_GD
        )
        if problem.free_intercept and not problem.sigmoid:
            intercept_GPK = intercept_GPK - intercept_GPK.mean(dim=2, keepdim=True)  # changes no probability
        return [
            Solutions(
                coef_GPKD[g].numpy(),
                intercept_GPK[g].numpy(),
                objective_GP[g],
                kkt_GP[g],
                self.iterations_GP[g].numpy(),
                self.flops,
            )
            for g in range(len(coef_GPKD))
        ]


def strengths_between(start: float, end: float) -> list[float]:
    """Strengths on the way from one to another, no more than a decade apart; without the ends.

    From far off, Newton's method goes in tiny steps: the curvature there says nothing of what is ahead. A path of
    strengths keeps each problem near the one before (Marteau-Ferey, Bach and Rudi 2019, "Globally convergent Newton
    methods for ill-conditioned generalized self-concordant losses").
    """
    steps = max(1, math.ceil(math.log(end / start, DECADE) - 1e-9))
    return [start * (end / start) ** (i / steps) for i in range(1, steps)]


def levels_of(strength_P: Tensor, reach: float = math.inf) -> list[Tensor]:
    """Every eighth strength in order, then those halfway between, and so on: 12, 12, 24, 48 of 96.

    reach: neighbours of the first level are at most this factor apart, where the strengths allow it.
    """
    order = strength_P.argsort()
    levels, seen = [], torch.zeros(len(order), dtype=torch.bool)
    place = strength_P[order].log()

    def far(stride: int) -> float:
        return float(torch.cat([place[::stride], place[-1:]]).diff().max())

    strides = [stride for stride in (8, 4, 2, 1) if stride == 1 or far(stride) <= math.log(reach) + 1e-9]
    for stride in strides:
        chosen = torch.zeros_like(seen)
        chosen[::stride] = True
        if stride == strides[0]:
            chosen[-1] = True  # the weakest penalty is nobody's neighbour from above
        fresh = chosen & ~seen
        if fresh.any():
            levels.append(order[fresh])
        seen |= chosen
    return levels
