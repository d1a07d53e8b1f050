"""``contrastive evaluate``: what a model can do on one data set, with intervals, chance and a page; or two models."""

from __future__ import annotations

import argparse
from typing import Any

from contrastive.cli.output import add_split_argument

NAME = "evaluate"
HELP = "measure a model on a data set (zero-shot, probe, few-shot, kNN, retrieval), or compare two"
TASKS = ("zeroshot", "probe", "fewshot", "knn", "retrieval")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run folder, a model folder, or an open_clip name")
    parser.add_argument("model_b", nargs="?", help="with --compare: a second model")
    parser.add_argument("data", help="labelled images, or pairs for retrieval: a folder, table or shards")
    parser.add_argument("--tasks", default="zeroshot", help=f"of {', '.join(TASKS)} (default: zeroshot)")
    parser.add_argument("--train", metavar="DATA", help="labelled training images, for probe, fewshot and knn")
    parser.add_argument("--compare", action="store_true", help="two models on the same samples, with paired tests")
    parser.add_argument("--output", metavar="DIR", help="write results.json, predictions.parquet and report.html there")
    parser.add_argument("--cache", metavar="DIR", help="keep embeddings there, and read those of `contrastive embed`")
    add_split_argument(parser, of="DATA")
    add_split_argument(parser, "--train-split", "the set of --train")
    parser.add_argument("--label", metavar="COL", help="column of the label (default: guessed)")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--labels", metavar="A,B", help="classes of zero-shot (default: those of DATA)")
    labels.add_argument("--labels-file", metavar="FILE", help="the same: one a line, or JSON, or CSV")
    parser.add_argument(
        "--class-names", metavar="FILE", help="names for class folders: JSON, CSV of two columns, or lines"
    )
    parser.add_argument("--shots", metavar="N,N", help="of fewshot (default: of 1,2,4,8,16 those every class has)")
    parser.add_argument(
        "--templates",
        metavar="T",
        help="none (default), general, openai7, openai80, or a file with one a line, with {}",
    )
    parser.add_argument("--captions", choices=("first", "all"), default="all", help="of pairs (default: all)")
    parser.add_argument("--invert", action="store_true", help="turn the images into their negatives first")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), help="compute in this precision (default: the weights')")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads that decode ahead (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of splits, draws and intervals (default: 0)")
    parser.add_argument("--json", metavar="FILE", help="write the results here as well")
    parser.add_argument(
        "--max-unreadable", type=float, default=0.05, metavar="SHARE", help="of the images (default: 0.05)"
    )


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from contrastive.cli.data import open_data
    from contrastive.cli.images import check_model
    from contrastive.cli.label_files import read_class_names, read_labels
    from contrastive.cli.output import check_output, check_output_folder
    from contrastive.errors import UserError
    from contrastive.evaluation import compare, format_results_table, model_hash, reader_warnings
    from contrastive.models import load

    tasks = [task.strip() for task in args.tasks.split(",")]
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise UserError(f"--tasks: unknown: {', '.join(unknown)}; use {', '.join(TASKS)}")
    if args.templates is not None and args.templates.endswith(".json"):
        raise UserError(
            f"--templates {args.templates}: prompts by label go with `classify`; give templates, one a line"
        )
    need = [task for task in tasks if task in ("probe", "fewshot", "knn")]
    if need and args.train is None:
        raise UserError(f"--tasks {','.join(need)} needs labelled training images beside the test set: --train DATA")
    if args.compare != (args.model_b is not None):
        raise UserError("--compare needs two models: contrastive evaluate MODEL_A MODEL_B DATA --compare")
    check_output("--json", args.json)
    check_output_folder("--output", args.output)
    check_model(args.model, [args.data])
    asked = {  # all that can be wrong is read before a model is opened
        "labels": read_labels(args.labels, args.labels_file) if args.labels or args.labels_file else None,
        "class_names": None if args.class_names is None else read_class_names(args.class_names),
        "shots": _shots(args.shots),
    }
    data = open_data(args.data, label=args.label, split=args.split)
    train = open_data(args.train, label=args.label, split=args.train_split, option="--train-split")
    evaluated: list[list[Any]] = []
    hashes = {}
    for path in (args.model, args.model_b) if args.compare else (args.model,):
        model = load(path)
        hashes[str(path)] = model_hash(model)
        evaluated.append(_evaluate(args, model, tasks, train, data, asked))
    found = evaluated[0]
    results: dict[str, Any] = {"run": str(args.model), "sets": {one.results["name"]: one.results for one in found}}
    results["seconds"] = {one.results["name"]: one.results["seconds"] for one in found}
    results["warnings"] = reader_warnings(results["sets"])
    results["hashes"] = hashes
    results["configuration"] = {key: value for key, value in vars(args).items() if value is not None}
    if args.compare:
        results["run"] = f"{args.model} and {args.model_b}"
        results["sets_b"] = {one.results["name"]: one.results for one in evaluated[1]}
        results["comparison"] = {}
        for a, b in zip(*evaluated, strict=True):
            compare.check_same_samples(a.keys, b.keys)
            measures = compare.compare_samples(a.samples, b.samples, seed=args.seed)
            results["comparison"][a.results["name"]] = {"a": args.model, "b": args.model_b, "measures": measures}
    for line in results["warnings"]:
        print(f"warning: {line}")
    print(format_results_table(results))
    for name, one in results.get("comparison", {}).items():
        print(f"\n{name}: " + compare.format_comparison(one["measures"], args.model, args.model_b))
    if args.output:
        _write(Path(args.output), results, found)
    if args.json:
        Path(args.json).write_text(_as_json(results), encoding="utf-8", errors="backslashreplace")
    return 0


def _evaluate(
    args: argparse.Namespace, model: Any, tasks: list[str], train: Any, data: Any, asked: dict[str, Any]
) -> list[Any]:
    """One evaluation of the labelled set, one of the pairs, or both."""
    from pathlib import Path

    import torch

    from contrastive.evaluation import evaluate_labelled, evaluate_pairs, has_captions
    from contrastive.models import reinitialised
    from contrastive.printable import printable

    name = printable(Path(args.data).stem) + (f" {args.split}" if args.split else "")
    shared: dict[str, Any] = {
        "invert": args.invert,
        "dtype": {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype],
        "cache": args.cache,
        "workers": args.workers,
        "max_unreadable": args.max_unreadable,
        "seed": args.seed,
        "examples": 8 if args.output else 0,
    }
    pairs = "retrieval" in tasks and has_captions(data)  # else the prompts of the labels take their place
    labelled = [task for task in tasks if not (task == "retrieval" and pairs)]
    found = []
    if labelled:
        found.append(
            evaluate_labelled(
                model,
                name,
                train,
                data,
                labelled,
                args.templates,
                random_model=lambda: reinitialised(model),
                **asked,
                **shared,
            )
        )
    if pairs:
        title = f"{name}, retrieval" if labelled else name
        found.append(evaluate_pairs(model, data, name=title, captions=args.captions, thorough=True, **shared))
    return found


def _shots(text: str | None) -> list[int] | None:
    from contrastive.errors import UserError

    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--shots {text}: give numbers separated by commas, such as 1,4,16") from None


def _write(folder: Any, results: dict[str, Any], found: list[Any]) -> None:
    """results.json, predictions.parquet and report.html."""
    import json

    from contrastive.evaluation import write_predictions, write_report
    from contrastive.training import environment

    folder.mkdir(parents=True, exist_ok=True)
    results["versions"] = environment()
    for one in found:
        if one.predictions is not None and one.predictions.tasks:
            write_predictions(folder / "predictions.parquet", one.predictions)
    write_report(
        folder / "report.html",
        results=results,
        examples={one.results["name"]: one.examples for one in found},
        maps={one.results["name"]: one.map for one in found},
        config=json.dumps(results["configuration"] | {"hashes": results["hashes"]}, indent=2),
        environment=results["versions"],
    )
    # a path that is not UTF-8 becomes \udcNN, as JSON spells it
    (folder / "results.json").write_text(_as_json(results), encoding="utf-8", errors="backslashreplace")
    print(f"wrote {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def _as_json(results: dict[str, Any]) -> str:
    import json

    return json.dumps(results, indent=2, ensure_ascii=False, default=lambda value: value.tolist()) + "\n"
