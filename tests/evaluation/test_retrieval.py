import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.evaluation import retrieval
from contrastive.evaluation.retrieval import best_hits, chance_recall, recalls, retrieval_ranks


def brute_force_ranks(scores, query_ids, candidate_ids):
    ranks = []
    for row, wanted in zip(scores, query_ids, strict=True):
        best = max(s for s, own in zip(row, candidate_ids, strict=True) if own == wanted)
        ranks.append(sum(s >= best for s, own in zip(row, candidate_ids, strict=True) if own != wanted))
    return ranks


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 1000), st.sampled_from([1, 7, 10**6]))
def test_ranks_equal_brute_force_for_any_block_size(n, distinct, seed, block):
    random = np.random.default_rng(seed)
    # Small integers make ties common, and are exact in float32.
    query, candidate = (random.integers(-1, 2, size=(n, 3)).astype(np.float32) for _ in range(2))
    ids = random.integers(0, distinct, size=n)
    before, retrieval.BLOCK = retrieval.BLOCK, block
    try:
        found = retrieval_ranks(*map(torch.as_tensor, (query, candidate, ids, ids)))
    finally:
        retrieval.BLOCK = before
    assert found.tolist() == brute_force_ranks(query @ candidate.T, ids, ids)


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
