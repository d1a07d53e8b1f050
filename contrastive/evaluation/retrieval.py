"""Retrieval between images and captions: recall@k in both directions, and the best hits of a query.

Shapes: Q queries, N candidates, D dimensions. Ranks are *counted*, a block of queries at a time: no N x N
matrix and no sort.

A candidate is right for a query when their ids are equal. Captions with the same text share an id, so each of
them is a right answer for each of their images, and each of those images is right for each of the captions;
the right answers other than the best one do not count as competitors.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from contrastive.evaluation.metrics import share

KS = (1, 5, 10)
BLOCK = 16_000_000  # scores held at a time: 64 MB of float32


def retrieval_ranks(query_QD: Tensor, candidate_ND: Tensor, query_ids_Q: Tensor, candidate_ids_N: Tensor) -> Tensor:
    """Number of wrong candidates that score at least as high as the best right one, int64 (Q,).

    Ties count against the model. A query with no right candidate has rank N.
    """
    rows = max(1, BLOCK // max(1, len(candidate_ND)))
    ranks = []
    for start in range(0, len(query_QD), rows):
        scores = query_QD[start : start + rows] @ candidate_ND.T
        right = query_ids_Q[start : start + rows, None] == candidate_ids_N[None]
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append((~(scores < best) & ~right).sum(dim=1))
    return torch.cat(ranks)


def recalls(
    image_ND: NDArray[np.float32], text_ND: NDArray[np.float32], ids_N: NDArray[np.int64], *, seed: int = 0
) -> dict[str, dict[str, dict[str, float]]]:
    """Recall@1/5/10 of N pairs: `{"image_to_text": {"recall@1": {"value", "low", "high", "chance"}, ...},
    ...}`.

    Row i of `image_ND` and of `text_ND` are a pair with id `ids_N[i]`. The interval is `metrics.share`'s;
    chance is that of a random order, with its several right answers.
    """
    image, text, ids = torch.as_tensor(image_ND), torch.as_tensor(text_ND), torch.as_tensor(ids_N)
    # Pairs with the same text are one query asked twice: both rows count, as samples do everywhere else.
    result = {}
    for direction, query, candidate in (("image_to_text", image, text), ("text_to_image", text, image)):
        ranks = retrieval_ranks(query, candidate, ids, ids).numpy()
        result[direction] = {
            f"recall@{k}": share(ranks < k, seed=seed) | {"chance": chance_recall(ids_N, k)} for k in KS
        }
    return result


def chance_recall(ids_N: NDArray[np.int64], k: int) -> float:
    """Expected recall@k of a random order: 1 - C(N-m, k) / C(N, k) for a query with m right answers,
    averaged.
    """
    total = len(ids_N)
    _, inverse, counts = np.unique(ids_N, return_inverse=True, return_counts=True)
    drawn = np.arange(min(k, total))
    missed_per_id = np.prod(np.clip(total - counts[:, None] - drawn, 0, None) / (total - drawn), axis=1)
    return float(1 - missed_per_id[inverse].mean())


def best_hits(
    query_QD: NDArray[np.float32], candidate_ND: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Indices and scores of the k best candidates of each of a few queries, best first: two (Q, min(k,
    N)).
    """
    scores = torch.as_tensor(query_QD) @ torch.as_tensor(candidate_ND).T
    top = scores.topk(min(k, len(candidate_ND)), dim=1)
    return top.indices.numpy(), top.values.numpy()
