"""What can be said of a classifier's logits on a test set: accuracies, calibration, confusion, and which images repeat.

Shapes: N test samples, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from contrastive.evaluation import calibration
from contrastive.evaluation.duplicates import nearest_embedding, nearest_look
from contrastive.evaluation.embed import Embeddings
from contrastive.evaluation.metrics import accuracies, class_ranks, confusion, expected_error, per_class, share

LOOK, COSINE = 8, 0.99  # a repeated image: at most so many bits of 256, at least so near
SHOWN = 20  # repeated images that are named


@dataclass(frozen=True)
class Judged:
    """results: see `judge`. probabilities: (N, K), calibrated where there was something to calibrate on.

    names: the K classes. target, right, log_likelihood: of each sample its class, whether the likeliest class is that
    one, and the logarithm of that one's probability.
    """

    results: dict[str, Any]
    names: list[str]
    target: NDArray[np.int64]
    probabilities: NDArray[np.floating]
    right: NDArray[np.bool_]
    log_likelihood: NDArray[np.floating]


def judge(
    logits_NK: NDArray[np.floating],
    target_N: NDArray[np.int64],
    names: Sequence[str],
    *,
    validation: tuple[NDArray[np.floating], NDArray[np.int64]] | None = None,
    seed: int = 0,
) -> Judged:
    """Measures of one classifier on a test set.

    validation: logits and classes of images that are not test images; the temperature is fitted to them.

    Returns:
        results: `{"top1": M, "top5": M, "mean_per_class": M, "calibration": {"before": E, "after": E, "temperature"},
        "reliability": […], "confusion": K × K counts (row: true class), "per_class": see `per_class`, "names"}`.
        M: see `accuracies`; E: `{"value", "low", "high"}`, the expected calibration error; "after" and "temperature"
        with `validation` only.
    """
    ranks_N = class_ranks(logits_NK, target_N)
    log_probabilities = log_softmax(np.asarray(logits_NK, np.float64), axis=1)
    errors: dict[str, Any] = {"before": expected_error(np.exp(log_probabilities), target_N, seed=seed)}
    if validation is not None:
        temperature = float(calibration.temperature(*validation))
        log_probabilities = log_softmax(np.asarray(logits_NK, np.float64) / temperature, axis=1)
        after = expected_error(np.exp(log_probabilities), target_N, seed=seed)
        errors |= {"after": after, "temperature": temperature}
    probabilities = np.exp(log_probabilities)
    counts = confusion(target_N, np.asarray(logits_NK).argmax(axis=1), len(names))
    results = {
        **accuracies(ranks_N, target_N, len(names), seed=seed),
        "calibration": errors,
        "reliability": reliability(probabilities, target_N),
        "confusion": counts.tolist(),
        "per_class": per_class(counts, names, seed=seed),
        "names": list(names),
    }
    own = log_probabilities[np.arange(len(target_N)), target_N]
    return Judged(results, list(names), target_N, probabilities, ranks_N < 1, own)


def repeated_images(test: Embeddings, train: Embeddings, judged: Mapping[str, Judged]) -> dict[str, Any]:
    """Test images that the training set seems to hold.

    `{"look": {"distance", "images"}, "embedding": {"cosine", "images"}, "both", "pairs", "without": {TASK: M}}`.
    look: how many test images have a training image whose difference hash differs in at most `distance` of 256 bits;
    embedding: … whose features before the projection have at least that cosine. pairs: the nearest by both,
    `[test key, train key, bits, cosine]`. without: top-1 on the test images that neither finds.
    """
    assert test.looks is not None and train.looks is not None
    assert test.image_tower is not None and train.image_tower is not None
    look = nearest_look(test.looks, train.looks)
    place = nearest_embedding(test.image_tower, train.image_tower)
    same_look, same_place = look.value <= LOOK, place.value >= COSINE
    both = np.flatnonzero(same_look & same_place)
    order = both[np.lexsort((-place.value[both], look.value[both]))][:SHOWN]
    pairs = [
        [test.keys[row], train.keys[place.row[row]], int(look.value[row]), float(place.value[row])] for row in order
    ]
    fresh = ~(same_look | same_place)
    return {
        "look": {"distance": LOOK, "images": int(same_look.sum())},
        "embedding": {"cosine": COSINE, "images": int(same_place.sum())},
        "both": len(both),
        "pairs": pairs,
        "fresh": int(fresh.sum()),
        "without": {task: share(one.right[fresh]) for task, one in judged.items() if fresh.any()},
    }


def reliability(
    probabilities_NK: NDArray[np.floating], target_N: NDArray[np.int64], bins: int = 15
) -> list[dict[str, Any]]:
    """Of each bin of confidence that holds samples: `{"confidence", "accuracy", "samples"}`, means of the bin."""
    return [dict(row) for row in calibration.reliability(probabilities_NK, target_N, bins=bins)]
