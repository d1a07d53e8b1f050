"""The main job from a recipe to a report: prepare the run folder, train, evaluate, write what was found.

Read top to bottom, `pretrain` is the whole story; each line of it is a function below or in another room.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from contrastive.build import FrozenFeatures, build_accelerator, build_model, build_trainer
from contrastive.config import Config, PairModelConfig, TrainedTokenizerConfig, dump_yaml
from contrastive.errors import UserError
from contrastive.evaluation import (
    Evaluation,
    Examples,
    embed,
    evaluate_labelled,
    evaluate_pairs,
    format_results_table,
    write_report,
)
from contrastive.models import CorpusTokenizer, TwoTower, load, reinitialised, save_model, train_tokenizer
from contrastive.shards import ShardIndex, open_cache, open_index
from contrastive.training import Trainer, append_metrics, environment, list_checkpoints, read_metrics

# What a run writes; `--overwrite` deletes these and nothing else.
WRITTEN = (
    "checkpoints", "model", "tensorboard", "config.yaml", "environment.json",
    "metrics.jsonl", "results.json", "report.html", "tokenizer.json",
)  # fmt: skip


def pretrain(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop_after: int | None = None,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Train as `config` says, then evaluate and write the report.

    Args:
        resume: go on from the newest checkpoint of the run folder.
        overwrite: delete an earlier run in the same folder.
        stop_after: stop behind this step, with a checkpoint, as if the run had been interrupted.
        quiet: no progress.

    Returns:
        the results of a run that is complete (on the main process; the others get an empty dict), or None when it
        was stopped early.

    Raises:
        UserError: anything in the recipe, the data or the run folder that the user can mend.
    """
    run_dir = Path(config.run.dir)
    accelerator = build_accelerator(config)
    checkpoint = prepare_run_dir(run_dir, accelerator, resume=resume, overwrite=overwrite)
    with accelerator.main_process_first():  # one process builds the index, the others read it
        train_index = open_index(config.data.train)
        validation_index = open_index(config.data.validation) if config.data.validation else None
        if config.data.cache == "pixels":
            open_cache(train_index)
    config = settle_tokenizer(config, accelerator, train_index, run_dir)
    model = build_model(config)
    if accelerator.is_main_process:
        (run_dir / "config.yaml").write_text(dump_yaml(config))
        (run_dir / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
        if not quiet:
            print(summary(config, model, train_index, accelerator), flush=True)

    trainer = build_trainer(
        config,
        accelerator,
        model,
        train_index,
        features=frozen_features(model, train_index, accelerator) if config.data.cache == "features" else None,
        validate=validation(validation_index),
        quiet=quiet,
    )
    if config.track.trackers:
        accelerator.init_trackers(run_dir.name if "tensorboard" not in config.track.trackers else "tensorboard")
    try:
        complete = trainer.fit(checkpoint, stop_after=stop_after)
        if not accelerator.is_main_process:
            return {} if complete else None
        two_tower: TwoTower = accelerator.unwrap_model(trainer.model).eval()
        save_model(two_tower, run_dir / "model")
        if not complete:
            if not quiet:
                print(f"stopped at step {trainer.step}; `--resume` goes on from {run_dir / 'checkpoints'}")
            return None
        return evaluate(config, load(run_dir, device=accelerator.device), validation_index, trainer, quiet)
    finally:
        accelerator.end_training()


def prepare_run_dir(run_dir: Path, accelerator: Accelerator, *, resume: bool, overwrite: bool) -> Path | None:
    """Create the run folder; returns the checkpoint to go on from, None for a new run."""
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    started = (run_dir / "metrics.jsonl").exists() or bool(checkpoints)
    if resume:
        if not checkpoints:
            raise UserError(f"--resume: {run_dir} has no checkpoint to go on from; leave the option out to start")
        return checkpoints[-1]
    if started and not overwrite:
        raise UserError(
            f"run.dir: {run_dir} already holds a run; add --resume to go on, --overwrite to start again, "
            "or run.dir=ANOTHER to keep both"
        )
    accelerator.wait_for_everyone()  # every rank has looked before one deletes
    if accelerator.is_main_process:
        for name in WRITTEN if started else ():
            path = run_dir / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        run_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    return None


def settle_tokenizer(config: Config, accelerator: Accelerator, index: ShardIndex, run_dir: Path) -> Config:
    """Train the tokenizer of a recipe that asks for it, once, and name its file in the configuration."""
    model = config.model
    if not (isinstance(model, PairModelConfig) and isinstance(model.tokenizer, TrainedTokenizerConfig)):
        return config
    choice = model.tokenizer
    if choice.path is not None:
        return config
    path = run_dir / "tokenizer.json"
    if accelerator.is_main_process and not path.exists():
        trained = train_tokenizer(index.captions(), vocab_size=choice.vocab_size, lowercase=choice.lowercase)
        trained.save(str(path))
    accelerator.wait_for_everyone()
    CorpusTokenizer(path)  # a file that cannot be read is told here
    tokenizer = choice.model_copy(update={"path": str(path)})
    return config.model_copy(update={"model": model.model_copy(update={"tokenizer": tokenizer})})


def summary(config: Config, model: TwoTower, index: ShardIndex, accelerator: Accelerator) -> str:
    """What is about to run, in three lines."""

    def millions(module: Any) -> str:
        parameters = list(module.parameters())
        total, learned = (sum(p.numel() for p in ps) for ps in (parameters, [p for p in parameters if p.requires_grad]))
        return f"{total / 1e6:.2f} M" + ("" if learned == total else f" ({learned / 1e6:.2f} M learned)")

    batch, world = config.train.global_batch, accelerator.num_processes
    return (
        f"model   image tower {millions(model.image)}, text tower {millions(model.text)} parameters; "
        f"{model.image_size} px, {model.dim} dimensions\n"
        f"data    {len(index):,} pairs in {config.data.train}; global batch {batch}"
        f"{f' = {world} processes x {batch // world}' if world > 1 else ''}, {len(index) / batch:.1f} steps an epoch\n"
        f"run     {config.run.dir} on {accelerator.device}, precision {accelerator.mixed_precision}, "
        f"loss {config.loss.kind}"
    )


def frozen_features(model: TwoTower, index: ShardIndex, accelerator: Accelerator) -> FrozenFeatures:
    """Run both locked trunks once over the data set; every process does it for itself."""
    accelerator.print(f"running the locked towers once over {len(index):,} pairs", flush=True)
    found = embed(model.to(accelerator.device), index, features="tower")
    assert found.text is not None, "the index holds no sample without a caption"
    valid = np.array([index.key(i) not in found.failures for i in range(len(index))])
    assert valid.sum() == len(found.keys)
    image, text = (np.zeros((len(index), part.shape[1]), np.float32) for part in (found.image, found.text))
    image[valid], text[valid] = found.image, found.text
    return FrozenFeatures(image, text, valid)


def validation(index: ShardIndex | None) -> Callable[[Any], dict[str, float]] | None:
    """The shares that are logged during training: recall and zero-shot on the validation shards."""
    if index is None:
        return None

    def validate(model: Any) -> dict[str, float]:
        return evaluate_pairs(model, index).scalars()

    return validate


def evaluate(
    config: Config,
    model: TwoTower,
    validation_index: ShardIndex | None,
    trainer: Trainer,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluate the finished model as ``eval`` says; writes ``results.json`` and ``report.html``, prints the table."""
    run_dir = Path(config.run.dir)
    results: dict[str, Any] = {"run": run_dir.name, "seconds": {"training": trainer.seconds}, "sets": {}}
    examples: dict[str, Examples] = {}

    def add(found: Evaluation) -> None:
        name = found.results["name"]
        results["sets"][name] = found.results
        results["seconds"][name] = found.results["seconds"]
        examples[name] = found.examples

    if validation_index is not None:
        found = evaluate_pairs(model, validation_index, name="validation", examples=8)
        add(found)
        scalars = {f"validation/{key}": value for key, value in found.scalars().items()}
        append_metrics(run_dir / "metrics.jsonl", trainer.step, scalars)
    for labelled in config.eval.labelled:
        add(
            evaluate_labelled(
                model,
                labelled.name,
                labelled.train,
                labelled.test,
                labelled.tasks,
                templates=labelled.templates,
                invert=labelled.invert,
                random_model=lambda: reinitialised(model, seed=config.run.seed),
                examples=8,
            )
        )
    started = time.perf_counter()
    if config.eval.report:
        write_report(
            run_dir / "report.html",
            results=results,
            metrics=read_metrics(run_dir / "metrics.jsonl"),
            examples=examples,
            config=(run_dir / "config.yaml").read_text(),
            environment=json.loads((run_dir / "environment.json").read_text()),
        )
        results["seconds"]["report"] = time.perf_counter() - started
    (run_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if not quiet:
        print(format_results_table(results))
        print(f"model   {run_dir / 'model'}   results {run_dir / 'results.json'}")
        if config.eval.report:
            print(f"report  {run_dir / 'report.html'}")
    return results


def dry_run(config: Config) -> str:
    """Check a recipe as far as it goes without training: build the model, look for the data.

    Raises:
        UserError: the model cannot be built as asked.
    """
    model = build_model(config)
    lines = [f"recipe is valid; run folder {config.run.dir}"]
    for name, module in (("image tower", model.image), ("text tower", model.text)):
        lines.append(f"{name:12s} {sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters")
    for split in ("train", "validation"):
        folder = getattr(config.data, split)
        if folder is None:
            lines.append(f"{split:12s} none")
        elif Path(folder).exists():
            lines.append(f"{split:12s} {folder}: {len(open_index(folder)):,} pairs")
        else:
            lines.append(f"{split:12s} {folder}: NOT FOUND; make it with `contrastive shard SOURCE {folder}`")
    lines.append(f"{'batch':12s} {config.train.global_batch} pairs over all processes")
    return "\n".join(lines)
