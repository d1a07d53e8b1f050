import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.errors import UserError
from contrastive.evaluation import retrieval
from contrastive.evaluation.retrieval import best_hits, chance_recall, hubness, rank_both, recalls


def brute_force_ranks(scores, query_ids, candidate_ids, strict):
    """Wrong candidates that score higher than the best right one or, unless `strict`, the same."""
    ranks = []
    for row, wanted in zip(scores, query_ids, strict=True):
        best = max((s for s, own in zip(row, candidate_ids, strict=True) if own == wanted), default=-np.inf)
        wrong = [s for s, own in zip(row, candidate_ids, strict=True) if own != wanted]
        ranks.append(sum(s > best if strict else s >= best for s in wrong))
    return ranks


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 15), st.integers(1, 5), st.integers(0, 1000), st.integers(1, 9))
def test_ranks_equal_brute_force_for_any_tile(queries, candidates, distinct, seed, tile):
    random = np.random.default_rng(seed)
    # Small integers make ties common, and are exact in float32.
    query, candidate = (random.integers(-1, 2, size=(n, 3)).astype(np.float32) for n in (queries, candidates))
    query_ids, candidate_ids = (random.integers(0, distinct, size=n) for n in (queries, candidates))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ROWS", tile), ("COLUMNS", 10 - tile), ("BAND", 1 + tile // 2)):
            patch.setattr(retrieval, name, value)
        forth, back = rank_both(query, candidate, query_ids, candidate_ids)
        hits, values = best_hits(query, candidate, 4)
    scores = query @ candidate.T
    for found, matrix, asked, held in (
        (forth, scores, query_ids, candidate_ids),
        (back, scores.T, candidate_ids, query_ids),
    ):
        assert found.pessimistic.tolist() == brute_force_ranks(matrix, asked, held, strict=False)
        has = np.isin(asked, held)
        assert found.above[has].tolist() == brute_force_ranks(matrix[has], asked[has], held, strict=True)
    np.testing.assert_array_equal(values, -np.sort(-scores, axis=1)[:, :4])
    np.testing.assert_array_equal(np.take_along_axis(scores, hits, axis=1), values)


def test_measures_equal_those_of_torchmetrics():
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR

    random = np.random.default_rng(0)
    image = random.normal(size=(60, 8)).astype(np.float32)
    owners = np.repeat(np.arange(60), 5)  # five captions an image
    text = image[owners] + 1.5 * random.normal(size=(300, 8)).astype(np.float32)
    found = recalls(image, text, np.arange(60), owners)
    scores, right = torch.as_tensor(image @ text.T), torch.as_tensor(owners[None] == np.arange(60)[:, None])
    for direction, rows, relevant in (("image_to_text", scores, right), ("text_to_image", scores.T, right.T)):
        query = torch.arange(len(rows))[:, None].expand_as(rows)
        # torchmetrics takes a score of 0 or less for an answer that was not given
        flat = (rows - rows.min() + 1).flatten(), relevant.flatten(), query.flatten()
        for k in (1, 5, 10):
            expected = float(RetrievalHitRate(top_k=k)(flat[0], flat[1], indexes=flat[2]))
            assert found[direction][f"recall@{k}"]["value"] == pytest.approx(expected, abs=1e-6)
            assert 0.05 < expected < 0.999
        expected = float(RetrievalMRR()(flat[0], flat[1], indexes=flat[2]))
        assert found[direction]["mrr"]["value"] == pytest.approx(expected, abs=1e-5)


def test_equal_scores_are_reported_both_ways():
    image = np.eye(3, dtype=np.float32)
    text = image[[0, 0, 2]]  # the second caption has the embedding of the first
    found = recalls(image, text, np.arange(3))["text_to_image"]
    assert found["recall@1"]["value"] == found["recall@1"]["optimistic"] == pytest.approx(2 / 3)
    found = recalls(image, text, np.arange(3))["image_to_text"]
    # image 0 ties with caption 1, and image 1, which no caption resembles, with two
    assert found["recall@1"]["value"] == pytest.approx(1 / 3) and found["recall@1"]["optimistic"] == 1
    assert found["median_rank"]["value"] == 2 and found["median_rank"]["optimistic"] == 1
    assert found["mrr"]["value"] == pytest.approx((1 / 2 + 1 / 3 + 1) / 3) and found["mrr"]["optimistic"] == 1


def test_rounding_makes_no_winner_of_equal_embeddings():
    random = np.random.default_rng(0)
    row = random.normal(size=512).astype(np.float32)
    image = np.tile(row / np.linalg.norm(row), (700, 1))
    forth, back = rank_both(image, np.vstack([image, image])[:1100], np.arange(700), np.arange(1100) % 700)
    assert forth.above.max() == back.above.max() == 0
    assert forth.pessimistic.tolist() == [1100 - 1 - (n < 400) for n in range(700)]


def test_a_query_without_a_right_answer_is_last():
    forth, _ = rank_both(np.eye(2), np.eye(2), [5, 1], [0, 1])
    assert forth.pessimistic.tolist() == [2, 0]


def test_more_candidates_than_can_be_compared_are_refused(monkeypatch):
    monkeypatch.setattr(retrieval, "LARGEST", 3)
    with pytest.raises(UserError, match="exact ranks are counted up to 3"):
        rank_both(np.eye(4), np.eye(4), np.arange(4), np.arange(4))


def test_a_hub_is_seen():
    random = np.random.default_rng(0)
    rows = random.normal(size=(300, 12)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    even = hubness(rows, rows, k=5)
    candidates = rows.copy()
    candidates[7] = 3 * rows.mean(axis=0) / np.linalg.norm(rows.mean(axis=0))
    hub = hubness(rows + 0.3 * candidates[7], candidates, k=5)
    counts = np.zeros(300, int)
    for row in rows @ rows.T:
        counts[np.argsort(-row)[:5]] += 1
    assert even["largest"] == counts.max() / 300 and even["never"] == (counts == 0).mean()
    deviation = counts - counts.mean()
    assert even["skewness"] == pytest.approx((deviation**3).mean() / (deviation**2).mean() ** 1.5)
    assert hub["largest"] > 0.8 and hub["skewness"] > 5 > 2 > even["skewness"]


def test_every_caption_with_the_same_text_is_a_right_answer():
    image = np.eye(4, dtype=np.float32)
    text = image[[1, 0, 2, 3]]  # the captions of the first two images are exchanged …
    different = recalls(image, text, np.array([1, 2, 3, 4]))
    same = recalls(image, text, np.array([1, 1, 3, 4]))  # … which is no mistake when they read alike
    for direction in ("image_to_text", "text_to_image"):
        assert different[direction]["recall@1"]["value"] == 0.5
        assert same[direction]["recall@1"]["value"] == 1.0


def test_recall_of_equal_embeddings_is_zero():
    same = np.ones((20, 2), dtype=np.float32)
    assert recalls(same, same, np.arange(20))["image_to_text"]["recall@10"]["value"] == 0.0


def test_chance_is_the_recall_of_random_orders():
    ids = np.array([0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    random = np.random.default_rng(0)
    hits = [np.isin(i, random.permutation(ids)[:5]) for i in ids for _ in range(2000)]
    assert chance_recall(ids, 5) == pytest.approx(np.mean(hits), abs=0.01)


def test_chance_is_one_when_all_candidates_are_shown():
    assert chance_recall(np.arange(3), 10) == 1.0


def test_best_hits_are_sorted():
    index, score = best_hits(np.array([[1.0, 0.0]], np.float32), np.array([[0, 1], [2, 0], [1, 0]], np.float32), 2)
    assert index.tolist() == [[1, 2]] and score.tolist() == [[2.0, 1.0]]


def test_very_many_candidates_are_looked_through_by_an_index(monkeypatch):
    pytest.importorskip("faiss")
    random = np.random.default_rng(0)
    centres = random.normal(size=(50, 16))
    candidate = centres[random.integers(50, size=5000)] + 0.3 * random.normal(size=(5000, 16))
    candidate = (candidate / np.linalg.norm(candidate, axis=1, keepdims=True)).astype(np.float32)
    query = candidate[::100] + 0.01 * random.normal(size=(50, 16)).astype(np.float32)
    exact, scores = best_hits(query, candidate, 10)
    monkeypatch.setattr(retrieval, "LARGEST", 1000)
    searched = []
    faiss_search = retrieval._indexed_hits
    monkeypatch.setattr(retrieval, "_indexed_hits", lambda *a: searched.append(1) or faiss_search(*a))
    found, found_scores = best_hits(query, candidate, 10)
    assert searched and found.shape == (50, 10)
    overlap = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact.tolist(), found.tolist(), strict=True)])
    assert overlap > 0.95
    np.testing.assert_allclose(found_scores[:, 0], scores[:, 0], rtol=1e-5)


def test_without_the_index_very_many_candidates_name_the_extra(monkeypatch):
    monkeypatch.setattr(retrieval, "LARGEST", 1)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="contrastive.faiss"):
        best_hits(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), 1)
