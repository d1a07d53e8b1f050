"""Checkpoints on disk: all that the rest of a run depends on, in a folder that appears whole or not at all.

``checkpoints/step_<n>/`` holds tensors as safetensors, plain values as JSON, and nothing that is ever unpickled:

``model``, ``optimizer``, ``loss`` (where the loss keeps something from step to step), ``ema`` (the average of the
weights, where there is one)
``random_<rank>``: the generators of each process
``state.json``: the step, the position in the data, counters, and what the run is (see `check_identity`)
``manifest.json``: size of each of these files, and SHA-256 of each 16 MiB of them

A folder is written aside as ``.partial_step_<n>``, every file of it is on the disk (fsync) before its one rename to its
name, and older ones go only after that. So there is no moment at which a kill, a crash or a full disk costs the newest
whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from contrastive.errors import UserError
from contrastive.training.ema import WeightAverage
from contrastive.training.randomness import random_state, restore_random_state
from contrastive.training.sharding import complete, is_sharded, is_share, like

MANIFEST, STATE = "manifest.json", "state.json"
PIECE = 1 << 24  # bytes that are hashed together


@dataclass
class Snapshot:
    """A copy of a run between two steps, in memory that training does not touch.

    state: JSON, with "step". tensors: by file, without its suffix. parameters: names in "model" of what can learn.
    All of it is empty on every process but the main one, which writes.

    What only an update changes, on a CPU, need not be copied at once: `copy_rest` does it, in another thread, while the
    next batch goes forward and backward, and the update waits for `copied`, see `Saver.wait_until_copied`.
    """

    state: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    parameters: frozenset[str] = frozenset()
    rest: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (copy, what it is a copy of)
    copied: threading.Event = field(default_factory=threading.Event)

    def copy_rest(self) -> None:
        """Copy what is left; the training thread may read it meanwhile."""
        try:
            for copy, value in self.rest:
                # numpy's: torch's would take all cores from the step
                np.copyto(_as_array(copy), _as_array(value))
            self.rest.clear()
        finally:
            self.copied.set()

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def not_finite(self) -> str | None:
        """The name of a weight, or a batch statistic, that is no number, or of an infinite weight; None: all are fine.

        Finite gradients do not vouch for the step they led to. A buffer may hold infinities, as a mask does.
        """
        for name, value in self.tensors.get("model", {}).items():
            if value.is_floating_point() and value.numel():
                # both are NaN where one number is: a single pass, where `isfinite` writes several as large
                low, high = (float(edge) for edge in value.aminmax())
                if math.isnan(low) or (name in self.parameters and not (math.isfinite(low) and math.isfinite(high))):
                    return name
        return None


def take_snapshot(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    loss: nn.Module | None,
    state: dict[str, Any],
    spare: Snapshot | None = None,
    *,
    average: WeightAverage | None = None,
) -> Snapshot:
    """Copy all that a checkpoint holds; all processes call it, the main one keeps it.

    spare: an earlier one that nobody needs any more; its memory is used again, which halves the time, and of weights
        and moments on a CPU the copy is left to `Snapshot.copy_rest`.
    """
    generators = gather_object([random_state()])
    main = accelerator.is_main_process
    if not main and not is_sharded(model):
        return Snapshot()
    tensors = {
        "model": accelerator.unwrap_model(model).state_dict(),
        "optimizer": {
            f"{parameter}.{name}": value if torch.is_tensor(value) else torch.tensor(value)
            for parameter, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
        },
    }
    if main:
        tensors |= {f"random_{rank}": generator for rank, generator in enumerate(generators)}
        if loss is not None and loss.state_dict():
            tensors["loss"] = loss.state_dict()
        if average is not None:
            tensors["ema"] = average.state_dict()
    if accelerator.scaler is not None:
        state = {**state, "scaler": accelerator.scaler.state_dict()}
    if spare is None:
        parameters = frozenset(name for name, _ in accelerator.unwrap_model(model).named_parameters())
    else:
        parameters = spare.parameters
    snapshot = Snapshot(state, parameters=parameters)
    for file, values in tensors.items():
        old = {} if spare is None else spare.tensors.get(file, {})
        snapshot.tensors[file] = {}
        for key, value in values.items():
            whole = complete(value)  # one by one: what lies in shares is whole for the moment of the copy alone
            if not main:
                continue
            copy = old.get(key)
            stays = file in ("optimizer", "ema") or (file == "model" and key in parameters)  # until the next update
            if stays and whole is value and value.device.type == "cpu" and _fits(copy, value):
                snapshot.tensors[file][key] = copy
                snapshot.rest.append((copy, value.detach()))
            else:
                snapshot.tensors[file][key] = _copy(whole, copy)
    return snapshot if main else Snapshot()


def _copy(value: Tensor, spare: Tensor | None) -> Tensor:
    if _fits(spare, value):
        return spare.copy_(value.detach())
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _fits(spare: Tensor | None, value: Tensor) -> TypeGuard[Tensor]:
    return spare is not None and spare.shape == value.shape and spare.dtype == value.dtype


def _as_array(value: Tensor) -> np.ndarray:
    """The bits of a tensor on a CPU, of whatever type."""
    whole_numbers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
    return value.view(whole_numbers[value.element_size()]).numpy()


def write_checkpoint(folder: Path, snapshot: Snapshot) -> Path:
    """Write ``folder/step_<n>``; one process calls it.

    Raises:
        OSError, SafetensorError: the disk is full, the folder cannot be written; what was there before is whole, this
            one is not there.
    """
    assert not snapshot.rest, "copy_rest comes first"
    target, partial = folder / f"step_{snapshot.step}", folder / f".partial_step_{snapshot.step}"
    if target.is_dir() and fault_in(target) is None:
        return target  # the run came by here before, and steps are a pure function of the step before
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        files = {}
        for name, tensors in snapshot.tensors.items():
            files[f"{name}.safetensors"] = _write_tensors(partial / f"{name}.safetensors", tensors)
        files[STATE] = _write_json(partial / STATE, snapshot.state)
        _write_json(partial / MANIFEST, {"version": 1, "piece": PIECE, "files": files})
        _sync_folder(partial)
        if target.exists():  # damaged, or it would have been kept
            shutil.rmtree(target)
        os.rename(partial, target)  # the commit
        _sync_folder(folder)
    except Exception:  # safetensors has an error of its own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _write_json(path: Path, value: Any) -> dict[str, Any]:
    path.write_text(json.dumps(value, indent=2) + "\n")
    return _seal(path)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    safetensors.torch.save_file(tensors, path)
    return _seal(path)


def _seal(path: Path) -> dict[str, Any]:
    """Bring a file to the disk, hashing meanwhile; its entry in the manifest."""
    with open(path, "rb") as file, ThreadPoolExecutor(1) as pool:
        synced = pool.submit(os.fsync, file.fileno())
        entry = _entry(file.fileno())
        synced.result()
    return entry


def _entry(handle: int) -> dict[str, Any]:
    """Size of an open file, and the SHA-256 of each of its pieces: of one alone, one core would be the bottleneck."""
    size = os.fstat(handle).st_size

    def hashed(start: int) -> str:
        return hashlib.sha256(os.pread(handle, PIECE, start)).hexdigest()

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return {"bytes": size, "sha256": list(pool.map(hashed, range(0, size, PIECE)))}


def _sync_folder(folder: Path) -> None:
    """Make names in `folder` survive a loss of power, where the file system knows of that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems refuse it for folders
        pass
    finally:
        os.close(handle)


# ---- what is there


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or damaged."""
    found = [(int(m[1]), p) for p in folder.glob("step_*") if (m := re.fullmatch(r"step_(\d+)", p.name))]
    return [path for _, path in sorted(found)]


def fault_in(path: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None for one that is whole. Reads every byte of it."""
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
        for name, entry in files.items():
            with open(path / name, "rb") as file:
                found = _entry(file.fileno())
            if found["bytes"] != entry["bytes"]:
                return f"{name} has {found['bytes']:,} bytes in place of {entry['bytes']:,}"
            if found["sha256"] != entry["sha256"]:
                return f"{name} is not what was written (sha256)"
    except FileNotFoundError as fault:
        return f"{Path(fault.filename).name} is missing"
    except OSError as fault:
        return f"{fault.strerror}: {fault.filename}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def newest_whole(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """The newest checkpoint that is whole, and what is wrong with newer ones, by name."""
    damaged: dict[str, str] = {}
    for path in reversed(list_checkpoints(folder)):
        fault = fault_in(path)
        if fault is None:
            return path, damaged
        damaged[path.name] = fault
    return None, damaged


def prune(folder: Path, *, keep: int, keep_every: int | None, best: int | None) -> None:
    """Delete whole checkpoints but the newest `keep`, those of every so many steps, and the best one's step.

    What a killed save left aside goes too. Call it only behind a commit; `set_aside` has put away what is damaged.
    """
    kept = list_checkpoints(folder)
    for path in kept[:-keep]:
        step = int(path.name.removeprefix("step_"))
        if step != best and not (keep_every and step % keep_every == 0):
            shutil.rmtree(path, ignore_errors=True)
    for left in folder.glob(".partial_step_*"):
        shutil.rmtree(left, ignore_errors=True)


def set_aside(folder: Path, beyond: int) -> None:
    """Rename checkpoints behind step `beyond`, which are damaged, so that the run can save these steps again."""
    for path in list_checkpoints(folder):
        if int(path.name.removeprefix("step_")) > beyond:
            aside = folder / f".damaged_{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


# ---- back into a run


def load_checkpoint(
    path: Path,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    identity: dict[str, Any],
    *,
    loss: nn.Module | None = None,
    average: WeightAverage | None = None,
) -> dict[str, Any]:
    """Put model, optimizer, what the loss keeps, the average and random states back; returns the saved state.

    An `average` that the checkpoint does not hold begins with its weights, and says so.

    The optimizer's moments come from the checkpoint; rate, decay, betas and eps stay those of this run, so that they
    can be changed on the way.

    Raises:
        UserError: see `check_identity`; or the checkpoint holds nothing of a loss that keeps something.
    """
    state = check_identity(path, identity)
    two_tower = accelerator.unwrap_model(model)
    own = two_tower.state_dict()
    two_tower.load_state_dict({key: like(value, own.get(key)) for key, value in _load(path, "model").items()})
    if loss is not None and loss.state_dict():
        values = _load(path, "loss") if (path / "loss.safetensors").is_file() else {}
        if {k: v.shape for k, v in values.items()} != {k: v.shape for k, v in loss.state_dict().items()}:
            raise UserError(
                f"{path}: cannot resume, it does not hold what the loss keeps from step to step "
                f"({', '.join(loss.state_dict())}); resume with the loss that the run was started with"
            )
        loss.load_state_dict(values)
    if average is not None:
        load_average(path, average)
    _load_optimizer(optimizer, _load(path, "optimizer"))
    if accelerator.scaler is not None and "scaler" in state:
        accelerator.scaler.load_state_dict(state["scaler"])
    if (path / f"random_{accelerator.process_index}.safetensors").is_file():
        # absent when the run goes on with more processes; the loader does not depend on it
        restore_random_state(_load(path, f"random_{accelerator.process_index}"))
    return state


def load_average(path: Path, average: WeightAverage) -> None:
    """The average of a checkpoint; one begun with the model's weights, which are the checkpoint's, where it has none.

    Raises:
        UserError: it is the average of other parameters: those that learn were others.
    """
    if not (path / "ema.safetensors").is_file():
        average.start_anew()
        print(f"note: {path} holds no average of the weights; optim.ema begins with the weights of that step")
        return
    try:
        average.load_state_dict(_load(path, "ema"))
    except KeyError as name:
        raise UserError(
            f"{path}: cannot resume, its average is one of other weights ({name.args[0]} is in one of both only); "
            "resume with the recipe that it was started with"
        ) from None


def load_weights(path: Path, model: nn.Module, *, average: bool) -> None:
    """Put the weights of a checkpoint into a model; with `average` those of `optim.ema`, which it must hold."""
    weights = _load(path, "model")
    if average:
        averaged = _load(path, "ema")
        weights |= {name: averaged[name].to(weights[name].dtype) for name in weights.keys() & averaged.keys()}
    model.load_state_dict(weights)


def _load(path: Path, name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = safetensors.torch.load_file(path / f"{name}.safetensors")
    return tensors


def _load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        if is_share(parameter):
            value = like(value, parameter)
        elif value.shape == parameter.shape:
            # The fused AdamW goes through memory as it lies: moments in another layout than a channels-last weight's
            # would be added to the wrong entries.
            value = torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)
        state.setdefault(int(number), {})[name] = value
    # the groups are those of this run; `load_state_dict` puts the moments on the devices of their parameters
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def check_identity(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The state of the checkpoint `path`, if it belongs to a run with this `identity`.

    Args:
        identity: entries of the state that must be equal (the model's description …); those under "loader" are
            entries of the loader's state (the data's fingerprint …), which holds more.

    Raises:
        UserError: the checkpoint belongs to another model, data set or batch size.
    """
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    loader = state.get("loader", {})
    pairs = [(key, state.get(key), value) for key, value in identity.items() if key != "loader"]
    pairs += [(key, loader.get(key), value) for key, value in identity.get("loader", {}).items()]
    for key, saved, now in pairs:
        if saved != now and key == "decoder":  # of pictures; 1 was not written down
            raise UserError(
                f"{path}: cannot resume, its pictures were decoded by decoder {saved or 1}, now they are by {now} "
                "(from 2 on upright, as a viewer shows them); choose another run.dir, or continue with the version "
                "of contrastive that it was started with"
            )
        if saved != now:
            raise UserError(
                f"{path}: cannot resume, its {key} is another one ({_difference(saved, now)}); "
                "resume with the recipe that it was started with, or choose another run.dir"
            )
    return state


def _difference(saved: Any, now: Any, path: str = "") -> str:
    """The first place where two JSON values differ, as ``key: saved, now``."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted({*saved, *now}):
            if saved.get(key) != now.get(key):
                return _difference(saved.get(key), now.get(key), f"{path}.{key}" if path else key)
    return f"{path + ': ' if path else ''}saved {saved}, now {now}"
