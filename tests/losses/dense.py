"""Oracles in float64, written from the formulas and not from our code: loops over pairs, and the same on matrices.

An oracle takes `(image, text, scale, bias, ids, **options)` of the whole batch on one process, ids `(n,)` or `(n, 2)`.
It knows nothing of rows that are not valid: it is given the others alone. The loops serve small batches; the matrices
serve large ones, and test_dense.py holds them to the loops.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- loops over pairs


def infonce_loops(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor,
    same_caption: str = "negative", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    rows, total = range(len(image)), image.new_zeros(())
    for queries, keys in ((image, text), (text, image)):
        for i in rows:
            columns = [i, *_negatives(i, ids, same_caption)]
            positives = [j for j in rows if _same(ids, i, j)] if same_caption == "positive" else [i]
            exps = {j: torch.exp(scale * queries[i].dot(keys[j])) for j in columns}
            denominator = sum(exps.values())
            for j in columns:
                weight = label_smoothing / len(columns)
                if j in positives:
                    weight += (1 - label_smoothing) / len(positives)
                total = total - weight * torch.log(exps[j] / denominator)
    return total / (2 * max(len(image), 1))


def dcl_loops(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor, same_caption: str = "negative"
) -> Tensor:
    total = image.new_zeros(())
    for queries, keys in ((image, text), (text, image)):
        for i in range(len(image)):
            exps = [torch.exp(scale * queries[i].dot(keys[j])) for j in _negatives(i, ids, same_caption)]
            if exps:
                total = total - scale * image[i].dot(text[i]) + torch.log(sum(exps))
    return total / (2 * max(len(image), 1))


def siglip_loops(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, ids: Tensor, same_caption: str = "negative"
) -> Tensor:
    total = image.new_zeros(())
    for i in range(len(image)):
        for j in range(len(text)):
            same = i != j and _same(ids, i, j)
            if same and same_caption == "ignore":
                continue
            z = 1 if i == j or (same and same_caption == "positive") else -1
            x = -z * (scale * image[i].dot(text[j]) + bias)
            total = total + torch.clamp(x, min=0) + torch.log1p(torch.exp(-x.abs()))
    return total / max(len(image), 1)


def margin_loops(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor,
    same_caption: str = "negative", margin: float = 0.2, negatives: str = "sum", hardness: float = 1.0,
    adaptive: float = 0.0,
) -> Tensor:  # fmt: skip
    total = image.new_zeros(())
    for queries, keys in ((image, text), (text, image)):
        direction, found = image.new_zeros(()), 0
        for i in range(len(image)):
            own, terms = image[i].dot(text[i]), []
            for j in _negatives(i, ids, same_caption):
                other = queries[i].dot(keys[j])
                alike = max(0.0, float(text[i].detach().dot(text[j].detach())))
                hinge = torch.clamp(margin * (1 - adaptive * alike) - own + other, min=0)
                if negatives != "semi-hard" or (other < own and hinge > 0):
                    terms.append(hinge)
            found += len(terms)
            if terms and negatives == "hardest":
                direction = direction + hardness * torch.stack(terms).max() + (1 - hardness) * sum(terms)
            elif terms:
                direction = direction + sum(terms)
        total = total + direction / max(found if negatives == "semi-hard" else len(image), 1)
    return total


def cyclip_loops(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor,
    in_modal: float = 0.25, cross_modal: float = 0.25,
) -> Tensor:  # fmt: skip
    total = image.new_zeros(())
    for i in range(len(image)):
        for j in range(len(image)):
            total = total + in_modal * (image[i].dot(image[j]) - text[i].dot(text[j])) ** 2
            total = total + cross_modal * (image[i].dot(text[j]) - image[j].dot(text[i])) ** 2
    return total / max(len(image), 1)


def sogclr_loops(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor,
    log_u: Tensor, same_caption: str = "negative", gamma: float = 0.9, epsilon: float = 1e-14,
    rho: float | None = None,
) -> Tensor:  # fmt: skip
    """Its value is the objective, tau (log(epsilon + u) + rho); its gradient the estimator, that of
    tau g / (epsilon + u) with tau and u held still in front, and of the objective's own tau if rho is given."""
    learned, t = scale, scale if rho is not None else scale.detach()
    total = image.new_zeros(())
    for direction, (queries, keys) in enumerate(((image, text), (text, image))):
        for i in range(len(image)):
            own = image[i].dot(text[i])
            terms = [torch.exp(t * (queries[i].dot(keys[j]) - own)) for j in _negatives(i, ids, same_caption)]
            if not terms:
                continue
            g = sum(terms) / len(terms)
            old = torch.exp(log_u[i, direction].to(g.dtype))
            u = g.detach() if old == 0 else (1 - gamma) * old + gamma * g.detach()
            estimator = g / (epsilon + u) / t.detach()
            total = total + (torch.log(epsilon + u) + (rho or 0)) / t + estimator - estimator.detach()
    return total / (2 * max(len(image), 1)) + 0 * learned


def distillation_loops(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor,
    teacher_image: Tensor, teacher_text: Tensor, teacher_scale: float = 100.0,
) -> Tensor:  # fmt: skip
    rows, total = range(len(image)), image.new_zeros(())
    blocks = ((image, text, teacher_image, teacher_text), (text, image, teacher_text, teacher_image))
    for queries, keys, teacher_queries, teacher_keys in blocks:
        for i in rows:
            student = [torch.exp(scale * queries[i].dot(keys[j])) for j in rows]
            teacher = [torch.exp(teacher_scale * teacher_queries[i].dot(teacher_keys[j])) for j in rows]
            for j in rows:
                total = total - teacher[j] / sum(teacher) * torch.log(student[j] / sum(student))
    return total / (2 * max(len(image), 1))


def accuracy_loops(image: Tensor, text: Tensor, ids: Tensor, same_caption: str = "negative") -> float:
    """The share of images strictly more similar to their caption than to any that is another thing."""
    right, image, text = 0, image.detach(), text.detach()
    for i in range(len(image)):
        same = [j for j in range(len(image)) if j == i or (same_caption == "positive" and _same(ids, i, j))]
        others = [j for j in _negatives(i, ids, same_caption) if j not in same]
        best = max(float(image[i].dot(text[j])) for j in same)
        right += all(best > float(image[i].dot(text[j])) for j in others)
    return right / max(len(image), 1)


def _same(ids: Tensor, i: int, j: int) -> bool:
    """An equal id; of ids `(n, 2)`, an equal caption or an equal image."""
    return bool((ids[i] == ids[j]).any())


def _negatives(i: int, ids: Tensor, same_caption: str) -> list[int]:
    return [j for j in range(len(ids)) if j != i and not (same_caption == "ignore" and _same(ids, i, j))]


# ---- the same on B x B matrices


def infonce_matrix(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor,
    same_caption: str = "negative", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    same, own = _same_matrix(ids), torch.eye(len(ids), dtype=torch.bool)
    part = ~same | own if same_caption == "ignore" else torch.ones_like(own)
    positive = same if same_caption == "positive" else own
    shares = [x.to(image.dtype) / x.sum(1, keepdim=True) for x in (positive, part)]
    target = (1 - label_smoothing) * shares[0] + label_smoothing * shares[1]
    logits, total = scale * image @ text.T, image.new_zeros(())
    for one_way in (logits, logits.T):
        log_share = one_way.masked_fill(~part, -torch.inf).log_softmax(1).masked_fill(~part, 0)
        total = total - (target * log_share).sum()
    return total / (2 * len(ids))


def dcl_matrix(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor, same_caption: str = "negative"
) -> Tensor:
    negative = _negative_matrix(ids, same_caption)
    logits, total = scale * image @ text.T, image.new_zeros(())
    for one_way in (logits, logits.T):
        log_sums = one_way.masked_fill(~negative, -torch.inf).logsumexp(1)
        total = total + (log_sums - logits.diagonal())[negative.any(1)].sum()
    return total / (2 * len(ids))


def siglip_matrix(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, ids: Tensor, same_caption: str = "negative"
) -> Tensor:
    same, own = _same_matrix(ids), torch.eye(len(ids), dtype=torch.bool)
    z = torch.where(same if same_caption == "positive" else own, 1.0, -1.0)
    terms = -F.logsigmoid(z * (scale * image @ text.T + bias))
    return terms[~same | own if same_caption == "ignore" else torch.ones_like(own)].sum() / len(ids)


def margin_matrix(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor,
    same_caption: str = "negative", margin: float = 0.2, negatives: str = "sum", hardness: float = 1.0,
    adaptive: float = 0.0,
) -> Tensor:  # fmt: skip
    total = image.new_zeros(())
    for lead, room in _leads(image, text, ids, same_caption, margin, adaptive):
        hinge = (room - lead).clamp(min=0)
        if negatives == "semi-hard":
            counted = hinge[(lead > 0) & (hinge > 0)]
            total = total + counted.sum() / max(len(counted), 1)
        elif negatives == "hardest":
            total = total + (hardness * hinge.amax(1) + (1 - hardness) * hinge.sum(1)).sum() / len(ids)
        else:
            total = total + hinge.sum() / len(ids)
    return total


def margin_gap(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor,
    same_caption: str = "negative", margin: float = 0.2, negatives: str = "sum", hardness: float = 1.0,
    adaptive: float = 0.0,
) -> float:  # fmt: skip
    """How near the batch is to a place where the margin loss bends: by how much similarities may be off."""
    gaps: list[Tensor] = []
    image, text = image.detach(), text.detach()
    for lead, room in _leads(image, text, ids, same_caption, margin, adaptive):
        hinge = (room - lead).clamp(min=0)
        gaps.append((room - lead).abs().min())
        if negatives == "semi-hard":
            gaps.append(lead.abs().min())
        if negatives == "hardest":
            largest = hinge.topk(2, dim=1).values
            gaps.append((largest[:, 0] - largest[:, 1])[largest[:, 0] > 0].min())
    return float(min(gaps))


def _leads(
    image: Tensor, text: Tensor, ids: Tensor, same_caption: str, margin: float, adaptive: float
) -> list[tuple[Tensor, Tensor]]:
    """For both directions, by how much partners are ahead of each negative, and by how much they should be."""
    negative, similarity = _negative_matrix(ids, same_caption), image @ text.T
    room = margin * (1 - adaptive * (text @ text.T).detach().clamp(min=0))
    own = similarity.diagonal()[:, None]
    return [(own - one_way.masked_fill(~negative, -torch.inf), room) for one_way in (similarity, similarity.T)]


def cyclip_matrix(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor,
    in_modal: float = 0.25, cross_modal: float = 0.25,
) -> Tensor:  # fmt: skip
    across = image @ text.T
    inside = (image @ image.T - text @ text.T).square().sum()
    return (in_modal * inside + cross_modal * (across - across.T).square().sum()) / len(image)


def sogclr_matrix(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor,
    log_u: Tensor, same_caption: str = "negative", gamma: float = 0.9, epsilon: float = 1e-14,
    rho: float | None = None,
) -> Tensor:  # fmt: skip
    learned, t = scale, scale if rho is not None else scale.detach()
    negative, similarity = _negative_matrix(ids, same_caption), image @ text.T
    counted, own = negative.any(1), similarity.diagonal()[:, None]
    total = image.new_zeros(())
    for one_way, old in zip((similarity, similarity.T), log_u.double().exp().T, strict=True):
        g = ((t * (one_way - own)).exp() * negative).sum(1) / negative.sum(1).clamp(min=1)
        u = torch.where(old == 0, g.detach(), (1 - gamma) * old + gamma * g.detach())
        estimator = g / (epsilon + u) / t.detach()
        value = ((epsilon + u).log() + (rho or 0)) / t
        total = total + (value + estimator - estimator.detach())[counted].sum()
    return total / (2 * len(ids)) + 0 * learned


def distillation_matrix(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor,
    teacher_image: Tensor, teacher_text: Tensor, teacher_scale: float = 100.0,
) -> Tensor:  # fmt: skip
    student, teacher = scale * image @ text.T, teacher_scale * teacher_image @ teacher_text.T
    ways = ((student, teacher), (student.T, teacher.T))
    return sum(F.cross_entropy(ours, theirs.softmax(1)) for ours, theirs in ways) / 2


def _same_matrix(ids: Tensor) -> Tensor:
    ids = ids.reshape(len(ids), -1)
    return (ids[:, None] == ids[None, :]).any(dim=2)


def _negative_matrix(ids: Tensor, same_caption: str) -> Tensor:
    own = torch.eye(len(ids), dtype=torch.bool)
    return ~_same_matrix(ids) if same_caption == "ignore" else ~own


# ---- batches and comparisons


def features(seed: int, rows: int, dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two normalised feature blocks of partners that resemble each other a little; leaves with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    text = image + 2 * torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    normal = torch.nn.functional.normalize
    return normal(image, dim=1).to(dtype).requires_grad_(), normal(text, dim=1).to(dtype).requires_grad_()


def scalar(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    """The gradient of each leaf; zero where the loss does not depend on it."""
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected; not divided where that is 0."""
    difference = (found.double() - expected.double()).norm().item()
    norm = expected.double().norm().item()
    assert math.isfinite(difference)
    return difference / norm if norm > 0 else difference


def worst_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(relative_error(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def of_rows(keep: Any, values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the tensors that have a row for each pair cut to the rows `keep`."""
    return {key: value[keep] if torch.is_tensor(value) and value.ndim else value for key, value in values.items()}
