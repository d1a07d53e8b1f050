"""The evaluations that commands and the end of a training run share: a labelled set, and a set of pairs.

Each returns `Evaluation`: `results` is plain data for JSON, the rest is for the report, the table of predictions and
the comparison of two models. Every image goes through the model once, whatever the number of tasks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from contrastive.errors import UserError
from contrastive.evaluation.checks import check_finite, check_known, check_trained, possible_shots
from contrastive.evaluation.class_names import ClassNames, named_labels
from contrastive.evaluation.classification import Judged, judge, repeated_images
from contrastive.evaluation.embed import Embeddings, Progress, embed, embed_texts
from contrastive.evaluation.examples import Examples, draw_examples
from contrastive.evaluation.figures import Map, embedding_map
from contrastive.evaluation.items import Images
from contrastive.evaluation.labelled import check_labels_given, no_label, open_labelled
from contrastive.evaluation.labels import check_labels, check_several, in_order, number_remark, spelling_remarks
from contrastive.evaluation.predictions import Predictions
from contrastive.evaluation.probed import fit_probes, judge_probe, pixel_rows
from contrastive.evaluation.protocol import Model
from contrastive.evaluation.remarks import source_remarks
from contrastive.evaluation.retrieval import KS, hubness_by_direction, recalls
from contrastive.evaluation.template_spread import template_spread
from contrastive.evaluation.templates import read_templates
from contrastive.evaluation.zeroshot import ZeroShotClassifier

LABELLED_TASKS = ("zeroshot", "probe", "fewshot", "knn", "retrieval")
NEED_TRAIN = {"probe", "fewshot", "knn"}
SHOTS, SEEDS = (1, 2, 4, 8, 16), 10
TOPS = (1, 5)
SCALARS = (  # of a set of pairs, see `Evaluation.scalars`
    *(f"{way}/recall@{k}" for way in ("image_to_text", "text_to_image") for k in KS),
    *(f"zeroshot/top{k}" for k in TOPS),
)


@dataclass(frozen=True)
class Evaluation:
    """results: see the function that made it.  examples: empty unless asked for.

    predictions: of the classifiers; None for pairs.  samples: name of a measure -> one value a sample, bool or float,
    what two models are compared on.  map: the images as points, when examples are asked for.
    """

    results: dict[str, Any]
    examples: Examples = field(default_factory=Examples)
    predictions: Predictions | None = None
    samples: dict[str, NDArray[Any]] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    map: Map | None = None

    def scalars(self) -> dict[str, float]:
        """The bare values of a set of pairs, to log: `image_to_text/recall@1`, …, `zeroshot/top1`, …"""
        groups = {**self.results.get("retrieval", {}), "zeroshot": self.results.get("zeroshot", {})}
        return {
            f"{group}/{name}": entry["value"]
            for group, entries in groups.items()
            for name, entry in entries.items()
            if f"{group}/{name}" in SCALARS
        }


def evaluate_labelled(
    model: Model,
    name: str,
    train: Images | None,
    test: Images,
    tasks: Sequence[str] = ("zeroshot", "probe"),
    templates: str | Path | Sequence[str] | None = None,
    *,
    labels: Sequence[str] | None = None,
    shots: Sequence[int] | None = None,
    label: str | None = None,
    class_names: ClassNames | None = None,
    invert: bool = False,
    random_model: Callable[[], Model] | None = None,
    examples: int = 0,
    batch_size: int = 256,
    workers: int = 0,
    dtype: torch.dtype | None = None,
    cache: str | PathLike[str] | None = None,
    max_unreadable: float = 0.05,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Classifiers on a labelled set: zero-shot, a linear probe beside its controls, few shots, neighbours, retrieval.

    Args:
        train: what classifiers learn from, and the split that temperatures are set on; zero-shot and retrieval do
            without.  test: what is measured on.
        tasks: some of `LABELLED_TASKS`.  templates: see `ZeroShotClassifier`.
        labels: the classes of zero-shot, when there are more than `test` holds; None takes those of `test`.
        shots: training images a class of "fewshot"; None takes those of 1, 2, 4, 8, 16 that every class has.
        label: column of the labels.  class_names: names for the labels of both sets, see `class_name_map`; `labels`
            are compared with these names.  invert, cache, max_unreadable, workers: see `embed`.
        random_model: makes the same architecture with fresh weights, the probe's control; None leaves it out.
        examples: how many right, wrong and most wrong cases to keep images of.

    Returns:
        results: `{"name", "kind": "labelled", "samples", "classes", "invert", "templates", "rejected", "failures",
        "content", "content_train", "seconds", "remarks"}` and a part for each task: "zeroshot" and "probe" as in
        `judge` (the probe with "model", "random" and "pixels" as in `fit_probes`), "fewshot" and "knn" as those
        functions give them ("shots": those that were tried), "retrieval" as in `recalls`, between images and the
        prompts of their labels. With `train`: "duplicates". With several templates: "wording", see `template_spread`.

    Raises:
        UserError: an unknown task, no labels, a label of `test` that is not in `labels`, a task that needs `train`
        without it, a class of `test` that `train` has not, a class with fewer images than `shots`, too many unreadable
        images, features that are not finite.
    """
    started = time.perf_counter()
    remarks: list[str] = []
    unknown = [task for task in tasks if task not in LABELLED_TASKS]
    if unknown or not tasks:
        raise UserError(f"{name}: tasks: '{', '.join(unknown)}': use some of {', '.join(LABELLED_TASKS)}")
    need = [task for task in tasks if task in NEED_TRAIN]
    if need and train is None:
        raise UserError(
            f"{name}: tasks: {', '.join(need)} needs a labelled training set beside the test set; name one as train"
        )

    def read(source: Images, model: Model) -> tuple[Images, Embeddings, NDArray[np.str_]]:
        opened = open_labelled(source, label=label)
        kept = source if label is None and isinstance(source, (str, PathLike)) else opened  # a path names its cache
        found = embed(
            model,
            kept,
            batch_size=batch_size,
            workers=workers,
            features="both",
            text=False,
            invert=invert,
            dtype=dtype,
            cache=cache,
            max_unreadable=max_unreadable,
            progress=progress,
        )
        if found.labels is None:
            raise no_label(f"{name}: {source}", found.unlabelled, opened)
        check_labels_given(f"{name}: {source}", found.labels, found.keys, opened)
        check_finite(str(source), found.keys, found.image)
        of_source = source_remarks(opened, captions=False)  # retrieval takes the prompts of labels here
        remarks.extend(line for line in of_source if line not in remarks)
        named = named_labels(found.labels, class_names, f"{source}: class names")
        return kept, found, np.asarray(named)

    source, found, test_labels = read(test, model)
    names = check_labels(in_order(test_labels) if labels is None else labels)
    check_known(name, test_labels, names)
    if "zeroshot" in tasks:
        check_several(names, "zero-shot needs images of at least two classes, or more labels")
    remarks += spelling_remarks(names)
    if {"zeroshot", "retrieval"} & set(tasks):
        remarks += number_remark(names)
    target = _positions(test_labels, names)
    templates_used = read_templates(templates)
    prompts = [template.replace("{}", one) for one in names for template in templates_used]
    results: dict[str, Any] = {
        "name": name,
        "kind": "labelled",
        "invert": invert,
        "samples": len(target),
        "classes": len(names),
        "templates": list(templates_used),
        "rejected": found.rejected,
        "content": found.content,
    }
    if found.failures:
        results["failures"] = found.failures
    timed = _Clock()
    train_found, train_labels = None, np.empty(0, str)
    if train is not None:
        train_source, train_found, train_labels = read(train, model)
        results["content_train"] = train_found.content
        if need:
            check_trained(name, train, train_labels, test_labels)
        if "fewshot" in tasks:
            results["shots_asked"] = shots is not None
            results["shots"] = possible_shots(name, train_labels, shots, SHOTS)
    controls: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    if "probe" in tasks:
        assert train is not None
        if random_model is not None:
            fresh = random_model()
            towers = [read(one, fresh)[1].image_tower for one in (train, test)]
            assert towers[0] is not None and towers[1] is not None
            controls["random"] = (towers[0], towers[1])
        controls["pixels"] = pixel_rows((train_source, source), invert=invert)
    results["seconds_embedding"] = time.perf_counter() - started
    judged: dict[str, Judged] = {}
    samples: dict[str, NDArray[Any]] = {}
    classifier = ZeroShotClassifier(model, names, templates_used, batch_size=batch_size, dtype=dtype)

    if "zeroshot" in tasks:
        with timed("zeroshot"):
            validation = None
            if train_found is not None and set(train_labels) <= set(names):
                validation = (classifier.decision_function(train_found.image), _positions(train_labels, names))
            logits = classifier.decision_function(found.image)
            judged["zeroshot"] = judge(logits, target, names, validation=validation, seed=seed)
            results["zeroshot"] = judged["zeroshot"].results
            if len(templates_used) > 1:
                results["wording"] = template_spread(
                    model, found.image, target, names, templates_used, batch_size=batch_size, dtype=dtype, seed=seed
                )
    if "probe" in tasks:
        with timed("probe"):
            assert train_found is not None
            assert found.image_tower is not None and train_found.image_tower is not None
            fitted = {"model": (train_found.image_tower, found.image_tower), **controls}
            probe, measured = fit_probes(fitted, train_labels, test_labels, seed=seed)
            judged["probe"] = judge_probe(
                probe, train_found.image_tower, train_labels, found.image_tower, test_labels, seed=seed
            )
            sizes = {"train_size": len(train_labels), "test_size": len(test_labels), "classes": len(probe.classes_)}
            results["probe"] = sizes | {"features": "tower"} | measured | judged["probe"].results
    if need:
        assert train_found is not None
        train_target = _positions(train_labels, sorted(set(train_labels)))
        test_target = _positions(test_labels, sorted(set(train_labels)))
    if "fewshot" in tasks:
        from contrastive.evaluation.fewshot import few_shot

        with timed("fewshot"):
            assert train_found is not None
            text_DK = ZeroShotClassifier(
                model, sorted(set(train_labels)), templates_used, batch_size=batch_size, dtype=dtype
            ).weights_
            results["fewshot"] = few_shot(
                train_found.image,
                train_target,
                found.image,
                test_target,
                text_DK,
                shots=results["shots"],
                seeds=SEEDS,
            )
    if "knn" in tasks:
        from contrastive.evaluation.knn import knn_sweep

        with timed("knn"):
            assert train_found is not None
            results["knn"] = knn_sweep(train_found.image, train_target, found.image, test_target)
    if "retrieval" in tasks:
        with timed("retrieval"):
            text = embed_texts(model, prompts, batch_size=batch_size, dtype=dtype)
            prompt_ids = np.repeat(np.arange(len(names)), len(templates_used))
            results["retrieval"] = recalls(found.image, text, target, prompt_ids, seed=seed)
            results["hubness"] = hubness_by_direction(found.image, text)
    for task, one in judged.items():
        samples |= {f"{task}/top1": one.right, f"{task}/log-likelihood": one.log_likelihood}
    if train_found is not None:
        with timed("duplicates"):
            results["duplicates"] = repeated_images(found, train_found, judged)
    if remarks:
        results["remarks"] = remarks
    results["seconds_by_part"] = timed.seconds
    for task in judged:
        results[task]["seconds"] = timed.seconds[task]
    results["seconds"] = time.perf_counter() - started
    shown, points = Examples(), None
    if examples:
        points = embedding_map(found.image, target, names, seed=seed)
        if judged:
            task, one = next(reversed(judged.items()))  # the probe where there is one: the better classifier
            shown = draw_examples(
                source, found, one.probabilities, one.names, one.target, examples, task=task, seed=seed, invert=invert
            )
    chances = {task: (one.names, one.probabilities) for task, one in judged.items()}
    predictions = Predictions(found.keys, test_labels.tolist(), chances)
    return Evaluation(results, shown, predictions, samples, found.keys, points)


class _Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - started


def _positions(labels: Any, names: Sequence[str]) -> NDArray[np.int64]:
    place = {name: index for index, name in enumerate(names)}
    return np.asarray([place[label] for label in labels], dtype=np.int64)
