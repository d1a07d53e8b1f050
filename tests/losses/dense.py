"""Oracles in plain float64 loops over the whole batch, written from the formulas and not from our code."""

import math

import torch
from torch import Tensor


def infonce_dense(
    image: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None, valid: Tensor | None, same_caption: str,
    label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    rows = _valid_rows(image, valid)
    total = image.new_zeros(())
    for queries, keys in ((image, text), (text, image)):
        for i in rows:
            same = {j for j in rows if ids is not None and ids[i] == ids[j]} | {i}
            columns = [j for j in rows if j == i or same_caption != "ignore" or j not in same]
            positives = same if same_caption == "positive" else {i}
            exps = {j: torch.exp(scale * queries[i].dot(keys[j])) for j in columns}
            denominator = sum(exps.values())
            for j in columns:
                weight = label_smoothing / len(columns)
                if j in positives:
                    weight += (1 - label_smoothing) / len(positives)
                total = total - weight * torch.log(exps[j] / denominator)
    return total / (2 * max(len(rows), 1))


def margin_dense(
    image: Tensor, text: Tensor, ids: Tensor | None, valid: Tensor | None, same_caption: str,
    margin: float, hardest: bool,
) -> Tensor:  # fmt: skip
    rows = _valid_rows(image, valid)
    total = image.new_zeros(())
    for queries, keys in ((image, text), (text, image)):
        for i in rows:
            terms = [
                torch.clamp(margin - image[i].dot(text[i]) + queries[i].dot(keys[j]), min=0)
                for j in rows
                if j != i and not (same_caption == "ignore" and ids is not None and ids[i] == ids[j])
            ]
            if terms:
                total = total + (torch.stack(terms).max() if hardest else sum(terms))
    return total / max(len(rows), 1)


def _valid_rows(image: Tensor, valid: Tensor | None) -> list[int]:
    return [i for i in range(len(image)) if valid is None or valid[i]]


def features(seed: int, rows: int, dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two normalised feature blocks of partners that resemble each other a little; leaves with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    text = image + 2 * torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    normal = torch.nn.functional.normalize
    return normal(image, dim=1).to(dtype).requires_grad_(), normal(text, dim=1).to(dtype).requires_grad_()


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected; not divided where that is 0."""
    difference = (found.double() - expected.double()).norm().item()
    norm = expected.double().norm().item()
    assert math.isfinite(difference)
    return difference / norm if norm > 0 else difference
