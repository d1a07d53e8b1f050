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
from contrastive.evaluation.class_names import ClassNames, named_labels
from contrastive.evaluation.class_weights import ClassWeight
from contrastive.evaluation.embed import Extracted, Progress, extract, on_pixels
from contrastive.evaluation.items import Images
from contrastive.evaluation.labelled import check_labels_given, open_labelled
from contrastive.evaluation.labels import spelling_remarks
from contrastive.evaluation.metrics import accuracies, class_ranks
from contrastive.evaluation.probe import LinearProbe
from contrastive.evaluation.protocol import Model
from contrastive.evaluation.remarks import source_remarks
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
    C: float | Sequence[float] | str | None = None,
    partial: Sequence[float] = (),
    features: str = "tower",
    label: str | None = None,
    class_names: ClassNames | None = None,
    class_weight: ClassWeight = None,
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
        C, seed: see `LinearProbe`.  partial: shares of the training set, such as (0.01, 0.1, 1.0), to fit the
        model's probe to as well; each is a part of the next larger, drawn class by class, at least two samples of a
        class that has them.  features: "tower" (before the projection) or "projected".
        class_names: names for the labels of both sets, see `class_name_map`.  class_weight: see `LinearProbe`, of all
        probes.
        label, invert, batch_size, dtype, progress: see `open_labelled` and `embed`.

    Returns:
        results: `{"model", "random", "pixels"}`, each
        `{"top1", "top5", "mean_per_class", "C", "kkt", "width", "validation_curve", "border"}`
        (border: the best strength is the first or last of those tried), and
        `{"train_size", "test_size", "classes", "seconds", "features", "class_weight", "remarks"}`, and with `partial`
        `"partial"`: one `{"share", "samples", "top1", "top5", "mean_per_class", "C", …}` a share. `"majority"`:
        `{"value"}`, the share of test images in the commonest training class. Pixels are the centre square at its
        own size, at most 32 x 32, in one channel when all of them are grey, from 0 to 1.

    Raises:
        UserError: no labels, fewer than two classes, a test label that the training set lacks.
    """
    started = time.perf_counter()
    if partial and test is None:
        raise UserError("partial: shares of the training set are compared on a test set; name one, or leave it out")
    if features not in ("projected", "tower"):
        raise UserError(f"features: '{features}' is unknown; use tower or projected")
    remarks: list[str] = []
    functions: dict[str, Callable[[list[Image.Image]], NDArray[Any]]] = {"model": _features(model, features)}
    if test is not None:
        if random_model is not None:
            functions["random"] = _features(random_model(), features)
        functions["pixels"] = _Pixels()

    def read(source: Images) -> tuple[Extracted, NDArray[np.str_]]:
        opened = open_labelled(source, label=label)
        found = extract(model, opened, functions, batch_size=batch_size, invert=invert, dtype=dtype, progress=progress)
        keys = [record.key for record in found.records]
        labels = check_labels_given(str(source), [record.label for record in found.records], keys, opened)
        remarks.extend(line for line in source_remarks(opened, captions=False) if line not in remarks)
        return found, np.asarray(named_labels(labels, class_names, f"{source}: class names"))

    def fitted_probe(rows: NDArray[Any], labels: NDArray[np.str_]) -> LinearProbe:
        return LinearProbe(C, seed=seed, class_weight=class_weight).fit(rows, labels)

    train_found, train_labels = read(train)
    remarks += spelling_remarks(sorted(set(train_labels)))
    fitted = {"features": features, "train_size": len(train_labels), "classes": len(set(train_labels))}
    fitted |= {"class_weight": class_weight, "remarks": remarks}
    if test is None:
        probe = fitted_probe(train_found.features["model"], train_labels)
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
        probe = probes[name] = fitted_probe(rows_train, train_labels)
        results[name] = _measure(probe, rows_test, test_labels)
        if name == "model" and partial:
            results["partial"] = [
                {"share": part, "samples": len(rows)}
                | _measure(fitted_probe(rows_train[rows], train_labels[rows]), rows_test, test_labels)
                for part, rows in _parts(train_labels, partial, seed)
            ]
    names, counts = np.unique(train_labels, return_counts=True)
    results["majority"] = {"value": float((test_labels == names[counts.argmax()]).mean())}
    results["seconds"] = time.perf_counter() - started
    return ProbeOutcome(probes["model"], results, train_found.failures | test_found.failures)


def _features(model: Model, kind: str) -> Callable[[list[Image.Image]], NDArray[np.float32]]:
    if isinstance(model, torch.nn.Module):
        model.eval()  # of the random model; `extract` sees to the main one
    return on_pixels(model, model.encode_image if kind == "projected" else model.image_features)


def _summary(probe: LinearProbe) -> dict[str, Any]:
    return {
        "C": probe.C_,
        "kkt": probe.kkt_,
        "width": probe.coef_.shape[1],
        "validation_curve": probe.validation_curve_,
        "border": len(probe.curve_) > 1 and probe.C_ in (probe.curve_[0]["C"], probe.curve_[-1]["C"]),
    }


def _measure(probe: LinearProbe, rows: NDArray[Any], labels: NDArray[np.str_]) -> dict[str, Any]:
    target = np.searchsorted(probe.classes_, labels)
    ranks = class_ranks(probe.logits(rows), target)
    return accuracies(ranks, target, len(probe.classes_)) | _summary(probe)


def _parts(labels: NDArray[np.str_], shares: Sequence[float], seed: int) -> list[tuple[float, NDArray[np.int64]]]:
    """Row numbers of each share: of every class its share, but two where there are two, so that C can be chosen."""
    wrong = [share for share in shares if not 0 < share <= 1]
    if wrong:
        raise UserError(f"partial: {wrong[0]} is no share; give numbers above 0 and up to 1, such as 0.01, 0.1, 1")
    random = np.random.default_rng(seed)
    orders = [random.permutation(np.flatnonzero(labels == name)) for name in np.unique(labels)]
    return [
        (share, np.sort(np.concatenate([rows[: max(2, round(share * len(rows)))] for rows in orders])))
        for share in sorted(shares)
    ]


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
