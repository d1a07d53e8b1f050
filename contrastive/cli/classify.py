"""``contrastive classify``: label images by nothing but the text of the labels."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from contrastive.cli.data import open_data
from contrastive.cli.label_files import read_class_names, read_labels
from contrastive.cli.output import (
    add_image_arguments,
    add_output_arguments,
    add_split_argument,
    check_output,
    guess_rows,
    print_left_out,
    rows_in_order,
    write_rows,
)

NAME = "classify"
HELP = "label images by the text of the labels"
NONE_OF_THESE = "none of these"
ALONE = (
    "add a second one, such as 'something else', or ask whether it fits: --multilabel or --reject, with --validation"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run folder, a model folder, or an open_clip name")
    add_image_arguments(parser)
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", metavar="A,B", help='the labels, separated by commas: cat,"red, shiny apple"')
    labels.add_argument("--labels-file", metavar="FILE", help="the labels: one a line, or JSON, or CSV")
    labels.add_argument("--classifier", metavar="FILE", help="a file of --save: the text tower is not opened")
    parser.add_argument(
        "--templates",
        metavar="T",
        help="none (default), general, openai7, openai80, a file with one a line, with {}, or .json: label -> prompts",
    )
    add_split_argument(parser, "--validation-split", "the set of --validation")
    parser.add_argument("--class-names", metavar="FILE", help="names for the class folders of --validation")
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
    from contrastive.cli.images import check_model, open_arguments
    from contrastive.errors import UserError
    from contrastive.evaluation import embed
    from contrastive.evaluation.labels import check_several

    if args.top_k < 1:
        raise UserError(f"--top-k {args.top_k}: give at least 1")
    if args.reject and args.multilabel:
        raise UserError("--reject --multilabel: use one; an image without labels is what --multilabel may say too")
    if args.level and args.multilabel:
        raise UserError(
            "--level --multilabel: use one; several labels an image have no sum of probabilities above them"
        )
    check_output("--output", args.output)
    check_output("--save", args.save, makes_folders=True)
    check_model(args.model, args.images)
    source = open_arguments(args.images, args.model, split=args.split)
    if args.validation is not None:
        open_data(args.validation, split=args.validation_split, option="--validation-split")
    model, classifier = _opened(args)
    if not (args.multilabel or args.reject):
        check_several(classifier.classes_.tolist(), ALONE)
    _fit(args, model, classifier)
    if args.multilabel and classifier.thresholds_ is None and classifier.bias is None:
        raise UserError("--multilabel: there are no thresholds yet; give labelled images with --validation DATA")
    classifier.level_names(args.level)
    if args.reject and classifier.rejection_ is None:
        raise UserError("--reject: there is no threshold yet; give labelled images with --validation DATA")
    classifier.inverted = args.invert
    found = embed(model, source, text=False, invert=args.invert)
    if args.save:
        classifier.save(args.save, model_path=_place(args.model))
    rows = _labels_of_each(found, classifier) if args.multilabel else _guesses(args, found, classifier)
    write_rows(rows, args.format, args.output)
    print_left_out(source, found.outcomes)
    return 0


def _opened(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and the classifier, built from labels (with lint on the error stream) or opened from a file."""
    from contrastive.errors import UserError
    from contrastive.evaluation import ZeroShotClassifier, load_classifier
    from contrastive.evaluation.labels import check_labels, check_several
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
    labels = check_labels(read_labels(args.labels, args.labels_file))
    if not (args.multilabel or args.reject):
        check_several(labels, ALONE)
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
    from contrastive.evaluation.class_names import named_labels
    from contrastive.evaluation.labelled import check_labels_given, no_label

    if args.validation is None:
        if args.class_names is not None:
            raise UserError("--class-names: names the labels of --validation DATA; give that, or leave it out")
        if args.unknown is not None:
            raise UserError("--unknown: the threshold needs images that have a label too; give --validation DATA")
        return
    validation = open_labelled(open_data(args.validation, split=args.validation_split))
    found = embed(model, validation, text=False, invert=args.invert)
    print_left_out(validation, found.outcomes, "--validation: ")
    if found.labels is None:
        raise no_label(f"--validation {args.validation}", found.unlabelled, validation)
    check_labels_given(f"--validation {args.validation}", found.labels, found.keys, validation)
    names = None if args.class_names is None else read_class_names(args.class_names)
    labels = named_labels(found.labels, names, f"--class-names {args.class_names}")
    if args.multilabel:
        _fit_thresholds(classifier, found.image, labels)
        return
    targets = classifier.targets(labels)
    if len(classifier.classes_) > 1:
        before = expected_error(classifier.predict_proba(found.image), targets)
        classifier.fit_temperature(found.image, labels)
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


def _fit_thresholds(classifier: Any, images: Any, labels: Any) -> None:
    """Each label's threshold, from images whose labels are joined by ';'."""
    import numpy as np

    names = [[name.strip() for name in str(joined).split(";") if name.strip()] for joined in labels]
    truth = np.zeros((len(names), len(classifier.classes_)), bool)
    for row, own in zip(truth, names, strict=True):
        row[classifier.targets(own)] = True
    classifier.fit_thresholds(images, truth)
    guessed = classifier.predict_labels(images)
    hits, wrong = int((guessed & truth).sum()), int((guessed != truth).sum())
    score = 2 * hits / max(2 * hits + wrong, 1)
    print(
        f"thresholds of {truth.shape[1]} labels on {len(truth):,} validation images: micro-averaged F1 {score:.3f}",
        file=sys.stderr,
    )


def _guesses(args: argparse.Namespace, found: Any, classifier: Any) -> list[dict[str, Any]]:
    """The likeliest labels of each image; with --reject one row 'none of these' where no label fits."""
    fits = classifier.fits(found.image) if args.reject else None
    if len(classifier.classes_) > 1:
        probabilities = classifier.predict_proba(found.image, level=args.level)
        names = classifier.level_names(args.level)
        rows = guess_rows(found.outcomes, probabilities, names, args.top_k)
    else:  # nothing to compare with, so that there is no probability
        label = str(classifier.classes_[0])
        rows = rows_in_order(
            found.outcomes, lambda row: [{"rank": 1, "label": label, "probability": None}], "probability"
        )
    if fits is None:
        return rows
    kept, image = [], -1
    for row in rows:
        image += row["rank"] == 1
        if row["rank"] is None or fits[image]:
            kept.append(row)
        elif row["rank"] == 1:
            kept.append({**row, "label": NONE_OF_THESE, "probability": None})
    return kept


def _labels_of_each(found: Any, classifier: Any) -> list[dict[str, Any]]:
    """One row an image and label that reaches its threshold, the surest first; an image without labels keeps a row."""
    above_NK = classifier.logits(found.image) - classifier.label_thresholds()

    def of_image(row: int) -> list[dict[str, Any]]:
        order = [index for index in (-above_NK[row]).argsort().tolist() if above_NK[row, index] >= 0]
        return [
            {"rank": rank, "label": str(classifier.classes_[index]), "above_threshold": float(above_NK[row, index])}
            for rank, index in enumerate(order, start=1)
        ]

    return rows_in_order(found.outcomes, of_image, "above_threshold")


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
