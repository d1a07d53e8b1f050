"""What can be wrong with a run, looked at before the first thing is written or deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Literal, TypeVar, cast

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from contrastive.config import Config, CustomLossConfig, DistillationConfig, dump_yaml, terms_of
from contrastive.errors import UserError
from contrastive.evaluation import SCALARS, open_labelled, read_templates
from contrastive.losses import CustomLoss
from contrastive.run_folder import RunFolder
from contrastive.shards import Mixture, ShardIndex
from contrastive.shards.storage import is_remote
from contrastive.training import list_checkpoints, newest_whole

Resume = bool | Literal["if possible"]
Result = TypeVar("Result")
NEARLY_ALL = 0.99  # share of pairs with one caption, from which on a warning is given


def check_same_recipe(config: Config, accelerator: Accelerator) -> None:
    """Refuse processes of one run that were started with different recipes, seeds among them."""
    recipes = gather_object([dump_yaml(config).splitlines()])
    for rank, lines in enumerate(recipes):
        if lines != recipes[0]:
            first, other = next(
                ((a, b) for a, b in zip_longest(recipes[0], lines, fillvalue="nothing") if a != b), ("", "")
            )
            raise UserError(
                f"the processes were started with different recipes: '{first.strip()}' on process 0, "
                f"'{other.strip()}' on process {rank}; give all of them the same recipe and overrides"
            )


@contextmanager
def only_run(folder: RunFolder, accelerator: Accelerator) -> Iterator[None]:
    """Keep other runs out of the folder, see `RunFolder.owned`; the main process holds the lock.

    Raises:
        UserError: on all processes.
    """
    with ExitStack() as held:
        on_main_process(accelerator, lambda: held.enter_context(folder.owned()))
        yield


def on_main_process(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """The result of `action` on the main process, or its UserError or OSError: the same on all processes."""
    outcome: list[tuple[Result | None, UserError | None]] = []
    if accelerator.is_main_process:
        try:
            outcome = [(action(), None)]
        except UserError as error:
            outcome = [(None, error)]
        except OSError as error:
            outcome = [(None, UserError(f"{error.filename or 'file'}: {error.strerror or error}"))]
    value, fault = gather_object(outcome)[0]
    if fault is not None:
        raise fault
    return cast(Result, value)


def find_start(folder: RunFolder, accelerator: Accelerator, *, resume: Resume, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, None for a new run; nothing is written or deleted.

    The main process looks for the newest one that is whole, and the others do as it does.
    """
    whole, faults = on_main_process(accelerator, lambda: _find_start(folder, resume, overwrite))
    for fault in faults:
        accelerator.print(f"warning: damaged checkpoint {fault}; going on from the one before, {whole}", flush=True)
    return whole


def _find_start(folder: RunFolder, resume: Resume, overwrite: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and the faults of newer ones."""
    saved = bool(list_checkpoints(folder.checkpoints))
    if not (resume and saved):  # checkpoints alone, as copied from elsewhere, can be resumed from
        folder.check_new()
    folder.check_names()
    run_dir = folder.path
    if resume and saved:
        whole, damaged = newest_whole(folder.checkpoints)
        faults = [f"{folder.checkpoints / name}: {fault}" for name, fault in damaged.items()]
        if whole is None:
            raise UserError(
                f"--resume: every checkpoint in {run_dir} is damaged ({'; '.join(faults)}); bring one back, or start "
                "again with --overwrite"
            )
        return whole, faults
    started = folder.has_results
    if resume is True:
        way = "start again with --overwrite" if started else "leave the option out to start"
        raise UserError(f"--resume: {run_dir} has no checkpoint to go on from; {way}")
    if started and not resume and not overwrite:
        raise UserError(
            f"run.dir: {run_dir} already holds a run; add --resume to go on, --overwrite to start again, "
            "or run.dir=ANOTHER to keep both"
        )
    return None, []


def check_shards(config: Config) -> None:
    """Name the key of a folder that is not there, and what makes it."""
    folders = [("data.train", folder) for folder in config.data.train_sets]
    for key, folder in [*folders, ("data.validation", config.data.validation)]:
        if folder is not None and not may_exist(folder):
            way = f"make it with `contrastive shard SOURCE {folder}`, shipped sets with `python data/SET/prepare.py`"
            raise UserError(f"{key}: {folder} does not exist; {way}")


def may_exist(shards: str) -> bool:
    """Whether shards lie there; a URL, a glob or a brace pattern is left to `open_index`."""
    return Path(shards).exists() or is_remote(shards) or any(mark in shards for mark in "*?[{")


def check_labelled_sets(config: Config) -> None:
    """Open what the end of the run will need, so that a wrong path is told before hours of training."""
    for labelled in config.eval.labelled:
        read_templates(labelled.templates)
        for path in (labelled.test, labelled.train if "probe" in labelled.tasks else None):
            if path is not None:
                open_labelled(path)


def check_losses(config: Config) -> None:
    """Import a loss of the user's own and look for teachers, before towers run over the data."""
    for term in terms_of(config.loss):
        if isinstance(term, CustomLossConfig):
            CustomLoss(term.path, term.args)
        if isinstance(term, DistillationConfig) and not Path(term.teacher).exists() and ":" not in term.teacher:
            raise UserError(
                f"loss.teacher: {term.teacher} does not exist; name a run folder, a model folder or an open_clip "
                "model with its weights, NAME:TAG (without a tag its weights are random)"
            )


def check_metrics(config: Config) -> None:
    """Refuse the name of a number that no validation gives, before the first one."""
    stop = None if config.eval.stop is None else config.eval.stop.metric
    for key, name in (("checkpoint.keep_best", config.checkpoint.keep_best), ("eval.stop.metric", stop)):
        if name is not None and name not in SCALARS:
            raise UserError(f"{key}: {name!r}; validation gives {', '.join(sorted(SCALARS))}")


def repeated_content(key: str, data: Mixture | ShardIndex) -> Iterator[str]:
    """A line where nearly all pairs have one caption, or one image: a loss near 0 says nothing then.

    Args:
        key: of the recipe, which the line begins with.
    """
    weights = np.ones(len(data))
    if isinstance(data, Mixture):  # as often as a sample is drawn
        weights = np.concatenate(
            [np.full(len(part), weight / len(part)) for part, weight in zip(data.parts, data.weights, strict=True)]
        )
    if len(data) < 2:
        return
    for what, ids in (("caption", data.ids), ("image", data.image_ids)):
        found, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        shares = np.bincount(inverse.ravel(), weights) / weights.sum()
        most = int(shares.argmax())
        if len(found) < len(ids) and shares[most] >= NEARLY_ALL:
            text = data.caption(int(first[most])) if what == "caption" else f"the image of {data.key(int(first[most]))}"
            text = text if len(text) <= 60 else text[:57] + "..."
            yield (
                f"warning: {key}: {shares[most]:.1%} of the pairs have the same {what}, {text!r}; equal pairs are no "
                "negatives of each other, so that a loss of 0 or an accuracy of 100% means nothing here"
            )
