"""``contrastive probe fit|predict``: a linear classifier on a model's frozen features, kept in one file."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from contrastive.cli.data import open_data
from contrastive.cli.label_files import read_class_names
from contrastive.cli.output import (
    add_image_arguments,
    add_output_arguments,
    add_split_argument,
    check_output,
    guess_rows,
    print_left_out,
    write_rows,
)

NAME = "probe"
HELP = "train a linear classifier on a labelled set, or use one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="fit|predict")

    fit = actions.add_parser("fit", help="fit a probe to labelled images and save it", allow_abbrev=False)
    fit.add_argument("model", help="a run folder, a model folder, or an open_clip name")
    fit.add_argument("train", help="labelled images: one sub-folder a class, a table, or shards")
    fit.add_argument("output", help="the probe file to write (.safetensors)")
    fit.add_argument("--test", metavar="DATA", help="measure on this labelled set, beside the controls")
    add_split_argument(fit, of="TRAIN")
    add_split_argument(fit, "--test-split", "the set of --test")
    fit.add_argument("--label", metavar="COL", help="column of the label (default: guessed)")
    fit.add_argument("--C", metavar="C", help="strength, several with commas, clip, dinov2 or default (default)")
    fit.add_argument("--partial", metavar="SHARES", help="also fit to parts of the training set: 0.01,0.1,1")
    fit.add_argument("--features", choices=("tower", "projected"), default="tower", help="default: tower")
    fit.add_argument(
        "--class-names", metavar="FILE", help="names for class folders: JSON, CSV of two columns, or lines"
    )
    fit.add_argument(
        "--class-weight", choices=("balanced",), help="balanced: every class counts alike, whatever its size"
    )
    fit.add_argument("--invert", action="store_true", help="turn the images into their negatives first")
    fit.add_argument("--seed", type=int, default=0, help="of the validation split (default: 0)")

    predict = actions.add_parser("predict", help="label images with a saved probe", allow_abbrev=False)
    predict.add_argument("probe", help="a file that `contrastive probe fit` wrote")
    add_image_arguments(predict)
    predict.add_argument("--model", metavar="M", help="where the model is now (default: where it was at the fit)")
    add_output_arguments(predict)


def run(args: argparse.Namespace) -> int:
    return _fit(args) if args.action == "fit" else _predict(args)


def _fit(args: argparse.Namespace) -> int:
    from pathlib import Path

    from contrastive.cli.images import check_model
    from contrastive.evaluation import probe_with_controls
    from contrastive.evaluation.belonging import identity_of
    from contrastive.models import load, reinitialised

    check_output("OUTPUT", args.output, makes_folders=True)
    check_model(args.model, [args.train])
    class_names = None if args.class_names is None else read_class_names(args.class_names)
    train = open_data(args.train, label=args.label, split=args.split)
    test = open_data(args.test, label=args.label, split=args.test_split, option="--test-split")
    strengths, shares = _strengths(args.C), _shares(args.partial)
    model = load(args.model)
    outcome = probe_with_controls(
        model,
        train,
        test,
        lambda: reinitialised(model, args.seed),
        C=strengths,
        partial=shares,
        features=args.features,
        class_names=class_names,
        class_weight=args.class_weight,
        invert=args.invert,
        seed=args.seed,
    )
    model_path = Path(args.model)
    outcome.probe.save(
        args.output,
        model=str(model_path.resolve()) if model_path.exists() else args.model,
        **identity_of(model),
        features=args.features,
        invert=args.invert,
        results=outcome.results,
    )
    results = outcome.results
    for remark in results["remarks"]:
        print(f"warning: {remark}", file=sys.stderr)
    measured = f"{results['test_size']:,} test images" if args.test else "not measured: there is no --test DATA"
    print(f"{results['train_size']:,} training images, {results['classes']} classes; {measured}")
    rows = [_row(title, results[name]) for name, title in TITLES.items() if name in results]
    rows += [_row(f"the model, {100 * r['share']:g} % ({r['samples']:,})", r) for r in results.get("partial", ())]
    write_rows(rows, "table")
    if "majority" in results:
        print(f"always the commonest class: {100 * results['majority']['value']:.1f} %")
    for key, reason in outcome.failures.items():
        print(f"not read: {key}: {reason}")
    print(f"saved {args.output}")
    return 0


TITLES = {"model": "the model", "random": "random tower", "pixels": "pixels"}


def _row(title: str, result: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"features": title, "width": result["width"], "C": f"{result['C']:.3g}"}
    if "top1" in result:
        for name, column in (("top1", "top-1 %"), ("mean_per_class", "mean per class %")):
            entry = result[name]
            row[column] = f"{100 * entry['value']:.1f}"
            if name == "top1":
                row["95 % interval"] = f"{100 * entry['low']:.1f} … {100 * entry['high']:.1f}"
        row["chance %"] = f"{100 * result['top1']['chance']:.1f}"
    return row


def _strengths(text: str | None) -> float | list[float] | str | None:
    if text is None or text in ("clip", "dinov2", "default"):
        return text
    numbers = _numbers("--C", text, "a number, several separated by commas, clip, dinov2 or default")
    return numbers[0] if len(numbers) == 1 else numbers


def _shares(text: str | None) -> list[float]:
    return [] if text is None else _numbers("--partial", text, "shares of the training set such as 0.01,0.1,1")


def _numbers(option: str, text: str, wanted: str) -> list[float]:
    from contrastive.errors import UserError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: give {wanted}") from None


def _predict(args: argparse.Namespace) -> int:
    from contrastive.cli.images import open_arguments
    from contrastive.errors import UserError
    from contrastive.evaluation import LinearProbe, embed
    from contrastive.evaluation.belonging import check_belongs
    from contrastive.models import load

    if args.top_k < 1:
        raise UserError(f"--top-k {args.top_k}: give at least 1")
    check_output("--output", args.output)
    probe = LinearProbe.load(args.probe)
    saved = probe.metadata_
    path = args.model or saved.get("model")
    if path is None:
        raise UserError(f"{args.probe} does not say which model it belongs to; name it with --model")
    source = open_arguments(args.images, path, split=args.split)
    model = load(path)
    check_belongs(args.probe, saved, model, remedy="name its own model with --model, or fit again")
    found = embed(
        model,
        source,
        features=saved.get("features", "tower"),
        text=False,
        invert=args.invert or bool(saved.get("invert")),
    )
    probabilities = probe.predict_proba(found.image)
    rows = guess_rows(found.outcomes, probabilities, probe.classes_.tolist(), args.top_k)
    write_rows(rows, args.format, args.output)
    print_left_out(source, found.outcomes)
    return 0
