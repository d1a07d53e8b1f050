"""Many regressions minimised side by side by L-BFGS. Shapes as in `softmax`: G, N, A = R + 1, K, P.

The problem axis is the last one, so that every reduction over classes runs along contiguous problems.
"""

from __future__ import annotations

import torch
from torch import Tensor

MEMORY = 10  # pairs of (step, change of gradient) that a problem remembers
TRIES = 12  # of a line search
REFRESH = 25  # iterations after which logits are multiplied out again: float32 sums drift


class Batch:
    """P problems of each group at their current points: logits, objective, gradient.

    features_GNR: rotated. target: class numbers (G, N), or 0/1 (G, N, K) when `sigmoid`.
    weight: (G, N, 1, P) or None. offset: logits (G, N, K, 1) or None.
    """

    def __init__(
        self,
        features_GNR: Tensor,
        target: Tensor,
        sigmoid: bool,
        strength_P: Tensor,
        point_GAKP: Tensor,
        weight: Tensor | None = None,
        offset: Tensor | None = None,
        free_intercept: bool = True,
    ) -> None:
        self.features, self.sigmoid, self.offset = features_GNR, sigmoid, offset
        self.strength, self.point_GAKP, self.weight = strength_P, point_GAKP, weight
        self.free_intercept = free_intercept
        # +1 and -1 for sigmoids; for softmax where the own class is, and its number
        self.sign = (2 * target - 1)[..., None].to(features_GNR.dtype) if sigmoid else None
        self.target = None if sigmoid else target[:, :, None, None]
        self.flops = 0.0
        self.logits = self.multiply(point_GAKP)
        if offset is not None:
            self.logits += offset
        residual, loss = self.residual(self.logits)
        self.objective_GP = self.total(loss)
        self.gradient_GAKP = self.gradient(residual)

    def multiply(self, point_GAKP: Tensor) -> Tensor:
        """Logits (G, N, K, P) of weights (G, A, K, P)."""
        groups, _, classes, problems = point_GAKP.shape
        self.flops += 2.0 * self.features.numel() * classes * problems
        flat = point_GAKP.reshape(groups, -1, classes * problems)
        product = torch.matmul(self.features, flat[:, :-1])
        product += flat[:, -1:]
        return product.view(groups, -1, classes, problems)

    def gradient(self, residual_GNKP: Tensor) -> Tensor:
        groups, _, classes, problems = residual_GNKP.shape
        self.flops += 2.0 * self.features.numel() * classes * problems
        flat = residual_GNKP.reshape(groups, -1, classes * problems)
        result = torch.empty_like(self.point_GAKP)
        torch.matmul(
            self.features.transpose(1, 2),
            flat,
            out=(out := flat.new_empty(groups, self.features.shape[2], flat.shape[2])),
        )
        result[:, :-1] = out.view(groups, -1, classes, problems)
        result[:, -1] = residual_GNKP.sum(dim=1)
        result *= self.strength
        result[:, : self.penalised] += self.point_GAKP[:, : self.penalised]
        return result

    @property
    def penalised(self) -> int:
        return self.point_GAKP.shape[1] - self.free_intercept

    def total(self, loss_GNP: Tensor) -> Tensor:
        penalty = self.point_GAKP[:, : self.penalised].double().square().sum(dim=(1, 2)) / 2
        return self.strength.double() * loss_GNP.sum(dim=1, dtype=torch.float64) + penalty

    def residual(self, logits_GNKP: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Probability minus target (G, N, K, P), and cross-entropy (G, N, P), both weighted.

        The residual of the own class is minus the sum of the others': p - 1 would round to 0 in float32 as soon as p
        is within 6e-8 of 1, and with it the last of the gradient on separable samples. The loss likewise.
        """
        if self.sign is not None:
            margin = logits_GNKP * self.sign
            residual = torch.sigmoid(-margin).mul_(self.sign).neg_()
            loss = torch.nn.functional.softplus(-margin).sum(dim=2)
        else:
            assert self.target is not None
            index = self.target.expand(-1, -1, 1, logits_GNKP.shape[-1])
            residual = logits_GNKP - logits_GNKP.gather(2, index)
            residual.scatter_(2, index, -torch.inf)
            top = residual.amax(dim=2, keepdim=True).clamp_min_(0)
            residual.sub_(top).exp_()
            others = residual.sum(dim=2, keepdim=True)
            whole = others + torch.exp(-top)
            loss = (top + torch.where(top > 0, whole.log(), others.log1p()))[:, :, 0]
            residual.div_(whole)
            residual.scatter_(2, index, -others / whole)
        if self.weight is not None:
            weight = self.weight if columns is None else self.weight[..., columns]
            residual *= weight
            loss = loss * weight[:, :, 0]
        return residual, loss

    def keep(self, columns: Tensor) -> None:
        """Leave only these problems."""
        for name in ("strength", "point_GAKP", "weight", "logits", "objective_GP", "gradient_GAKP"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[..., columns].contiguous())


def minimise(
    batch: Batch, power_GR: Tensor | None, tolerance: float, max_iter: int, promise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Move the problems of `batch` towards their optimum; `(iterations (G, P), done (P,))`. The batch keeps all.

    power_GR: sum of squares along each direction, for the diagonal preconditioner; None goes without.
    A problem is done when |g|^2 / 2, a bound of what is left above the optimum as the penalty's curvature is 1, is
    below `tolerance` of its objective; or the decrease that its quasi-Newton step promises, g' H g / 2, is below
    `promise` of it, which is sooner and may be a thousand times too hopeful; or rounding lets no step go down.
    The unpenalised intercept enters the bound with its own curvature, by the preconditioner.
    """
    groups, _, _, problems = batch.point_GAKP.shape
    dtype = batch.point_GAKP.dtype
    final = batch.point_GAKP.clone()
    count_GP = torch.zeros(groups, problems, dtype=torch.int64)
    done_P = torch.zeros(problems, dtype=torch.bool)
    ids = torch.arange(problems)
    scale = _preconditioner(batch, power_GR)
    steps: list[Tensor] = []
    changes: list[Tensor] = []
    inverse: list[Tensor] = []  # 1 / (step . change), 0 where the pair says nothing
    failed_GP = torch.zeros(groups, problems, dtype=torch.int64)
    for iteration in range(max_iter):
        direction = _direction(batch.gradient_GAKP, scale, steps, changes, inverse)
        slope_GP = _dot(batch.gradient_GAKP, direction)
        objective_GP = batch.objective_GP.to(dtype)
        gradient, penalised = batch.gradient_GAKP, batch.penalised
        left_GP = gradient[:, :penalised].square().sum(dim=(1, 2))
        left_GP += (gradient[:, penalised:].square() * scale[:, penalised:]).sum(dim=(1, 2))
        finished_GP = (left_GP / 2 <= tolerance * objective_GP) | (failed_GP > 1)
        finished_GP |= -slope_GP / 2 <= promise * objective_GP
        finished_P = finished_GP.all(dim=0)
        if finished_P.any():
            final[..., ids[finished_P]] = batch.point_GAKP[..., finished_P]
            done_P[ids[finished_P]] = True
            stay = torch.nonzero(~finished_P)[:, 0]
            if not len(stay):
                break
            ids, scale, failed_GP = ids[stay], scale[..., stay], failed_GP[..., stay]
            batch.keep(stay)
            steps, changes, inverse = (
                [part[..., stay].contiguous() for part in parts] for parts in (steps, changes, inverse)
            )
            direction, slope_GP, finished_GP = direction[..., stay], slope_GP[..., stay], finished_GP[..., stay]
        count_GP[:, ids] += ~finished_GP
        along = batch.multiply(direction)
        step_GP, residual, loss = _line_search(batch, direction, along, slope_GP)
        step_GP = torch.where(finished_GP, 0.0, step_GP)
        failed_GP = torch.where(step_GP == 0, failed_GP + 1, 0)
        step = direction * step_GP[:, None, None]
        batch.point_GAKP = batch.point_GAKP + step
        if iteration % REFRESH == REFRESH - 1 or bool((step_GP == 0).any()):
            batch.logits = batch.multiply(batch.point_GAKP)
            if batch.offset is not None:
                batch.logits += batch.offset
            residual, loss = batch.residual(batch.logits)
        else:
            batch.logits += along.mul_(step_GP[:, None, None])
        batch.objective_GP = batch.total(loss)
        gradient = batch.gradient(residual)
        change = gradient - batch.gradient_GAKP
        batch.gradient_GAKP = gradient
        product = _dot(step, change)
        size = (_dot(step, step) * _dot(change, change)).sqrt()
        steps.append(step)
        changes.append(change)
        inverse.append(torch.where(product > 1e-7 * size, 1 / product, 0.0))
        if bool((failed_GP > 0).any()):  # start afresh from steepest descent there
            inverse = [torch.where(failed_GP > 0, 0.0, part) for part in inverse]
        if len(steps) > MEMORY:
            del steps[0], changes[0], inverse[0]
    final[..., ids] = batch.point_GAKP
    batch.point_GAKP = final
    return count_GP, done_P


def _preconditioner(batch: Batch, power_GR: Tensor | None) -> Tensor:
    """The inverse of the Hessian's diagonal: strength * mean p (1 - p) * power + penalty, (G, A, 1, P)."""
    groups, directions, _, problems = batch.point_GAKP.shape
    if power_GR is None:  # one number: a bound of the Hessian, so that the first step is not absurd
        bound_GP = 1 + batch.strength * batch.features.square().sum(dim=(1, 2))[:, None] / 2
        return (1 / bound_GP)[:, None, None].expand(groups, directions, 1, problems).contiguous()
    chance = torch.sigmoid(batch.logits) if batch.sigmoid else torch.softmax(batch.logits, dim=2)
    curvature_GP = (chance * (1 - chance)).mean(dim=(1, 2)).clamp_min(1e-6)
    samples = torch.full((groups, 1), float(batch.features.shape[1]))
    if batch.weight is not None and batch.weight.shape[-1] == 1:
        samples = batch.weight.sum(dim=1)[:, :, 0]
    power = torch.cat([power_GR, samples], dim=1).to(curvature_GP.dtype)[:, :, None, None]
    diagonal = (batch.strength * curvature_GP)[:, None, None] * power
    diagonal[:, : batch.penalised] += 1
    return 1 / diagonal


def _direction(
    gradient: Tensor, scale: Tensor, steps: list[Tensor], changes: list[Tensor], inverse: list[Tensor]
) -> Tensor:
    """The two-loop recursion (Nocedal and Wright, algorithm 7.4), all problems at once."""
    rest = gradient.clone()
    shares = []
    for step, change, rho in zip(reversed(steps), reversed(changes), reversed(inverse), strict=True):
        share = rho * _dot(step, rest)
        rest -= share[:, None, None] * change
        shares.append(share)
    result = rest * scale
    if steps:
        scaled = _dot(changes[-1], changes[-1] * scale)
        known = (inverse[-1] > 0) & (scaled > 0)
        result *= torch.where(known, 1 / (inverse[-1] * scaled), 1.0)[:, None, None]
    for step, change, rho, share in zip(steps, changes, inverse, reversed(shares), strict=True):
        result += (share - rho * _dot(change, result))[:, None, None] * step
    return result.neg_()


def _line_search(batch: Batch, direction: Tensor, along: Tensor, slope_GP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step lengths, and residual and loss there; 0 where no try goes down.

    Only slopes are looked at: differences of objectives drown in rounding. Accepted is a slope from 0.9 of the first
    one to 0.5 of its opposite, the approximate Wolfe conditions of Hager and Zhang 2005.
    """
    low, low_slope = torch.zeros_like(slope_GP), slope_GP.clone()
    high, high_slope = torch.full_like(slope_GP, torch.inf), torch.zeros_like(slope_GP)
    step = torch.ones_like(slope_GP)
    penalised = batch.penalised
    first = _dot(batch.point_GAKP[:, :penalised], direction[:, :penalised])
    second = _dot(direction[:, :penalised], direction[:, :penalised])
    residual = loss = torch.empty(0)
    pending = torch.arange(slope_GP.shape[1])
    accepted = torch.zeros_like(slope_GP, dtype=torch.bool)
    for attempt in range(TRIES):
        whole = attempt == 0
        tried = (
            batch.logits + along * step[:, None, None]
            if whole
            else (batch.logits[..., pending] + along[..., pending] * step[:, None, None, pending])
        )
        here, here_loss = batch.residual(tried, None if whole else pending)
        ahead = along if whole else along[..., pending]
        slope = batch.strength[pending] * (here * ahead).sum(dim=(1, 2))
        slope = slope + first[:, pending] + step[:, pending] * second[:, pending]
        if whole:
            residual, loss = here, here_loss
        else:
            residual[..., pending], loss[..., pending] = here, here_loss
        size = slope_GP[:, pending].abs()
        good = (slope >= -0.9 * size) & (slope <= 0.5 * size)
        accepted[:, pending] |= good
        down = slope < 0
        low[:, pending] = torch.where(down, step[:, pending], low[:, pending])
        low_slope[:, pending] = torch.where(down, slope, low_slope[:, pending])
        high[:, pending] = torch.where(down, high[:, pending], step[:, pending])
        high_slope[:, pending] = torch.where(down, high_slope[:, pending], slope)
        pending = torch.nonzero(~accepted.all(dim=0))[:, 0]
        if not len(pending):
            break
        between = low + (high - low) * (low_slope / (low_slope - high_slope)).nan_to_num(0.5).clamp(0.1, 0.9)
        step = torch.where(accepted, step, torch.where(high.isinf(), step * 3, between))
    return torch.where(accepted, step, 0.0), residual, loss


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=(1, 2))
