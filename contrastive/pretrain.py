"""The main job from a recipe to a report: prepare the run folder, train, evaluate, write what was found.

Read top to bottom, `pretrain` is the whole story; each line of it is a function below, in `preflight`, or in
another room.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from contrastive.build import (
    FrozenFeatures,
    Teacher,
    build_accelerator,
    build_data,
    build_duration,
    build_model,
    build_schedule,
    build_trainer,
    check_batch,
    has_work_for_compiled,
    wants_training,
)
from contrastive.builders.stages import build_curriculum
from contrastive.config import Config, DistillationConfig, dump_yaml, terms_of
from contrastive.errors import UserError
from contrastive.evaluation import (
    Evaluation,
    Examples,
    StoredFeatures,
    evaluate_labelled,
    evaluate_pairs,
    format_results_table,
    stored_features,
    write_report,
)
from contrastive.losses import fuse
from contrastive.models import TwoTower, load, reinitialised, save_model, train_tokenizer
from contrastive.preflight import (
    Resume,
    check_labelled_sets,
    check_losses,
    check_metrics,
    check_same_recipe,
    check_shards,
    find_start,
    may_exist,
    only_run,
    repeated_content,
)
from contrastive.run_folder import TRACKED, RunFolder
from contrastive.shards import Mixture, Rejected, ShardIndex, open_cache, open_index, why_not_compiled
from contrastive.training import (
    LINE_EVERY_SECONDS,
    FinalModel,
    Trainer,
    append_metrics,
    check_chunkable,
    check_identity,
    check_tracker_names,
    environment,
    exit_on_signal,
    read_metrics,
)

STOPPED = 75  # exit code, sysexits.h EX_TEMPFAIL: stopped by a signal with a checkpoint; run again with --resume
TASK_NAMES = {"zeroshot": "zero-shot", "probe": "probes"}  # as the seconds of each part are headed


def pretrain(
    config: Config,
    *,
    resume: Resume = False,
    overwrite: bool = False,
    stop_after: int | None = None,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Train as `config` says, then evaluate and write the report.

    Args:
        resume: go on from the newest whole checkpoint of the run folder; "if possible": or start, where there is none.
        overwrite: delete an earlier run in the same folder.
        stop_after: stop behind this step, with a checkpoint, as if the run had been interrupted.
        quiet: no progress.

    Returns:
        the results of a run that is complete (on the main process; the others get an empty dict), or None when it
        was stopped early.

    Raises:
        UserError: anything in the recipe, the data or the run folder that the user can mend.
    """
    folder = RunFolder(Path(config.run.dir))
    accelerator = build_accelerator(config)
    check_same_recipe(config, accelerator)
    with only_run(folder, accelerator):
        checkpoint = find_start(folder, accelerator, resume=resume, overwrite=overwrite)
        return _run(config, accelerator, folder, checkpoint, stop_after, quiet)


def _run(
    config: Config,
    accelerator: Accelerator,
    folder: RunFolder,
    checkpoint: Path | None,
    stop_after: int | None,
    quiet: bool,
) -> dict[str, Any] | None:
    """The run itself, in a folder that is its own. checkpoint: to go on from; None starts anew."""
    # Everything that can be wrong is looked at before the first thing is written or deleted.
    check_shards(config)
    check_labelled_sets(config)
    check_losses(config)
    check_metrics(config)
    if config.train.fused_loss:
        fuse()
    with main_process_first(accelerator):  # one process builds the index, the others read it
        data = build_data(config)
        validation_index = open_index(config.data.validation) if config.data.validation else None
        if config.data.cache == "pixels":
            for part in data.parts:
                open_cache(part)
    prints = set(gather_object([data.fingerprint]))
    if len(prints) > 1:
        raise UserError("data.train: the shards changed while the processes opened them; start again")
    for line in repeated_in(data, validation_index):
        accelerator.print(line, flush=True)
    trained_tokenizer = settle_tokenizer(config, data, accelerator, folder.path if checkpoint else None)
    model = build_model(config, trained_tokenizer)
    # From here on each process draws its own: dropout masks must differ between the shares of a batch.
    torch.manual_seed(config.run.seed + 1_000_003 * accelerator.process_index)
    trainer = build_trainer(
        config,
        accelerator,
        model,
        data,
        features=frozen_features(config, model, data, accelerator) if config.data.cache == "features" else None,
        teachers=teachers_of(config, data, accelerator),
        validate=validation(validation_index, config.data.workers),
        validation_index=validation_index,
        quiet=quiet,
    )
    if checkpoint is not None:
        check_identity(checkpoint, trainer.identity)
    accelerator.wait_for_everyone()  # no rank writes before all have looked
    if accelerator.is_main_process:
        if checkpoint is None:
            folder.clear()
        folder.write(folder.environment, json.dumps(environment(), indent=2) + "\n")
        folder.write(folder.config, dump_yaml(config))
        if trained_tokenizer:
            folder.write(folder.tokenizer, trained_tokenizer)
        if not quiet:
            print(summary(config, model, data, accelerator), flush=True)
            if checkpoint is not None:
                print(f"resume  behind step {checkpoint.name.removeprefix('step_')}, from {checkpoint}", flush=True)
    accelerator.wait_for_everyone()

    if config.track.trackers:
        # TensorBoard makes a folder of the project's name, the others gather runs under it
        named = {tracker: {"name": folder.path.name} for tracker in ("wandb", "trackio")}
        accelerator.init_trackers(TRACKED, init_kwargs=named)
    try:
        complete = trainer.fit(checkpoint, stop_after=stop_after)
        if not accelerator.is_main_process:
            return {} if complete else None
        kept = trainer.take_final_weights()
        two_tower: TwoTower = trainer.final.eval()
        save_model(two_tower, folder.model)
        with suppress(OSError):  # not empty: somebody's stacks
            folder.stacks.rmdir()
        if not complete:
            if not quiet:
                print(f"stopped at step {trainer.step}; `--resume` goes on from {folder.checkpoints}")
            return None
        with exit_on_signal(STOPPED):  # nothing is lost: a resumed run comes straight here
            return evaluate(
                config, load(folder.path, device=accelerator.device), validation_index, trainer, kept, quiet
            )
    finally:
        accelerator.end_training()


@contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """The main process does the block, then the others; also behind an error, which the others then meet themselves.

    accelerate's own leaves the others waiting for a main process that is gone.
    """
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
    try:
        yield
    finally:
        if accelerator.is_main_process:
            accelerator.wait_for_everyone()


def repeated_in(data: Mixture, validation_index: ShardIndex | None) -> list[str]:
    """Warnings of `repeated_content`, for training and validation."""
    sets = {"data.train": data, "data.validation": validation_index}
    return [line for key, found in sets.items() if found is not None for line in repeated_content(key, found)]


def settle_tokenizer(config: Config, data: Mixture, accelerator: Accelerator, kept: Path | None) -> str:
    """The text of the tokenizer that is trained on this run's captions; "" for a recipe that brings its own.

    Args:
        kept: the folder of the run that is resumed, which has it already.
    """
    choice = wants_training(config)
    if choice is None:
        return ""
    if kept is not None:
        return (kept / "tokenizer.json").read_text()
    texts = [""]
    if accelerator.is_main_process:
        try:
            texts = [train_tokenizer(data.captions(), choice.vocab_size, choice.lowercase).to_str()]
        except Rejected as fault:
            raise UserError(
                f"data.train: {fault}, while a tokenizer was trained on its captions; start again"
            ) from None
    broadcast_object_list(texts)
    return texts[0]


def summary(config: Config, model: TwoTower, data: Mixture, accelerator: Accelerator) -> str:
    """What is about to run, in three lines; a fourth where it could be faster."""

    def millions(module: Any) -> str:
        parameters = list(module.parameters())
        total, learned = (sum(p.numel() for p in ps) for ps in (parameters, [p for p in parameters if p.requires_grad]))
        return f"{total / 1e6:.2f} M" + ("" if learned == total else f" ({learned / 1e6:.2f} M learned)")

    batch, world = config.train.global_batch, accelerator.num_processes
    sets = list(config.data.train_sets)
    if len(sets) > 1:
        sets = [f"{path} ({weight}x)" for path, weight in zip(sets, data.weights, strict=True)]
    slower = ""
    if config.data.compiled == "auto" and has_work_for_compiled(config) and why_not_compiled() is not None:
        slower = f"\nloader  makes pixels without compiled code, slower: {why_not_compiled()}"
    return (
        f"model   image tower {millions(model.image)}, text tower {millions(model.text)} parameters; "
        f"{model.image_size} px, {model.dim} dimensions\n"
        f"data    {len(data):,} pairs in {' + '.join(sets)}; global batch {batch}"
        f"{f' = {world} processes x {batch // world}' if world > 1 else ''}, "
        f"{data.epoch_size / batch:.1f} steps an epoch\n"
        f"run     {config.run.dir} on {accelerator.device}, precision {accelerator.mixed_precision}, "
        f"loss {' + '.join(term.kind for term in terms_of(config.loss))}{slower}"
    )


def frozen_features(config: Config, model: TwoTower, data: Mixture, accelerator: Accelerator) -> FrozenFeatures:
    """What both locked trunks make of the data set: from disk, or run once over it.

    Raises:
        UserError: the text tower gives nothing from before its projection.
    """
    if not model.text.cuts_text:
        raise UserError(f"data.cache: features cannot be taken from the text tower of {model.name}; use pixels or none")
    found = kept_features(config, model.to(accelerator.device), data, accelerator, "the locked towers", "tower")
    return FrozenFeatures(*found)


def teachers_of(config: Config, data: Mixture, accelerator: Accelerator) -> dict[str, Teacher]:
    """What the teachers that the recipe's loss names make of the data set: from disk, or run once over it.

    A teacher sees each image whole, whatever the student's augmentation makes of it.
    """
    names = {term.teacher for term in terms_of(config.loss) if isinstance(term, DistillationConfig)}
    teachers = {}
    for name in sorted(names):
        model = load(name, device=accelerator.device)
        image, text, _ = kept_features(config, model, data, accelerator, f"the teacher {name}", "projected")
        scale = float(model.logit_scale.detach().exp())
        teachers[name] = Teacher(torch.from_numpy(image), torch.from_numpy(text), scale)
    return teachers


def kept_features(
    config: Config, model: TwoTower, data: Mixture, accelerator: Accelerator, name: str, features: str
) -> StoredFeatures:
    """Features of every image and first caption of `data`, rows as there; see `stored_features`."""
    store = Path(config.data.features) if config.data.features else Path(config.run.dir).parent / "features"
    started = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= LINE_EVERY_SECONDS or done == total:
            last, rate = now, done / (now - started)
            accelerator.print(f"  {done:,} of {total:,} images · {rate:,.0f} images/s", flush=True)

    def say(line: str) -> None:
        accelerator.print(line, flush=True)

    return stored_features(model, data, store, features=features, name=name, say=say, progress=show)


def validation(index: ShardIndex | None, workers: int) -> Callable[[Any], dict[str, float]] | None:
    """The shares that are logged during training: recall and zero-shot on the validation shards."""
    if index is None:
        return None

    def validate(model: Any) -> dict[str, float]:
        return evaluate_pairs(model, index, workers=workers).scalars()

    return validate


def evaluate(
    config: Config,
    model: TwoTower,
    validation_index: ShardIndex | None,
    trainer: Trainer,
    kept: FinalModel,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluate the finished model as ``eval`` says; writes ``results.json`` and ``report.html``, prints the table.

    kept: which weights `model` has.
    """
    folder = RunFolder(Path(config.run.dir))
    results: dict[str, Any] = {"run": folder.path.name, "seconds": {"training": trainer.seconds}, "sets": {}}
    results["model"] = asdict(kept)
    examples: dict[str, Examples] = {}

    def write() -> None:
        folder.write(folder.results, json.dumps(results, indent=2) + "\n")

    def add(found: Evaluation) -> None:
        name = found.results["name"]
        results["sets"][name] = found.results
        if found.results["kind"] == "pairs":
            results["seconds"][name] = found.results["seconds"]
        for task in ("zeroshot", "probe"):
            if task in found.results and "seconds" in found.results[task]:
                results["seconds"][f"{name} {TASK_NAMES[task]}"] = found.results[task]["seconds"]
        examples[name] = found.examples
        write()  # after each set: a later one that fails takes nothing with it

    if validation_index is not None:
        found = evaluate_pairs(model, validation_index, name="validation", examples=8, workers=config.data.workers)
        add(found)
        scalars = {f"validation/{key}": value for key, value in found.scalars().items()}
        if kept.stopped_early is None:  # else the validation that stopped it stands there already
            append_metrics(folder.metrics, trainer.step, scalars)
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
            folder.report,
            results=results,
            metrics=read_metrics(folder.metrics),
            examples=examples,
            config=folder.config.read_text(),
            environment=json.loads(folder.environment.read_text()),
        )
        results["seconds"]["report"] = time.perf_counter() - started
    write()
    if not quiet:
        print(format_results_table(results))
        print(f"model   {folder.model} ({kept})   results {folder.results}")
        if config.eval.report:
            print(f"report  {folder.report}")
    return results


def dry_run(config: Config) -> str:
    """Check a recipe as far as it goes without training: build the model, look for the data.

    Raises:
        UserError: the model cannot be built as asked.
    """
    found = all(may_exist(folder) for folder in config.data.train_sets)
    choice, trained = wants_training(config), ""
    data = build_data(config) if found else None
    if data is not None:
        check_batch(config, data)
    if choice is not None:
        captions = data.captions() if data is not None else ["no data to train a tokenizer on"]
        trained = train_tokenizer(captions, choice.vocab_size, choice.lowercase).to_str()
    check_losses(config)
    check_metrics(config)
    check_tracker_names(config.track.trackers)
    model = build_model(config, trained)
    if data is not None:
        duration = build_duration(config, data.epoch_size)
        build_schedule(config, duration)
        build_curriculum(config, model, duration, data.epoch_size)
    if config.train.chunk is not None:
        check_chunkable(model.train(), config.train.chunk)
    lines = [f"recipe is valid; run folder {config.run.dir}"]
    for name, module in (("image tower", model.image), ("text tower", model.text)):
        lines.append(f"{name:12s} {sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters")
    sets = [("train", folder) for folder in config.data.train_sets]
    for split, folder in [*sets, ("validation", config.data.validation)]:
        if folder is None:
            lines.append(f"{split:12s} none")
        elif may_exist(folder):
            lines.append(f"{split:12s} {folder}: {len(open_index(folder)):,} pairs")
        else:
            lines.append(f"{split:12s} {folder}: NOT FOUND; make it with `contrastive shard SOURCE {folder}`")
    if data is not None:
        lines += repeated_content("data.train", data)
    lines.append(f"{'batch':12s} {config.train.global_batch} pairs over all processes")
    return "\n".join(lines)
