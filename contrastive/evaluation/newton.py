"""One regression after another along a path of strengths, by Newton's method with preconditioned conjugate gradients.

Shapes as in `softmax`: N samples, A = R + 1 with the intercept last, K classes.

For weak penalties L-BFGS needs thousands of iterations on features whose directions differ much in power. Newton's
method asks for H^-1 g instead, which conjugate gradients give within a dozen products when they are preconditioned
well: by the whole Hessian of an earlier point where it is small, else by its diagonal blocks, one a class,
X' diag(p_k (1 - p_k)) X, both on the samples that most of the uncertainty rests on. They change little from one
strength to the next, and are made anew only when the number of products says so. Nocedal and Wright, "Numerical
optimization", 2006, section 7.1; Lin, Weng and Keerthi, "Trust region Newton method for large-scale logistic
regression", JMLR 2008.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive.evaluation.lbfgs import Batch

PRODUCTS = 200  # Hessian products of one Newton step, at most
FORCING = 0.03  # how far the residual of a Newton step's linear system is brought down
STALE = 25  # products of a step beyond which the blocks are made anew
ROWS = 3  # samples that blocks rest on, as a multiple of the directions
WHOLE = 3000  # K A, up to which the whole Hessian is factored, 36 MB
LARGEST = 6e7  # numbers in all blocks (240 MB): beyond it one block serves all classes
HALVINGS = 30
ROUNDING = 1e-8  # of the objective, below which a step may fail: it was worked out in float32
RIDGE = 1e-7


@dataclass
class Path:
    """What one strength leaves to the next."""

    curvature: Curvature | None = None
    stale: bool = True


@dataclass(frozen=True)
class Curvature:
    """The Hessian at some point, without strength and penalty.

    blocks: (K, A, A), one a class; (1, A, A), one for all; or, `whole`, (1, K A, K A), class by class.
    """

    blocks: Tensor
    whole: bool
    flops: float

    def factor(self, strength: float, directions: int, free_intercept: bool) -> Tensor:
        """Cholesky factors of the blocks with strength and penalty."""
        ridge = RIDGE
        while True:
            penalised = self.blocks * strength
            diagonal = penalised.diagonal(dim1=1, dim2=2)
            diagonal += ridge * diagonal.amax(dim=1, keepdim=True) + 1e-12
            diagonal.unflatten(1, (-1, directions))[..., : directions - free_intercept] += 1
            factor, failed = torch.linalg.cholesky_ex(penalised)
            if not failed.any():
                return factor
            if ridge > 1:
                raise ArithmeticError(f"the Hessian at strength {strength:g} is not a number; scale the features")
            ridge *= 10  # rounding ate a direction that next to nothing depends on

    def solve(self, factor: Tensor, rest_AK: Tensor) -> Tensor:
        if self.whole:
            rest = rest_AK.T.reshape(1, -1, 1)
        else:
            rest = rest_AK[None] if len(factor) == 1 else rest_AK.T[..., None]
        # twenty times as fast as `cholesky_solve`, which copies the factor
        half = torch.linalg.solve_triangular(factor, rest, upper=False)
        solved = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        if self.whole:
            return solved.view(rest_AK.T.shape).T
        return solved[0] if len(factor) == 1 else solved[..., 0].T


def newton(batch: Batch, path: Path, tolerance: float, max_iter: int) -> tuple[int, bool]:
    """Move the one problem of `batch`, in float64, to its optimum; `(products and gradients, done)`.

    The last step is the one from where g' H^-1 g / 2, which is what is left above the optimum once the objective is as
    good as quadratic, is below `tolerance` of the objective; or from where rounding lets no step go down, which is done
    only if that was to be expected so near the optimum.
    """
    features_NR, strength = batch.features[0].float(), float(batch.strength[0])
    directions = features_NR.shape[1] + 1
    count, factor = 0, None
    while count < max_iter:
        chance_NK, spread_NK = _chances(batch)
        if path.stale or path.curvature is None:
            path.curvature, path.stale = _curvature(batch, features_NR, chance_NK, spread_NK), False
            batch.flops += path.curvature.flops
            factor = None
        if factor is None:
            factor = path.curvature.factor(strength, directions, batch.free_intercept)
        direction_AK, products = _conjugate(batch, features_NR, chance_NK, spread_NK, path.curvature, factor)
        batch.flops += 4.0 * features_NR.numel() * chance_NK.shape[1] * products
        path.stale = products > STALE
        count += products + 1
        direction = direction_AK.double()
        slope = float((batch.gradient_GAKP[0, :, :, 0] * direction).sum())
        last = -slope / 2 <= tolerance * float(batch.objective_GP)  # the step is there: it is taken all the same
        if not _step(batch, direction[None, :, :, None], slope):
            return count, last or -slope / 2 <= ROUNDING * float(batch.objective_GP)
        if last:
            return count, True
    return count, False


def _chances(batch: Batch) -> tuple[Tensor, Tensor]:
    """p, and p (1 - p) times the sample's weight, in float32.

    1 - p is computed in float64: in float32 it is 0 for a sure sample.
    """
    logits_NK = batch.logits[0, :, :, 0]
    chance_NK = torch.sigmoid(logits_NK) if batch.sigmoid else torch.softmax(logits_NK, dim=1)
    spread_NK = chance_NK * (1 - chance_NK)
    if batch.weight is not None:
        spread_NK *= batch.weight[0, :, :, 0]
    return chance_NK.float(), spread_NK.float()


def _curvature(batch: Batch, features_NR: Tensor, chance_NK: Tensor, weight_NK: Tensor) -> Curvature:
    """From the samples that are least certain, scaled to stand for all."""
    weight_N = weight_NK.sum(dim=1)
    directions, classes = features_NR.shape[1] + 1, chance_NK.shape[1]
    rows = min(len(weight_N), max(2000, ROWS * directions))
    chosen = weight_N.topk(rows).indices
    scale = weight_N.sum() / weight_N[chosen].sum().clamp_min(1e-30)
    chance_NK, weight_NK = chance_NK[chosen], weight_NK[chosen] * scale
    if batch.weight is not None:
        scale = scale * batch.weight[0, chosen, 0, 0].float()
    whole_NA = torch.nn.functional.pad(features_NR[chosen], (0, 1), value=1.0)
    flops = 2.0 * rows * directions**2

    def gram(weight_N: Tensor) -> Tensor:
        return (whole_NA * weight_N[:, None]).T @ whole_NA

    if not batch.sigmoid and classes * directions <= WHOLE:
        whole = whole_NA.new_empty(classes, directions, classes, directions)
        for k in range(classes):
            for other in range(k):
                whole[k, :, other] = whole[other, :, k] = -gram(scale * chance_NK[:, k] * chance_NK[:, other])
            whole[k, :, k] = gram(weight_NK[:, k])
        # The same number added to all classes has no curvature; it gets some, which says nothing of balanced steps.
        whole += (gram(weight_NK.mean(dim=1)) / classes)[None, :, None]
        return Curvature(whole.view(1, classes * directions, -1), True, flops * classes * (classes + 1) / 2)
    if classes * directions**2 > LARGEST:
        return Curvature(gram(weight_NK.mean(dim=1))[None], False, flops)
    return Curvature(torch.stack([gram(weight_NK[:, k]) for k in range(classes)]), False, flops * classes)


def _conjugate(
    batch: Batch, features_NR: Tensor, chance_NK: Tensor, spread_NK: Tensor, curvature: Curvature, factor: Tensor
) -> tuple[Tensor, int]:
    """-H^-1 g but for a share of `FORCING`, (A, K), in float32; and how many products of H it took."""
    strength, top_N1 = float(batch.strength[0]), chance_NK.argmax(dim=1, keepdim=True)
    weight_N1 = None if batch.weight is None else batch.weight[0, :, :, 0].float()  # sigmoids have it in the spread

    def product(step_AK: Tensor) -> Tensor:
        logits_NK = features_NR @ step_AK[:-1] + step_AK[-1]
        if batch.sigmoid:
            logits_NK *= spread_NK
        else:
            logits_NK -= logits_NK.gather(1, top_N1)  # else a sure sample's own logit drowns in rounding
            logits_NK = chance_NK * (logits_NK - (chance_NK * logits_NK).sum(dim=1, keepdim=True))
            if weight_N1 is not None:
                logits_NK *= weight_N1
        result = torch.empty_like(step_AK)
        torch.mm(features_NR.T, logits_NK, out=result[:-1])
        result[-1] = logits_NK.sum(dim=0)
        result *= strength
        result[: batch.penalised] += step_AK[: batch.penalised]
        return result

    def balanced(step_AK: Tensor) -> Tensor:
        """The same number added to all classes changes no probability: H is not to be asked about it."""
        return step_AK if batch.sigmoid else step_AK - step_AK.mean(dim=1, keepdim=True)

    rest = balanced(-batch.gradient_GAKP[0, :, :, 0].float())
    result = torch.zeros_like(rest)
    direction = solved = balanced(curvature.solve(factor, rest))
    size = first = float((rest * solved).sum(dtype=torch.float64))
    products = 0
    while products < PRODUCTS and size > FORCING**2 * first:
        ahead = product(direction)
        products += 1
        bend = float((direction * ahead).sum(dtype=torch.float64))
        if bend <= 0:  # rounding
            break
        result += size / bend * direction
        rest -= size / bend * ahead
        solved = balanced(curvature.solve(factor, rest))
        last, size = size, float((rest * solved).sum(dtype=torch.float64))
        direction = solved + (size / last) * direction
    return result, products


def _step(batch: Batch, direction: Tensor, slope: float) -> bool:
    """Go along `direction`, halving until the objective goes down as Armijo asks; False where rounding forbids it."""
    along = batch.multiply(direction)
    before, length = float(batch.objective_GP), 1.0
    point, logits = batch.point_GAKP, batch.logits
    for _ in range(HALVINGS):
        batch.point_GAKP = point + length * direction
        batch.logits = logits + length * along
        residual, loss = batch.residual(batch.logits)
        batch.objective_GP = batch.total(loss)
        if float(batch.objective_GP) <= before + 1e-4 * length * slope:
            batch.gradient_GAKP = batch.gradient(residual)
            return True
        length /= 2
    batch.point_GAKP, batch.logits = point, logits
    residual, loss = batch.residual(logits)
    batch.objective_GP, batch.gradient_GAKP = batch.total(loss), batch.gradient(residual)
    return False
