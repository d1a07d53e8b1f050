"""``contrastive evaluate``: zero-shot, probe and retrieval on one data set, with intervals and chance."""

from __future__ import annotations

import argparse

NAME = "evaluate"
HELP = "measure a model on a data set: zero-shot, probe, retrieval"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run folder, a model folder, or an open_clip name")
    parser.add_argument("data", help="labelled images, or pairs for retrieval: a folder, table or shards")
    parser.add_argument("--tasks", default="zeroshot", help="of zeroshot, probe, retrieval (default: zeroshot)")
    parser.add_argument("--train", metavar="DATA", help="labelled training images, for the probe")
    parser.add_argument("--label", metavar="COL", help="column of the label (default: guessed)")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--labels", metavar="A,B", help="classes of zero-shot (default: those of DATA)")
    labels.add_argument("--labels-file", metavar="FILE", help="the same, one a line")
    parser.add_argument("--templates", metavar="T", help="none (default), short, or a file with one a line, with {}")
    parser.add_argument("--invert", action="store_true", help="turn the images into their negatives first")
    parser.add_argument("--json", metavar="FILE", help="write the results here as well")


def run(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path
    from typing import Any

    from contrastive.cli.classify import read_labels
    from contrastive.errors import UserError
    from contrastive.evaluation import evaluate_labelled, evaluate_pairs, format_results_table
    from contrastive.models import load, reinitialised

    tasks = [task.strip() for task in args.tasks.split(",")]
    unknown = set(tasks) - {"zeroshot", "probe", "retrieval"}
    if unknown:
        raise UserError(f"--tasks: unknown: {', '.join(sorted(unknown))}; use zeroshot, probe, retrieval")
    if "probe" in tasks and args.train is None:
        raise UserError("--tasks probe needs labelled training images beside the test set: --train DATA")
    model = load(args.model)
    name = Path(args.data).stem
    found = []
    labelled = [task for task in tasks if task != "retrieval"]
    if labelled:
        labels = read_labels(args.labels, args.labels_file) if args.labels or args.labels_file else None
        evaluation = evaluate_labelled(
            model,
            name,
            args.train,
            args.data,
            labelled,
            args.templates,
            labels=labels,
            label=args.label,
            invert=args.invert,
            random_model=lambda: reinitialised(model),
        )
        found.append(evaluation.results)
    if "retrieval" in tasks:
        retrieval_name = f"{name}, retrieval" if labelled else name
        found.append(evaluate_pairs(model, args.data, name=retrieval_name, invert=args.invert).results)
    results: dict[str, Any] = {"run": str(args.model), "sets": {one["name"]: one for one in found}}
    results["seconds"] = {one["name"]: one["seconds"] for one in found}
    print(format_results_table(results))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0
