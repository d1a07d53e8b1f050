"""The run folder: the names of its files, which of them a run wrote, what may be deleted, and one run at a time.

A folder holds a run when its ``config.yaml`` and ``environment.json`` are of the form that a run writes. Of the other
names each is looked at by itself: a file that a run did not write is never deleted nor written over.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from contrastive.errors import UserError
from contrastive.locks import Busy, only_one

LOCK = ".lock"
LARGEST = 1 << 28  # bytes of a file that is read to see whose it is
ASIDE = re.compile(r"\.[a-z]+\.[a-z]+\.aside")  # a file on its way to its name
CHECKPOINT = re.compile(r"(\.partial_|\.damaged_)?step_\d+")
LEFT = r"\.tmp\w{6}"  # what safetensors writes before it renames it
CHECKPOINT_FILE = re.compile(rf"(model|optimizer|loss|ema|random_\d+)\.safetensors|state\.json|manifest\.json|{LEFT}")
BEST = re.compile(r"\.?best\.json")
STACKS = re.compile(r"rank_\d+\.txt")
EVENTS = re.compile(r"events\.out\.tfevents\..+")
MODEL_FILE = re.compile(rf"config\.json|model\.safetensors(\.tmp)?|tokenizer\.json|{LEFT}")
TRACKED = "contrastive"  # the project's name: TensorBoard makes a folder of it


class RunFolder:
    """Where a run writes, by name.

    Args:
        path: need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.environment = path / "config.yaml", path / "environment.json"
        self.tokenizer, self.metrics = path / "tokenizer.json", path / "metrics.jsonl"
        self.rejected, self.results, self.report = path / "rejected.jsonl", path / "results.json", path / "report.html"
        self.checkpoints, self.model = path / "checkpoints", path / "model"
        self.stacks, self.tensorboard = path / "stacks", path / "tensorboard"

    # ---- what is there

    @property
    def holds_run(self) -> bool:
        """Whether a run was started here, however far it came."""
        files = ((self.config, _config), (self.environment, _environment))
        return all(_is_file(path) and ours(path) for path, ours in files)

    @property
    def has_results(self) -> bool:
        """Whether a new run would take something from here that took training to make."""
        rows = self.metrics.is_file() and self.metrics.stat().st_size > 0
        saved = _children(self.checkpoints, CHECKPOINT) or _children(self.model, MODEL_FILE)
        return rows or bool(saved) or self.results.exists() or self.report.exists()

    def check_new(self) -> None:
        """Refuse a folder that is neither new, nor empty, nor of a run. Names that begin with a dot do not count.

        Raises:
            UserError: names a file that is there.
        """
        names = [name for name in _names(self.path) if not name.startswith(".")]
        begun = names == [self.environment.name] and _is_file(self.environment) and _environment(self.environment)
        if names and not begun and not self.holds_run:  # begun: the first file is there, and a kill came
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"run.dir: {self.path} holds {names[0]}{more}, and is not the folder of a run (by config.yaml and "
                "environment.json); name a new folder, an empty one, or one of a run. Nothing was changed"
            )

    def check_names(self) -> None:
        """Refuse what a run would write over and no run wrote.

        Raises:
            UserError: names it.
        """
        foreign = next(self._foreign(), None)
        if foreign is not None:
            path, why = foreign
            raise UserError(
                f"run.dir: {path} {why}, and a run writes to that name; move it away, or choose another run.dir. "
                "Nothing was changed"
            )

    def _foreign(self) -> Iterator[tuple[Path, str]]:
        for path, ours in self._files():
            if path.is_symlink():
                yield path, f"is a link, to {os.readlink(path)}"
            elif path.exists() and not (path.is_file() and (path.stat().st_size == 0 or ours(path))):
                yield path, "was not written by a run"
        for folder in (self.checkpoints, self.model, self.stacks, self.tensorboard, self.tensorboard / TRACKED):
            if folder.is_symlink() and not folder.resolve().is_relative_to(self.path.resolve()):
                yield folder, f"is a link out of the run folder, to {os.readlink(folder)}"
            elif (folder.exists() or folder.is_symlink()) and not folder.is_dir():
                yield folder, "is not a folder"
        for path in _children(self.checkpoints, CHECKPOINT):
            if path.is_symlink() or not path.is_dir():
                yield path, "is not a checkpoint"
            else:
                yield from ((path / n, "is not of a checkpoint") for n in _names(path) if not _in_checkpoint(path / n))
        if any(True for _ in _children(self.model, MODEL_FILE)) and not _model(self.model / "config.json"):
            yield self.model, "holds a model that no run wrote"
        for pattern, folder in ((MODEL_FILE, self.model), (BEST, self.checkpoints), (STACKS, self.stacks)):
            yield from ((p, "is not a file") for p in _children(folder, pattern) if p.is_symlink() or not p.is_file())

    def _files(self) -> list[tuple[Path, Callable[[Path], bool]]]:
        """The files at the top, each with a look at whether a run wrote it."""
        return [
            (self.config, _config),
            (self.environment, _environment),
            (self.tokenizer, lambda path: _has(path, "version", "model", "pre_tokenizer")),
            (self.metrics, lambda path: _begins(path, b'{"step":')),
            (self.rejected, lambda path: _begins(path, b'{"step":')),
            (self.results, lambda path: _has(path, "run", "seconds", "sets")),
            (self.report, lambda path: _begins(path, b'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">')),
        ]

    # ---- what goes

    def clear(self) -> None:
        """Delete what an earlier run wrote, and nothing else. Call `check_names` before.

        The two files by which a run is recognised stay, to be replaced: what is interrupted can be done again.
        """
        for path in [*_children(self.checkpoints, CHECKPOINT)]:
            for name in _names(path):
                (path / name).unlink()
            path.rmdir()
        for path in [*_children(self.checkpoints, BEST), *_children(self.stacks, STACKS)]:
            path.unlink()
        for path in _children(self.model, MODEL_FILE):
            path.unlink()
        tracked = self.tensorboard / TRACKED
        for folder, inner, files in os.walk(tracked, topdown=False):  # follows no links
            for name in filter(EVENTS.fullmatch, files):
                (Path(folder) / name).unlink()
            for name in inner:
                _remove_empty(Path(folder) / name)
        for emptied in (tracked, self.tensorboard, self.stacks, self.model, self.checkpoints):
            _remove_empty(emptied)
        for path in _children(self.path, ASIDE):
            path.unlink()
        for path, _ in self._files():
            if path not in (self.config, self.environment):
                path.unlink(missing_ok=True)

    # ---- what is written

    def write(self, path: Path, text: str) -> None:
        """Write a text file at the top so that it is there complete or not at all."""
        aside = path.with_name(f".{path.name}.aside")
        try:
            with open(aside, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    # ---- whose it is

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Keep other runs out of the folder during the block; it is made, and goes again if nothing was put into it.

        Raises:
            UserError: another process has it, or it is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run.dir: {self.path} is a file; name a folder, which may be new")
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with ExitStack() as held:
                try:
                    held.enter_context(only_one(self.path / LOCK))
                except Busy as holder:
                    raise UserError(
                        f"run.dir: {self.path} is in use by {holder}; wait for that run, stop it, or choose another "
                        "run.dir"
                    ) from None
                yield
        finally:
            for path in missing:
                _remove_empty(path)


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def _children(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """What a run may have written into `folder`, by its name."""
    return [folder / name for name in _names(folder) if pattern.fullmatch(name)]


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty, not there, or a link
        folder.rmdir()


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _in_checkpoint(path: Path) -> bool:
    return CHECKPOINT_FILE.fullmatch(path.name) is not None and _is_file(path)


def _config(path: Path) -> bool:
    # BaseLoader takes every value for text: names are all that counts, and what looks like a date may be none
    return _blocks(path, lambda text: yaml.load(text, Loader=yaml.BaseLoader), "run", "model", "data", "train", "optim")


def _environment(path: Path) -> bool:
    return _blocks(path, lambda text: json.loads(text)["packages"], "contrastive")


def _model(path: Path) -> bool:
    """Whether a model folder's description is of our own format; one that was left unfinished has none."""
    return not path.exists() or _has(path, "format", "name", "dim")


def _has(path: Path, *keys: str) -> bool:
    return _blocks(path, json.loads, *keys)


def _blocks(path: Path, parse: Callable[[str], Any], *keys: str) -> bool:
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return False
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, RecursionError):
        return False
    return isinstance(found, dict) and all(key in found for key in keys)


def _begins(path: Path, start: bytes) -> bool:
    """Whether a file begins so; a shorter one, which was cut off, as far as it goes."""
    with open(path, "rb") as file:
        found = file.read(len(start))
    return found == start[: len(found)]
