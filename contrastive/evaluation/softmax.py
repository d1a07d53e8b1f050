"""L2-regularised softmax regression, solved to the optimum for many strengths, folds and seeds at once.

Shapes: G groups, each with features of its own (one; or one a seed), N samples, D features, R directions in which
they vary, A = R + 1 with the intercept, K classes, P problems of each group (strengths, folds).

Objective of each problem, as scikit-learn's `LogisticRegression`: C * sum of cross-entropies + 1/2 |W|^2, the
intercept free. What makes it quick, without moving the optimum:

- One product a batch: the weights of all problems stand side by side, (A, K P), so that the features are read once.
- Features are centred (the free intercept absorbs it) and rotated onto their principal directions, where the Hessian
  of the cross-entropy is nearly diagonal, at most 1/2 (I - 11'/K) x X'X (Böhning 1992, "Multinomial logistic
  regression algorithm"): one eigendecomposition makes it a preconditioner of every strength.
- Where few samples are still uncertain (weak penalties), X'X says little of the Hessian. So problems that need many
  iterations are rotated again, onto the directions of X' diag(p (1 - p)) X at the point reached.
- Strengths are solved coarse to fine: each starts between its neighbours of the coarser grid, in log C.
- The line search moves along logits that are there already: an iteration is two matrix products, whatever it tries.
- Problems that have converged leave the batch. Left in, their vanishing steps would poison it with 0/0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from contrastive.evaluation.softmax_work import MOST, PROMISE, Array, Solutions, Work, levels_of

__all__ = ["SoftmaxRegression", "Solutions"]


class SoftmaxRegression:
    """Problems on the same samples, or on G sets of N samples each; solve them for any strengths.

    features_GND: finite, (N, D) or (G, N, D). target: class numbers (N,) or (G, N); or, for independent sigmoids,
    0 and 1 as (N, K) or (G, N, K). classes: K; None for sigmoids.
    offset: logits (N, K) or (G, N, K) added to those of the features: a prior to start from.
    free_intercept: False penalises it as a weight, so that C -> 0 leaves the offset alone.
    sample_weight: of the cross-entropy of each sample, (N,), on one set of samples; of all problems.
    """

    def __init__(
        self,
        features_GND: NDArray[np.floating],
        target: NDArray[np.integer],
        classes: int | None = None,
        *,
        offset: NDArray[np.floating] | None = None,
        free_intercept: bool = True,
        sample_weight: NDArray[np.floating] | None = None,
    ) -> None:
        # writable, or torch warns of what we do not do
        features = torch.as_tensor(np.require(features_GND, requirements=("C", "W")), dtype=torch.float64)
        self.grouped = features.ndim == 3
        features_GND_ = features if self.grouped else features[None]
        self.target = torch.as_tensor(np.asarray(target), dtype=torch.int64)
        self.target = self.target if self.grouped else self.target[None]
        self.sigmoid = classes is None
        self.classes = self.target.shape[-1] if classes is None else classes
        self.free_intercept = free_intercept
        self.offset: Tensor | None = None
        if offset is not None:
            self.offset = torch.as_tensor(np.asarray(offset), dtype=torch.float64)
            self.offset = (self.offset if self.grouped else self.offset[None])[..., None]
        # A penalised intercept belongs to the features as they are.
        self.mean_GD = features_GND_.mean(dim=1) if free_intercept else torch.zeros_like(features_GND_[:, 0])
        self.weight_N: Tensor | None = None
        if sample_weight is not None:
            assert not self.grouped, "weights of samples that groups share"
            self.weight_N = torch.as_tensor(np.array(sample_weight, np.float64))
            if free_intercept:
                self.mean_GD = self.weight_N @ features_GND_ / self.weight_N.sum()
        centred = features_GND_ - self.mean_GD[:, None]
        weighted = centred if self.weight_N is None else centred * self.weight_N.sqrt()[:, None]
        # Eigenvectors of the smaller of X'X and XX'. Null directions are dropped: the optimum has no weight there.
        if centred.shape[2] <= centred.shape[1]:
            power_GR, basis_GDR = torch.linalg.eigh(weighted.transpose(1, 2) @ weighted)
        else:
            power_GR, left = torch.linalg.eigh(weighted @ weighted.transpose(1, 2))
            basis_GDR = (
                weighted.transpose(1, 2) @ left / power_GR.clamp_min(torch.finfo(torch.float64).tiny).sqrt()[:, None]
            )
        noise = max(centred.shape[1:]) * torch.finfo(torch.float64).eps
        kept = power_GR > power_GR.amax(dim=1, keepdim=True) * noise
        some = kept.any(dim=0)  # of all groups; a direction null in one of them has no power there
        self.power_GR = (power_GR * kept)[:, some]
        self.basis_GDR = (basis_GDR * kept[:, None])[:, :, some]
        self.rotated_GNR = centred @ self.basis_GDR

    def solve(
        self,
        strengths: Sequence[float],
        *,
        tolerance: float = 1e-8,
        max_iter: int = 10_000,
        weight: NDArray[np.floating] | None = None,
        start: tuple[Array, Array] | None = None,
        polish: bool = True,
        precondition: bool = True,
        coarse_to_fine: bool = True,
    ) -> Solutions | list[Solutions]:
        """The optimum of each of `strengths`; with G groups a list of G.

        tolerance: a problem is done when the norm of its gradient bounds what is left above the optimum by this share
        of the objective: |g|^2 / 2, as the penalty alone has curvature 1.
        weight: of the samples, (N, P) or (G, N, P), 0 leaves one out (a fold).
        start: `(coef (K, D), intercept (K,))` to start all of them from.
        Problems on one set of features, unweighted, are followed by Newton's method (`newton`); folds and groups go
        side by side through L-BFGS, to which alone `polish` matters.
        polish: go on in float64 when float32 is done. Without, a gap below 1e-6 is not promised.
        precondition, coarse_to_fine: False for comparison.
        """
        strength_P = torch.as_tensor([float(c) for c in strengths], dtype=torch.float64)
        alone = weight is None and precondition and not self.grouped
        if self.weight_N is not None and not alone:  # side by side, each problem has its own
            own = self.weight_N.numpy()[:, None]
            weight = np.broadcast_to(own, (len(own), len(strengths))) if weight is None else own * weight
        work = Work(self, strength_P, weight, precondition)
        if start is not None:
            work.start_from(*(torch.as_tensor(np.asarray(part), dtype=torch.float64) for part in start))
        if alone:
            work.follow(tolerance, max_iter, coarse_to_fine, started=start is not None, polish=polish)
            return work.solutions()[0]
        precisions = (torch.float32, torch.float64) if polish else (torch.float32,)
        for dtype in precisions:
            rough = dtype == torch.float32
            promise = PROMISE if rough else 0.0
            levels = (
                levels_of(strength_P)
                if rough and coarse_to_fine and weight is None
                else [torch.arange(len(strength_P))]
            )
            done: list[int] = []
            for level in levels:
                if done and start is None:
                    work.interpolate(level, torch.as_tensor(done))
                width = max(1, int(MOST / (self.rotated_GNR.shape[1] * self.classes * len(self.rotated_GNR))))
                for part in level.split(width):
                    work.run(part, tolerance, promise, max_iter, dtype)
                done += level.tolist()
        found = work.solutions()
        return found if self.grouped else found[0]
