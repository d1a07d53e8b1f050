"""The linear probe beside its controls: what would the same classifier make of features that nobody trained?

A probe's accuracy says little alone. On easy sets a random tower of the same shape, or the pixels themselves,
give much of it; the difference is what pretraining brought.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from contrastive.errors import UserError
from contrastive.evaluation.embed import Extracted, Images, Progress, extract, on_pixels
from contrastive.evaluation.labelled import check_complete, open_labelled
from contrastive.evaluation.metrics import accuracies, class_ranks
from contrastive.evaluation.probe import LinearProbe
from contrastive.evaluation.protocol import Model
from contrastive.shards import resize_square

PIXEL_SIDE = 32  # 1,024 numbers a grey image, 3,072 a colour image


@dataclass(frozen=True)
class ProbeOutcome:
    """`probe`: the one on the model's features. `results`: as in `probe_with_controls`. `failures`: key ->
    reason.
    """

    probe: LinearProbe
    results: dict[str, Any]
    failures: dict[str, str]


def probe_with_controls(
    model: Model,
    train: Images,
    test: Images | None,
    random_model: Callable[[], Model] | None = None,
    *,
    C: float | Sequence[float] | None = None,
    features: str = "tower",
    label: str | None = None,
    invert: bool = False,
    seed: int = 0,
    batch_size: int = 256,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> ProbeOutcome:
    """A linear probe on the model's features, on those of a random model, and on the pixels.

    All three choose their strength on a split of `train`; `test` is looked at once by each, at the end.

    Args:
        train, test: labelled sources. With test = None only the model's probe is fitted and nothing is
        measured. random_model: makes the same architecture with fresh weights; None leaves that control out.
        C, seed: see `LinearProbe`.  features: "tower" (before the projection) or "projected".
        label, invert, batch_size, dtype, progress: see `open_labelled` and `embed`.

    Returns:
        results: `{"model", "random", "pixels"}`, each
        `{"top1", "top5", "mean_per_class", "C", "width", "validation_curve"}`, and
        `{"train_size", "test_size", "classes", "seconds", "features"}`. Pixels are the centre square at its
        own size, at most 32 x 32, in one channel when all of them are grey, from 0 to 1.

    Raises:
        UserError: no labels, fewer than two classes, a test label that the training set lacks.
    """
    started = time.perf_counter()
    if features not in ("projected", "tower"):
        raise UserError(f"features: '{features}' is unknown; use tower or projected")
    functions: dict[str, Callable[[list[Image.Image]], NDArray[Any]]] = {"model": _features(model, features)}
    if test is not None:
        if random_model is not None:
            functions["random"] = _features(random_model(), features)
        functions["pixels"] = _Pixels()

    def read(source: Images) -> tuple[Extracted, NDArray[np.str_]]:
        opened = open_labelled(source, label=label)
        found = extract(model, opened, functions, batch_size=batch_size, invert=invert, dtype=dtype, progress=progress)
        keys = [record.key for record in found.records]
        return found, np.asarray(check_complete(str(source), [record.label for record in found.records], keys))

    train_found, train_labels = read(train)
    fitted = {"features": features, "train_size": len(train_labels), "classes": len(set(train_labels))}
    if test is None:
        probe = LinearProbe(C, seed=seed).fit(train_found.features["model"], train_labels)
        results = fitted | {"model": _summary(probe), "seconds": time.perf_counter() - started}
        return ProbeOutcome(probe, results, train_found.failures)

    test_found, test_labels = read(test)
    unknown = sorted(set(test_labels) - set(train_labels))
    if unknown:
        raise UserError(
            f"{test}: labels that {train} has not: {', '.join(unknown[:5])}; take them out or train on them"
        )
    grey = all(_is_grey(found.features["pixels"]) for found in (train_found, test_found))
    results = dict(fitted, test_size=len(test_labels))
    probes = {}
    for name in functions:
        rows_train, rows_test = (found.features[name] for found in (train_found, test_found))
        if name == "pixels":
            rows_train, rows_test = _flat(rows_train, grey), _flat(rows_test, grey)
        probe = probes[name] = LinearProbe(C, seed=seed).fit(rows_train, train_labels)
        target = np.searchsorted(probe.classes_, test_labels)
        ranks = class_ranks(probe.logits(rows_test), target)
        results[name] = accuracies(ranks, target, len(probe.classes_)) | _summary(probe)
    results["seconds"] = time.perf_counter() - started
    return ProbeOutcome(probes["model"], results, train_found.failures | test_found.failures)


def _features(model: Model, kind: str) -> Callable[[list[Image.Image]], NDArray[np.float32]]:
    if isinstance(model, torch.nn.Module):
        model.eval()  # of the random model; `extract` sees to the main one
    return on_pixels(model, model.encode_image if kind == "projected" else model.image_features)


def _summary(probe: LinearProbe) -> dict[str, Any]:
    return {"C": probe.C_, "width": probe.coef_.shape[1], "validation_curve": probe.validation_curve_}


class _Pixels:
    """Images as uint8 squares (N, 3, s, s); s is settled by the first image, so that all rows have one
    width.
    """

    side: int | None = None

    def __call__(self, images: list[Image.Image]) -> NDArray[np.uint8]:
        if self.side is None:
            self.side = min(PIXEL_SIDE, *images[0].size)
        return np.stack([resize_square(image, self.side) for image in images])


def _is_grey(pixels: NDArray[np.uint8]) -> bool:
    return bool((pixels[:, :1] == pixels[:, 1:]).all())


def _flat(pixels: NDArray[np.uint8], grey: bool) -> NDArray[np.float32]:
    kept = pixels[:, :1] if grey else pixels
    return kept.reshape(len(kept), -1).astype(np.float32) / np.float32(255)
