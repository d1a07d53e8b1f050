"""Retrieval between images and captions: how far down the right answer stands, in both directions.

Shapes: Q queries, N candidates, D dimensions. Ranks are *counted* in tiles of the score matrix, of which a few MB exist
at a time: no N x N matrix and no sort. One product serves both directions: in a tile a row is a query for the columns
and a column one for the rows.

A candidate is right for a query when their ids are equal: the several captions of an image share the image's id, and so
do images whose captions read alike. The best right answer counts; the other right ones do not compete with it.

Ties: scores closer than 1e-6 of the product of the lengths (rounding of float32) are equal. Ranks are reported
pessimistically (an equal wrong candidate stands before the right one), so that a collapsed tower gets 0 and not 1, and
optimistically (it stands behind).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from contrastive.errors import UserError
from contrastive.evaluation.metrics import mean, median, share

KS = (1, 5, 10)
ROWS, COLUMNS = 512, 1024  # of a tile: 2 MB, and as much again for what is counted, stay in the cache
BAND = 128  # rows whose right answers are looked for together
EQUAL = 1e-6
LARGEST = 10_000_000  # candidates that `best_hits` compares with all queries: beyond, it takes an approximate index
CELLS = 4  # times the root of the number of candidates: cells of that index, as faiss's guidelines have it
PROBED = 16  # one cell in so many is looked through


@dataclass(frozen=True)
class Ranks:
    """Of each query, int64 (Q,): how many wrong candidates score higher than, and the same as, the best right one."""

    above: NDArray[np.int64]
    tied: NDArray[np.int64]

    @property
    def pessimistic(self) -> NDArray[np.int64]:
        """Ranks from 0 with ties against the model. A query with no right candidate has rank N."""
        return self.above + self.tied


def rank_both(
    query_QD: ArrayLike, candidate_ND: ArrayLike, query_ids_Q: ArrayLike, candidate_ids_N: ArrayLike
) -> tuple[Ranks, Ranks]:
    """Ranks of the best right candidate of each query, and of the best right query of each candidate.

    Memory beside the features and a sorted copy of them: a few tiles. Raises `UserError` beyond 10 million rows.
    """
    query, candidate = (torch.as_tensor(rows).float() for rows in (query_QD, candidate_ND))
    for features in (query, candidate):
        if len(features) > LARGEST:
            raise UserError(
                f"retrieval: {len(features):,} rows; exact ranks are counted up to {LARGEST:,}: use a part of them, or "
                "`best_hits`, which takes an approximate index there"
            )
    # Sorted by id, right answers lie beside each other: only a narrow band of the matrix has to be looked at for them.
    query, query_ids, query_order = _sorted(query, query_ids_Q)
    candidate, candidate_ids, candidate_order = _sorted(candidate, candidate_ids_N)
    best_Q, best_N = (torch.full((len(rows),), -torch.inf) for rows in (query, candidate))
    for rows, columns in _bands(query_ids, candidate_ids):
        scores = query[rows] @ candidate[columns].T
        scores.masked_fill_(query_ids[rows, None] != candidate_ids[None, columns], -torch.inf)
        best_Q[rows] = torch.maximum(best_Q[rows], scores.amax(dim=1))
        best_N[columns] = torch.maximum(best_N[columns], scores.amax(dim=0))
    lengths_Q, lengths_N = (rows.norm(dim=1) for rows in (query, candidate))
    margin_Q = EQUAL * lengths_Q * lengths_N.max()
    margin_N = EQUAL * lengths_N * lengths_Q.max()

    below_Q, above_Q = (torch.zeros(len(query), dtype=torch.int64) for _ in range(2))
    below_N, above_N = (torch.zeros(len(candidate), dtype=torch.int64) for _ in range(2))
    low_Q, high_Q = (best_Q - margin_Q)[:, None], (best_Q + margin_Q)[:, None]
    low_N, high_N = best_N - margin_N, best_N + margin_N
    scores_memory, count_memory = (torch.empty(ROWS * COLUMNS) for _ in range(2))
    for rows, columns in tiles(len(query), len(candidate)):
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        scores, counts = (memory[: shape[0] * shape[1]].view(shape) for memory in (scores_memory, count_memory))
        torch.mm(query[rows], candidate[columns].T, out=scores)
        _mask_right(scores, rows, columns, query_ids, candidate_ids)
        # Zeros and ones as floats: comparing and adding up float32 is several times faster than through bool.
        below_Q[rows] += torch.lt(scores, low_Q[rows], out=counts).sum(dim=1).long()
        above_Q[rows] += torch.gt(scores, high_Q[rows], out=counts).sum(dim=1).long()
        below_N[columns] += torch.lt(scores, low_N[columns], out=counts).sum(dim=0).long()
        above_N[columns] += torch.gt(scores, high_N[columns], out=counts).sum(dim=0).long()
    # Right answers are masked to -inf, so they are below; a score that is not a number is not, and counts against.
    return (
        _ranks(below_Q, above_Q, len(candidate), query_order),
        _ranks(below_N, above_N, len(query), candidate_order),
    )


def tiles(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Slices that cover a matrix, at most `ROWS` × `COLUMNS` each."""
    for row in range(0, rows, ROWS):
        for column in range(0, columns, COLUMNS):
            yield slice(row, min(row + ROWS, rows)), slice(column, min(column + COLUMNS, columns))


def retrieval_ranks(
    query_QD: ArrayLike, candidate_ND: ArrayLike, query_ids_Q: ArrayLike, candidate_ids_N: ArrayLike
) -> NDArray[np.int64]:
    """The pessimistic ranks of one direction, int64 (Q,)."""
    return rank_both(query_QD, candidate_ND, query_ids_Q, candidate_ids_N)[0].pessimistic


def recalls(
    image_ND: ArrayLike,
    text_TD: ArrayLike,
    image_ids_N: NDArray[np.int64],
    text_ids_T: NDArray[np.int64] | None = None,
    *,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, float]]]:
    """Measures in both directions: `{"image_to_text": {"recall@1": M, "recall@5", "recall@10", "median_rank", "mrr"},
    "text_to_image": …}`, M = `{"value", "low", "high", "chance", "optimistic"}`.

    text_ids_T: None where row i of `image_ND` and of `text_TD` are a pair with id `image_ids_N[i]`. `value` counts ties
    against the model, `optimistic` for it. Recall and MRR (the mean of 1 / rank) are shares of 1, the median rank
    counts from 1. Intervals: 95 % bootstrap over queries. Chance is that of a random order, with its
    several right answers.
    """
    text_ids_T = image_ids_N if text_ids_T is None else text_ids_T
    # Pairs with the same text are one query asked twice: both rows count, as samples do everywhere else.
    found = rank_both(image_ND, text_TD, image_ids_N, text_ids_T)
    sides = ((image_ids_N, text_ids_T), (text_ids_T, image_ids_N))
    directions = ("image_to_text", "text_to_image")
    return {
        direction: summary(ranks, *ids, seed=seed)
        for direction, ranks, ids in zip(directions, found, sides, strict=True)
    }


def summary(
    ranks: Ranks, query_ids_Q: NDArray[np.int64], candidate_ids_N: NDArray[np.int64], *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """The measures of one direction; see `recalls`."""
    worst, best = ranks.pessimistic, ranks.above
    result = {
        f"recall@{k}": share(worst < k, seed=seed)
        | {"chance": chance_recall(query_ids_Q, k, candidate_ids_N), "optimistic": float((best < k).mean())}
        for k in KS
    }
    result["median_rank"] = median(worst + 1, seed=seed) | {"optimistic": float(np.median(best + 1))}
    result["mrr"] = mean(1 / (worst + 1), seed=seed) | {"optimistic": float((1 / (best + 1)).mean())}
    return result


def chance_recall(query_ids_Q: NDArray[np.int64], k: int, candidate_ids_N: NDArray[np.int64] | None = None) -> float:
    """Expected recall@k of a random order: 1 - C(N-m, k) / C(N, k) for a query with m right answers, averaged.

    Candidates have the ids of the queries where no others are given.
    """
    candidates = query_ids_Q if candidate_ids_N is None else candidate_ids_N
    total = len(candidates)
    ids, counts = np.unique(candidates, return_counts=True)
    place = np.minimum(np.searchsorted(ids, query_ids_Q), len(ids) - 1)
    right_Q = np.where(ids[place] == query_ids_Q, counts[place], 0)
    right, inverse = np.unique(right_Q, return_inverse=True)
    drawn = np.arange(min(k, total))
    missed = np.prod(np.clip(total - right[:, None] - drawn, 0, None) / (total - drawn), axis=1)
    return float(1 - missed[inverse].mean())


def hubness(query_QD: ArrayLike, candidate_ND: ArrayLike, k: int = 10) -> dict[str, Any]:
    """Whether a few candidates are found by many queries (Radovanović et al. 2010, "Hubs in space").

    Returns `{"k", "skewness", "largest", "never"}` of how often each candidate is among the k nearest of a query:
    the skewness of these counts (about 0 to 1 without hubs), the largest as a share of the queries, the share of
    candidates that no query finds.
    """
    from scipy.stats import skew

    k = min(k, len(np.asarray(candidate_ND)))
    index_QK, _ = best_hits(query_QD, candidate_ND, k)
    counts = np.bincount(index_QK.ravel(), minlength=len(np.asarray(candidate_ND)))
    uneven = float(skew(counts)) if counts.min() < counts.max() else 0.0
    return {
        "k": k,
        "skewness": uneven,
        "largest": float(counts.max() / len(index_QK)),
        "never": float((counts == 0).mean()),
    }


def best_hits(query_QD: ArrayLike, candidate_ND: ArrayLike, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Indices and scores of the k best candidates of each query, best first: two (Q, min(k, N)).

    Beyond `LARGEST` candidates they come from an approximate index (the extra `faiss`), which misses a few. Ranks and
    recalls (`rank_both`) are counted over all candidates, up to that many.
    """
    query, candidate = (torch.as_tensor(rows).float() for rows in (query_QD, candidate_ND))
    k = min(k, len(candidate))
    if len(candidate) > LARGEST:
        return _indexed_hits(query.numpy(), candidate.numpy(), k)
    indices = torch.zeros(len(query), k, dtype=torch.int64)
    values = torch.full((len(query), k), -torch.inf)
    width = max(COLUMNS, k)
    for start in range(0, len(query), ROWS):
        rows = slice(start, start + ROWS)
        for column in range(0, len(candidate), width):
            scores = query[rows] @ candidate[column : column + width].T
            top = scores.topk(min(k, scores.shape[1]), dim=1)
            both = torch.cat([values[rows], top.values], dim=1)
            kept = both.topk(k, dim=1)
            indices[rows] = torch.cat([indices[rows], top.indices + column], dim=1).gather(1, kept.indices)
            values[rows] = kept.values
    return indices.numpy(), values.numpy()


def _indexed_hits(
    query_QD: NDArray[np.float32], candidate_ND: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """As `best_hits`, among the candidates of the cells that lie nearest (an inverted file: Jégou et al. 2011)."""
    try:
        import faiss
    except ImportError:
        raise UserError(
            f"retrieval: {len(candidate_ND):,} candidates want an approximate index; pip install 'contrastive[faiss]'"
        ) from None
    count, width = candidate_ND.shape
    cells = max(1, min(int(CELLS * count**0.5), count // 40))  # faiss wants forty to train a cell with
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).choice(count, min(count, 64 * cells), replace=False)
    index.train(np.ascontiguousarray(candidate_ND[np.sort(sample)]))
    index.add(np.ascontiguousarray(candidate_ND))
    index.nprobe = max(1, cells // PROBED)
    scores, hits = index.search(np.ascontiguousarray(query_QD), k)
    return hits.astype(np.int64), scores


def _sorted(rows: Tensor, ids: ArrayLike) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and ids in order of the ids, and that order."""
    keys = torch.as_tensor(np.asarray(ids))
    keys, order = torch.sort(keys, stable=True)
    in_order = bool((order[1:] > order[:-1]).all())
    return (rows if in_order else rows[order]), keys, order


def _bands(query_ids: Tensor, candidate_ids: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rectangles that hold every right answer: a few rows, and the columns between their first and last id."""
    for start in range(0, len(query_ids), BAND):
        rows = slice(start, min(start + BAND, len(query_ids)))
        ends = query_ids[rows][[0, -1]]
        left = int(torch.searchsorted(candidate_ids, ends[0]))
        right = int(torch.searchsorted(candidate_ids, ends[1], right=True))
        for column in range(left, right, 16 * COLUMNS):  # many images with one label
            yield rows, slice(column, min(column + 16 * COLUMNS, right))


def _mask_right(scores: Tensor, rows: slice, columns: slice, query_ids: Tensor, candidate_ids: Tensor) -> None:
    """Set the scores of right answers in a tile to -inf."""
    first, last = query_ids[rows.start], query_ids[rows.stop - 1]
    if candidate_ids[columns.stop - 1] < first or candidate_ids[columns.start] > last:
        return
    for start in range(rows.start, rows.stop, BAND):
        part = slice(start, min(start + BAND, rows.stop))
        left = max(columns.start, int(torch.searchsorted(candidate_ids, query_ids[part.start])))
        right = min(columns.stop, int(torch.searchsorted(candidate_ids, query_ids[part.stop - 1], right=True)))
        if left < right:
            same = query_ids[part, None] == candidate_ids[None, left:right]
            shifted = slice(part.start - rows.start, part.stop - rows.start)
            scores[shifted, left - columns.start : right - columns.start].masked_fill_(same, -torch.inf)


def _ranks(below: Tensor, above: Tensor, candidates: int, order: Tensor) -> Ranks:
    counted = torch.empty((2, len(order)), dtype=torch.int64)
    counted[:, order] = torch.stack([above, candidates - below - above])
    return Ranks(counted[0].numpy(), counted[1].numpy())


def hubness_by_direction(image: NDArray[np.float32], text: NDArray[np.float32]) -> dict[str, Any]:
    """Hubs among what each direction finds; few candidates are all found by everyone, and have none."""
    sides = {"image_to_text": (image, text), "text_to_image": (text, image)}
    return {direction: hubness(*sides[direction]) for direction in sides if len(sides[direction][1]) > 20}
