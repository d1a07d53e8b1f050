"""k nearest neighbours over all k and temperatures, from one neighbour pass.

Votes weighted by exp(cosine similarity / temperature), as in Wu et al. 2018, "Unsupervised feature learning via
non-parametric instance discrimination", section 3.4. Shapes: N training and M test images, Q queries, D, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from contrastive.errors import UserError
from contrastive.evaluation.checks import check_class_numbers
from contrastive.evaluation.estimator import check_features
from contrastive.evaluation.metrics import share
from contrastive.wording import first_few

KS = (1, 2, 5, 10, 20, 50, 100, 200)
TEMPERATURES = (0.01, 0.02, 0.04, 0.07, 0.1, 0.2, 0.5, 1.0)  # Wu et al. take 0.07
VALIDATION = 0.1  # of the training images are queries for the choice, at most MOST
MOST = 5000
QUERIES = 1024  # at a time
KEYS = 32_768  # at a time: a block of similarities is 128 MB in float32


def knn_sweep(
    train_ND: ArrayLike,
    train_target_N: ArrayLike,
    test_MD: ArrayLike,
    test_target_M: ArrayLike,
    *,
    ks: Sequence[int] = KS,
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int = 0,
) -> dict[str, Any]:
    """The best k and temperature by validation, and what they reach on the test images.

    The choice is made on a part of the training images, drawn with `seed`: each asks its neighbours among all
    *other* training images. The test images are judged once, with the pair chosen. At a tie the smaller k, then the
    earlier temperature wins; of classes with equal votes the first.

    Rows need not be normalised. Targets are class numbers from 0. A k beyond the other training images is left out.

    Returns:
        `{"k", "temperature", "top1": {"value", "low", "high"}, "validation": {"value", "samples"}, "grid"}`; grid: one
        dict `{"k", "temperature", "accuracy"}` (on the validation part) a pair.

    Raises:
        UserError: fewer than two training images, lengths that differ, features that are not finite, a test class
        without training images.
    """
    train, train_target = _normalised(train_ND, "train"), _targets(train_target_N, train_ND, "train")
    test, test_target = _normalised(test_MD, "test"), _targets(test_target_M, test_MD, "test")
    if train.shape[1] != test.shape[1]:
        raise UserError(f"knn: train has width {train.shape[1]}, test {test.shape[1]}; embed both with one model")
    if len(train) < 2 or not len(test):
        raise UserError(f"knn: {len(train)} training and {len(test)} test images; needs at least 2 and 1")
    unknown = sorted(set(test_target.tolist()) - set(train_target.tolist()))
    if unknown:
        raise UserError(f"knn: test: classes without training images: {first_few(unknown)}; leave those images out")
    kept = [k for k in sorted(set(ks)) if 1 <= k < len(train)]
    if not kept or not temperatures or min(temperatures) <= 0:
        raise UserError(f"knn: ks {list(ks)}, temperatures {list(temperatures)}: needs positive ones, k < {len(train)}")
    held = np.random.default_rng(seed).permutation(len(train))
    held = np.sort(held[: min(MOST, max(1, round(VALIDATION * len(train))))])
    queries = torch.cat([train[held], test])
    itself = torch.full((len(queries),), -1, dtype=torch.int64)
    itself[: len(held)] = torch.as_tensor(held)
    similarity, neighbour = neighbours(train, queries, kept[-1], itself)
    votes = train_target[neighbour]
    classes = int(max(train_target.max(), test_target.max())) + 1
    chosen, best, grid = (kept[0], temperatures[0]), -1.0, []
    for temperature in temperatures:
        predicted = _predictions(similarity[: len(held)], votes[: len(held)], kept, temperature, classes)
        for k, guess in zip(kept, predicted, strict=True):
            accuracy = float((guess == train_target[held]).double().mean())
            grid.append({"k": k, "temperature": temperature, "accuracy": accuracy})
            if accuracy > best or (accuracy == best and k < chosen[0]):
                chosen, best = (k, temperature), accuracy
    k, temperature = chosen
    guess = _predictions(similarity[len(held) :], votes[len(held) :], [k], temperature, classes)[0]
    return {
        "k": k,
        "temperature": temperature,
        "top1": share((guess == test_target).numpy(), seed=seed),
        "validation": {"value": best, "samples": len(held)},
        "grid": grid,
    }


def neighbours(train_ND: Tensor, query_QD: Tensor, k: int, itself_Q: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Inner products (Q, k) of each query with its k nearest rows, best first, and their numbers (Q, k).

    itself_Q: a row number that a query may not find, -1 for none. Memory is bounded: blocks of both sides.
    """
    found_similarity, found_index = [], []
    for first in range(0, len(query_QD), QUERIES):
        query = query_QD[first : first + QUERIES]
        similarity = query.new_empty(len(query), 0)
        index = torch.empty(len(query), 0, dtype=torch.int64)
        for start in range(0, len(train_ND), KEYS):
            block = query @ train_ND[start : start + KEYS].T
            if itself_Q is not None:
                own = itself_Q[first : first + QUERIES] - start
                rows = torch.nonzero((own >= 0) & (own < block.shape[1]))[:, 0]
                block[rows, own[rows]] = -torch.inf
            top, place = block.topk(min(k, block.shape[1]), dim=1)
            similarity = torch.cat([similarity, top], dim=1)
            index = torch.cat([index, place + start], dim=1)
            similarity, order = similarity.topk(min(k, similarity.shape[1]), dim=1)
            index = index.gather(1, order)
        found_similarity.append(similarity)
        found_index.append(index)
    return torch.cat(found_similarity), torch.cat(found_index)


def _predictions(
    similarity_QN: Tensor, votes_QN: Tensor, ks: Sequence[int], temperature: float, classes: int
) -> list[Tensor]:
    """Predicted classes (Q,) of each of `ks`, ascending: the votes of a smaller k are part of those of a larger."""
    result: list[list[Tensor]] = [[] for _ in ks]
    for similarity, votes in zip(similarity_QN.split(QUERIES), votes_QN.split(QUERIES), strict=True):
        # relative to the best neighbour: exp(1 / 0.01) overflows float32
        weight = torch.exp((similarity - similarity[:, :1]).double() / temperature)
        total = torch.zeros(len(votes), classes, dtype=torch.float64)
        before = 0
        for found, k in zip(result, ks, strict=True):
            total.scatter_add_(1, votes[:, before:k], weight[:, before:k])
            found.append(total.argmax(dim=1))
            before = k
    return [torch.cat(found) for found in result]


def _normalised(features: ArrayLike, name: str) -> Tensor:
    rows = torch.as_tensor(check_features(features, f"knn: {name}")).float()
    return torch.nn.functional.normalize(rows, dim=1)


def _targets(target: ArrayLike, features: ArrayLike, name: str) -> Tensor:
    numbers = check_class_numbers(target, f"knn: {name}")
    if numbers.ndim != 1 or len(numbers) != len(features):  # type: ignore[arg-type]
        raise UserError(
            f"knn: {name}: {len(features)} feature rows "  # type: ignore[arg-type]
            f"but labels of shape {numbers.shape}; give one a row"
        )
    return torch.as_tensor(numbers)
