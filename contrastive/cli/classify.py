"""``contrastive classify``: label images by nothing but the text of the labels."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from contrastive.cli.output import (
    add_image_arguments,
    add_output_arguments,
    guess_rows,
    one_source,
    write_rows,
)

NAME = "classify"
HELP = "label images by the text of the labels"
NONE_OF_THESE = "none of these"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run folder, a model folder, or an open_clip name")
    add_image_arguments(parser)
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", metavar="A,B", help="the labels, separated by commas")
    labels.add_argument("--labels-file", metavar="FILE", help="the labels, one a line")
    labels.add_argument("--classifier", metavar="FILE", help="a file of --save: the text tower is not opened")
    parser.add_argument(
        "--templates",
        metavar="T",
        help="none (default), general, openai7, openai80, a file with one a line, with {}, or .json: label -> prompts",
    )
    parser.add_argument("--validation", metavar="DATA", help="labelled images: calibrate the probabilities on them")
    parser.add_argument(
        "--unknown", metavar="DATA", help="images of none of the labels, to choose --reject's threshold"
    )
    parser.add_argument("--reject", action="store_true", help="say 'none of these' below a threshold on validation")
    parser.add_argument(
        "--multilabel",
        action="store_true",
        help="all labels above their threshold, none to all; --validation chooses thresholds (labels joined by ';')",
    )
    parser.add_argument("--parents", metavar="FILE", help="JSON, label -> what stands above it, for --level")
    parser.add_argument("--level", type=int, default=0, metavar="N", help="1: parents, 2: theirs (default: 0, labels)")
    parser.add_argument("--save", metavar="FILE", help="write the classifier to this file (.safetensors)")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from contrastive.errors import UserError
    from contrastive.evaluation import embed

    if args.top_k < 1:
        raise UserError(f"--top-k {args.top_k}: give at least 1")
    if args.reject and args.multilabel:
        raise UserError("--reject --multilabel: use one; an image without labels is what --multilabel may say too")
    if args.level and args.multilabel:
        raise UserError(
            "--level --multilabel: use one; several labels an image have no sum of probabilities above them"
        )
    model, classifier = _opened(args)
    _fit(args, model, classifier)
    if args.multilabel and classifier.thresholds_ is None and classifier.bias is None:
        raise UserError("--multilabel: there are no thresholds yet; give labelled images with --validation DATA")
    classifier.level_names(args.level)
    if args.reject and classifier.rejection_ is None:
        raise UserError("--reject: there is no threshold yet; give labelled images with --validation DATA")
    classifier.inverted = args.invert
    found = embed(model, one_source(args.images), text=False, invert=args.invert)
    if args.save:
        classifier.save(args.save, model_path=_place(args.model))
    if args.multilabel:
        rows = _labels_of_each(found, classifier)
    else:
        probabilities, names = (
            classifier.predict_proba(found.image, level=args.level),
            classifier.level_names(args.level),
        )
        rows = guess_rows(found.keys, probabilities, names, args.top_k, found.failures)
        if args.reject:
            rows = _without_strangers(rows, dict(zip(found.keys, classifier.fits(found.image).tolist(), strict=True)))
    write_rows(rows, args.format, args.output)
    return 0


def _opened(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and the classifier, built from labels (with lint on the error stream) or opened from a file."""
    from contrastive.errors import UserError
    from contrastive.evaluation import ZeroShotClassifier, load_classifier
    from contrastive.models import load

    if args.classifier is not None:
        if args.templates is not None:
            raise UserError("--templates: a classifier file has its own; leave it out, or give --labels")
        if args.parents is not None:
            raise UserError("--parents: a classifier file has its own; leave it out, or give --labels")
        model = load(args.model, text=False)
        classifier = load_classifier(args.classifier, model)
        if classifier.inverted and not args.invert:
            print(f"{args.classifier} was set on inverted images: these are inverted too", file=sys.stderr)
            args.invert = True
        return model, classifier
    labels = read_labels(args.labels, args.labels_file)
    model = load(args.model)
    parents = None if args.parents is None else read_parents(args.parents)
    classifier = ZeroShotClassifier(model, labels, args.templates, parents=parents).fit()
    for line in classifier.lint():
        print(f"warning: {line}", file=sys.stderr)
    return model, classifier


def _fit(args: argparse.Namespace, model: Any, classifier: Any) -> None:
    """Temperature and thresholds from `--validation`, said on the error stream."""
    from contrastive.errors import UserError
    from contrastive.evaluation import embed, open_labelled
    from contrastive.evaluation.calibration import expected_error

    if args.validation is None:
        if args.unknown is not None:
            raise UserError("--unknown: the threshold needs images that have a label too; give --validation DATA")
        return
    found = embed(model, open_labelled(args.validation), text=False, invert=args.invert)
    for key, reason in found.failures.items():
        print(f"--validation: {key}: {reason}", file=sys.stderr)
    if found.labels is None:
        raise UserError(f"--validation {args.validation}: some images have no label; give every image one")
    if args.multilabel:
        _fit_thresholds(classifier, found)
        return
    targets = classifier.targets(found.labels)
    before = expected_error(classifier.predict_proba(found.image), targets)
    classifier.fit_temperature(found.image, found.labels)
    after = expected_error(classifier.predict_proba(found.image), targets)
    print(
        f"temperature {classifier.temperature_:.3g} on {len(targets):,} validation images: "
        f"calibration error {before:.3f} -> {after:.3f}",
        file=sys.stderr,
    )
    if args.reject or args.unknown is not None:
        unknown = None if args.unknown is None else embed(model, args.unknown, text=False, invert=args.invert).image
        fitted = classifier.fit_rejection(found.image, unknown)
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in fitted.items())
        print(f"{NONE_OF_THESE}: {numbers}", file=sys.stderr)


def _fit_thresholds(classifier: Any, found: Any) -> None:
    """Each label's threshold, from images whose labels are joined by ';'."""
    import numpy as np

    names = [[name.strip() for name in str(joined).split(";") if name.strip()] for joined in found.labels]
    truth = np.zeros((len(names), len(classifier.classes_)), bool)
    for row, own in zip(truth, names, strict=True):
        row[classifier.targets(own)] = True
    classifier.fit_thresholds(found.image, truth)
    guessed = classifier.predict_labels(found.image)
    hits, wrong = int((guessed & truth).sum()), int((guessed != truth).sum())
    score = 2 * hits / max(2 * hits + wrong, 1)
    print(
        f"thresholds of {truth.shape[1]} labels on {len(truth):,} validation images: micro-averaged F1 {score:.3f}",
        file=sys.stderr,
    )


def _without_strangers(rows: list[dict[str, Any]], fits: Mapping[str, bool]) -> list[dict[str, Any]]:
    """One row 'none of these' in place of the guesses of each image that no label fits."""
    kept = []
    for row in rows:
        if fits.get(row["image"], True):
            kept.append(row)
        elif row["rank"] == 1:
            kept.append({**row, "label": NONE_OF_THESE, "probability": None})
    return kept


def _labels_of_each(found: Any, classifier: Any) -> list[dict[str, Any]]:
    """One row an image and label that reaches its threshold, the surest first; an image without labels keeps a row."""
    logits, thresholds = classifier.logits(found.image), classifier.label_thresholds()
    rows: list[dict[str, Any]] = []
    for key, above in zip(found.keys, logits - thresholds, strict=True):
        order = [index for index in (-above).argsort().tolist() if above[index] >= 0]
        for rank, index in enumerate(order, start=1):
            label, margin = str(classifier.classes_[index]), float(above[index])
            rows.append({"image": key, "rank": rank, "label": label, "above_threshold": margin, "error": ""})
        if not order:
            rows.append({"image": key, "rank": None, "label": None, "above_threshold": None, "error": ""})
    for key, reason in found.failures.items():
        rows.append({"image": key, "rank": None, "label": None, "above_threshold": None, "error": reason})
        print(f"{key}: {reason}", file=sys.stderr)
    return rows


def _place(model: str) -> str:
    from pathlib import Path

    return str(Path(model).resolve()) if Path(model).exists() else model


def read_parents(file: str) -> dict[str, str]:
    """The mapping of `--parents`: child -> parent."""
    import json
    from pathlib import Path

    from contrastive.errors import UserError

    try:
        found = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as fault:
        raise UserError(f"--parents {file}: no JSON can be read there ({fault})") from None
    if not isinstance(found, dict) or not all(isinstance(parent, str) for parent in found.values()):
        raise UserError(f'--parents {file}: give one parent a label, {{"dog": "animal", "cat": "animal"}}')
    return found


def read_labels(listed: str | None, file: str | None) -> list[str]:
    """The labels of `--labels` or `--labels-file`, without outer white space; empty lines of a file are
    skipped.
    """
    from pathlib import Path

    from contrastive.errors import UserError

    if file is None:
        return [label.strip() for label in (listed or "").split(",")]
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--labels-file {file}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"--labels-file {file}: not UTF-8; save it as UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
