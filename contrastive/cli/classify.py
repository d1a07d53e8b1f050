"""``contrastive classify``: label images by nothing but the text of the labels."""

from __future__ import annotations

import argparse

from contrastive.cli.output import (
    add_image_arguments,
    add_output_arguments,
    guess_rows,
    one_source,
    write_rows,
)

NAME = "classify"
HELP = "label images by the text of the labels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run folder, a model folder, or an open_clip name")
    add_image_arguments(parser)
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", metavar="A,B", help="the labels, separated by commas")
    labels.add_argument("--labels-file", metavar="FILE", help="the labels, one a line")
    parser.add_argument("--templates", metavar="T", help="none (default), short, or a file with one a line, with {}")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from contrastive.errors import UserError
    from contrastive.evaluation import ZeroShotClassifier, embed
    from contrastive.models import load

    if args.top_k < 1:
        raise UserError(f"--top-k {args.top_k}: give at least 1")
    labels = read_labels(args.labels, args.labels_file)
    model = load(args.model)
    classifier = ZeroShotClassifier(model, labels, args.templates).fit()
    found = embed(model, one_source(args.images), text=False, invert=args.invert)
    probabilities = classifier.predict_proba(found.image)
    rows = guess_rows(found.keys, probabilities, classifier.classes_.tolist(), args.top_k, found.failures)
    write_rows(rows, args.format, args.output)
    return 0


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
