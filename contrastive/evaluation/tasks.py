"""The evaluations that commands and the end of a training run share: a labelled set, and a set of pairs.

Each returns `Evaluation`: `results` is plain data for JSON, `examples` holds images for the report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.special import softmax

from contrastive.errors import UserError
from contrastive.evaluation.controls import probe_with_controls
from contrastive.evaluation.embed import Embeddings, Images, Progress, embed, open_images
from contrastive.evaluation.labelled import open_labelled
from contrastive.evaluation.metrics import accuracies, class_ranks, share
from contrastive.evaluation.protocol import Model
from contrastive.evaluation.retrieval import best_hits, recalls, retrieval_ranks
from contrastive.evaluation.templates import read_templates
from contrastive.evaluation.zeroshot import ZeroShotClassifier, check_labels
from contrastive.shards import Rejected, ShardIndex, caption_id, decode_image

LABELLED_TASKS = ("zeroshot", "probe")


@dataclass(frozen=True)
class Case:
    """One image, its name, and the likeliest names with their probabilities, best first."""

    image: Image.Image
    truth: str
    guesses: list[tuple[str, float]]


@dataclass(frozen=True)
class Hits:
    """The images that one caption finds: `(image, its own caption, is it right)`, best first."""

    caption: str
    images: list[tuple[Image.Image, str, bool]]


@dataclass(frozen=True)
class Examples:
    """Images for the report."""

    hits: list[Hits] = field(default_factory=list)
    right: list[Case] = field(default_factory=list)
    wrong: list[Case] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """`results`: see the function that made it. `examples`: empty unless asked for."""

    results: dict[str, Any]
    examples: Examples = field(default_factory=Examples)

    def scalars(self) -> dict[str, float]:
        """The bare values of a set of pairs, to log: `image_to_text/recall@1`, …, `zeroshot/top1`, …"""
        groups = {**self.results.get("retrieval", {}), "zeroshot": self.results.get("zeroshot", {})}
        return {
            f"{group}/{name}": entry["value"]
            for group, entries in groups.items()
            for name, entry in entries.items()
            if name.startswith(("recall@", "top"))
        }


def evaluate_pairs(
    model: Model,
    source: Images,
    *,
    name: str = "validation",
    examples: int = 0,
    invert: bool = False,
    batch_size: int = 256,
    workers: int = 0,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Retrieval in both directions, and zero-shot classification among the set's distinct captions.

    Captions that are equal apart from case and white space are one (`contrastive.shards.caption_id`).

    Args:
        source: images with captions (only the first of each is used): a `ShardIndex` or anything that `embed`
        takes. examples: how many captions, and how many right and wrong cases, to keep images of.

    Returns:
        results: `{"name", "kind": "pairs", "samples", "captions", "retrieval": {"image_to_text": {"recall@1":
        M, "recall@5", "recall@10"}, "text_to_image": …}, "zeroshot": {"top1": M, "top5": M}, "rejected",
        "seconds"}` where M is `{"value", "low", "high", "chance"}`, a 95 % interval over samples.

    Raises:
        UserError: images without captions, or none that can be read.
    """
    started = time.perf_counter()
    found = embed(
        model,
        source,
        batch_size=batch_size,
        workers=workers,
        text=True,
        invert=invert,
        dtype=dtype,
        progress=progress,
    )
    if found.text is None:
        without = [
            key
            for key, caption in zip(found.keys, found.captions or [""] * len(found.keys), strict=True)
            if not caption
        ]
        raise UserError(
            f"{name}: {len(without)} of {len(found.keys)} images have no caption, the first is {without[0]}; "
            "retrieval needs pairs"
        )
    captions = found.captions or []
    ids = np.asarray([caption_id(caption) for caption in captions], dtype=np.int64)
    unique, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    weights_KD = found.text[first]
    ranks = retrieval_ranks(found.image, weights_KD, ids, unique)
    results = {
        "name": name,
        "kind": "pairs",
        "samples": len(ids),
        "captions": len(unique),
        "retrieval": recalls(found.image, found.text, ids, seed=seed),
        "zeroshot": {f"top{k}": share(ranks < k, seed=seed) | {"chance": min(1.0, k / len(unique))} for k in (1, 5)},
        "rejected": found.rejected,
        "seconds": time.perf_counter() - started,
    }
    shown = Examples()
    if examples:
        names = [captions[index] for index in first]
        shown = _examples(model, source, found, weights_KD, names, inverse, examples, seed, invert)
    return Evaluation(results, shown)


def evaluate_labelled(
    model: Model,
    name: str,
    train: Images | None,
    test: Images,
    tasks: Sequence[str] = LABELLED_TASKS,
    templates: str | Path | Sequence[str] | None = None,
    *,
    labels: Sequence[str] | None = None,
    label: str | None = None,
    invert: bool = False,
    random_model: Callable[[], Model] | None = None,
    examples: int = 0,
    batch_size: int = 256,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Zero-shot accuracy on a labelled set, and a linear probe beside its controls.

    Args:
        train: for the probe only.  test: what is measured on.
        tasks: of "zeroshot" and "probe".  templates: see `ZeroShotClassifier`.
        labels: the classes of zero-shot, when there are more than `test` holds; None takes those of `test`.
        label: column of the labels.  invert: see `embed`.  random_model: see `probe_with_controls`.
        examples: how many right and wrong zero-shot cases to keep images of.

    Returns:
        results: `{"name", "kind": "labelled", "samples", "classes", "invert", "templates", "zeroshot":
        {"top1": M, "top5": M, "mean_per_class": M, "seconds"}, "probe": …, "rejected", "seconds"}`, the parts
        asked for; M as in `evaluate_pairs`, "probe" as in `probe_with_controls`.

    Raises:
        UserError: an unknown task, no labels, a label of `test` that is not in `labels`, a probe without
        `train`.
    """
    started = time.perf_counter()
    unknown = [task for task in tasks if task not in LABELLED_TASKS]
    if unknown or not tasks:
        raise UserError(f"{name}: tasks: '{', '.join(unknown)}': use some of {', '.join(LABELLED_TASKS)}")
    if "probe" in tasks and train is None:
        raise UserError(f"{name}: tasks: a probe needs a labelled training set beside the test set; name one as train")
    source = open_labelled(test, label=label)
    results: dict[str, Any] = {"name": name, "kind": "labelled", "invert": invert}
    shown = Examples()
    if "zeroshot" in tasks:
        wordings = read_templates(templates)
        found = embed(model, source, batch_size=batch_size, text=False, invert=invert, dtype=dtype, progress=progress)
        if found.labels is None:
            raise UserError(f"{name}: some images have no label; give every image one")
        names = check_labels(sorted(set(found.labels)) if labels is None else labels)
        missing = sorted(set(found.labels) - set(names))
        if missing:
            raise UserError(f"{name}: labels that are not among those given: {', '.join(missing[:5])}")
        classifier = ZeroShotClassifier(model, names, wordings, batch_size=batch_size, dtype=dtype)
        position = {label: index for index, label in enumerate(names)}
        target = np.asarray([position[label] for label in found.labels])
        ranks = class_ranks(classifier.decision_function(found.image), target)
        results |= {
            "samples": len(target),
            "classes": len(names),
            "templates": list(wordings),
            "zeroshot": accuracies(ranks, target, len(names), seed=seed) | {"seconds": time.perf_counter() - started},
            "rejected": found.rejected,
        }
        if examples:
            weights_KD = classifier.weights_.T
            shown = _examples(model, source, found, weights_KD, names, target, examples, seed, invert, hits=False)
    if "probe" in tasks:
        assert train is not None
        outcome = probe_with_controls(
            model,
            train,
            source,
            random_model,
            label=label,
            invert=invert,
            seed=seed,
            batch_size=batch_size,
            dtype=dtype,
            progress=progress,
        )
        results["probe"] = outcome.results
        results.setdefault("samples", outcome.results["test_size"])
        results.setdefault("classes", outcome.results["classes"])
        results.setdefault("rejected", {})
    results["seconds"] = time.perf_counter() - started
    return Evaluation(results, shown)


def _examples(
    model: Model,
    source: Images,
    found: Embeddings,
    weights_KD: NDArray[np.float32],
    names: Sequence[str],
    target_N: NDArray[np.int64],
    count: int,
    seed: int,
    invert: bool = False,
    hits: bool = True,
) -> Examples:
    """A seeded draw of `count` names with their best 8 images, and of `count` right and wrong images."""
    random = np.random.default_rng(seed)
    scale = float(model.logit_scale.detach().exp())
    logits_NK = scale * (found.image @ weights_KD.T)
    best_N = logits_NK.argmax(axis=1)
    right, wrong = (
        random.permutation(np.flatnonzero((best_N == target_N) == wanted))[:count] for wanted in (True, False)
    )
    queries = random.choice(len(names), size=min(count, len(names)), replace=False) if hits else np.empty(0, int)
    hit_QK, _ = best_hits(weights_KD[queries], found.image, 8) if hits else (np.empty((0, 8), int), None)
    images = _images(source, {found.keys[row] for row in (*right, *wrong, *hit_QK.ravel())}, invert)

    def case(row: int) -> Case:
        order = np.argsort(-logits_NK[row])[:3]
        chances = softmax(logits_NK[row])[order]
        guesses = [(names[k], float(p)) for k, p in zip(order, chances, strict=True)]
        return Case(images[found.keys[row]], names[target_N[row]], guesses)

    def hit(query: int, rows: NDArray[np.int64]) -> Hits:
        return Hits(
            names[query],
            [(images[found.keys[row]], names[target_N[row]], bool(target_N[row] == query)) for row in rows],
        )

    return Examples(
        hits=[hit(query, rows) for query, rows in zip(queries, hit_QK, strict=True)],
        right=[case(row) for row in right],
        wrong=[case(row) for row in wrong],
    )


def _images(source: Images, keys: set[str], invert: bool) -> dict[str, Image.Image]:
    """The images with these keys, no larger than 96 pixels: a second pass, that decodes only them."""
    images = {}
    if isinstance(source, ShardIndex):  # random access: the other images are not read
        numbers = [i for i in range(len(source)) if source.key(i) in keys]
        records: Any = map(source.record, numbers)
    else:
        records = open_images(source)
    for record in records:
        if record.key in keys and record.image is not None:
            try:
                image = decode_image(record.image)
            except Rejected:  # the same key twice, one of them damaged
                continue
            image.thumbnail((96, 96))
            images[record.key] = ImageOps.invert(image) if invert else image
    return images
