"""The linear probe of an evaluation, on embeddings that are there already, beside its controls.

`controls.probe_with_controls` makes features and fits; here the features are those that every other task uses too, so
that each image goes through the model once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from contrastive.evaluation.classification import Judged, judge
from contrastive.evaluation.controls import PIXEL_SIDE
from contrastive.evaluation.items import Images, decoded_images
from contrastive.evaluation.metrics import accuracies, class_ranks
from contrastive.evaluation.probe import LinearProbe
from contrastive.shards import resize_square

HELD = 0.15  # of the training images, for the temperature


def fit_probes(
    rows: Mapping[str, tuple[NDArray[np.floating], NDArray[np.floating]]],
    train_labels: NDArray[np.str_],
    test_labels: NDArray[np.str_],
    *,
    seed: int = 0,
) -> tuple[LinearProbe, dict[str, Any]]:
    """A probe on each kind of features, measured on the test images.

    rows: name -> (train (N, F), test (M, F)); the first is the model's.

    Returns:
        the model's probe, and name -> `{"top1", "top5", "mean_per_class", "C", "width", "validation_curve"}`. Every
        strength is chosen on a part of the training images; the test images are used once by each probe.
    """
    probes: list[LinearProbe] = []
    results: dict[str, Any] = {}
    for name, (train_NF, test_MF) in rows.items():
        probe = LinearProbe(seed=seed).fit(train_NF, train_labels)
        target = np.searchsorted(probe.classes_, test_labels)
        ranks = class_ranks(probe.logits(test_MF), target)
        results[name] = accuracies(ranks, target, len(probe.classes_), seed=seed) | {
            "C": probe.C_,
            "width": train_NF.shape[1],
            "validation_curve": probe.validation_curve_,
        }
        probes.append(probe)
    return probes[0], results


def judge_probe(
    probe: LinearProbe,
    train_NF: NDArray[np.floating],
    train_labels: NDArray[np.str_],
    test_MF: NDArray[np.floating],
    test_labels: NDArray[np.str_],
    *,
    seed: int = 0,
) -> Judged:
    """The probe's measures. Its temperature comes from images held out of a second fit at the same strength.

    Without one where a class would be left without images to fit on.
    """
    names = [str(one) for one in probe.classes_]
    place = {name: index for index, name in enumerate(names)}

    def positions(labels: ArrayLike) -> NDArray[np.int64]:
        return np.asarray([place[label] for label in np.asarray(labels)], dtype=np.int64)

    held = np.random.default_rng(seed).random(len(train_labels)) < HELD
    validation = None
    if held.any() and set(train_labels[~held]) == set(names):
        fitted = LinearProbe(probe.C_).fit(train_NF[~held], train_labels[~held])
        validation = (fitted.logits(train_NF[held]), positions(train_labels[held]))
    return judge(probe.logits(test_MF), positions(test_labels), names, validation=validation, seed=seed)


def pixel_rows(sources: tuple[Images, Images], *, invert: bool = False) -> tuple[NDArray[Any], NDArray[Any]]:
    """The pixels of two sources as rows from 0 to 1: the centre square, at most 32 x 32 and no larger than the first
    image; one channel where all images are grey. Images that cannot be read are left out, as in `embed`.
    """
    side = 0
    squares: list[list[NDArray[np.uint8]]] = [[], []]
    for kept, source in zip(squares, sources, strict=True):
        for image in decoded_images(source, invert=invert):
            side = side or min(PIXEL_SIDE, *image.size)
            kept.append(resize_square(image, side))
    train, test = (np.stack(kept) for kept in squares)
    grey = all(bool((part[:, :1] == part[:, 1:]).all()) for part in (train, test))
    channels = slice(0, 1 if grey else 3)
    rows = [part[:, channels].reshape(len(part), -1).astype(np.float32) / np.float32(255) for part in (train, test)]
    return rows[0], rows[1]
