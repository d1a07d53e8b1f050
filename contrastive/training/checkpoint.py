"""Checkpoints: all that the rest of a run depends on, in a folder that appears whole or not at all.

``checkpoints/step_<n>/`` holds ``model.safetensors``, ``optimizer.pt``, ``random_<rank>.pt``, ``state.json``, and
``loss.safetensors`` where the loss keeps something from step to step.
The ``.pt`` files are read with ``weights_only=True``: nothing is unpickled but tensors and plain values.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from contrastive.errors import UserError


def random_state() -> dict[str, Any]:
    """State of every generator that a step may draw from, of this process."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, gauss],
        "python": list(random.getstate()[1]),
    }
    if torch.accelerator.is_available():
        state["accelerator"] = torch.get_device_module().get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every generator back to what `random_state` saw."""
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate((3, tuple(state["python"]), None))
    if "accelerator" in state and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state["accelerator"])


def save_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    state: dict[str, Any],
    *,
    loss: nn.Module | None = None,
    keep: int,
) -> Path:
    """Write ``folder/step_<n>`` with n = ``state["step"]``, then delete the oldest beyond `keep`. All ranks call it."""
    target = folder / f"step_{state['step']}"
    partial = folder / f".partial_step_{state['step']}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    torch.save(random_state(), partial / f"random_{accelerator.process_index}.pt")
    if accelerator.is_main_process:
        weights = accelerator.unwrap_model(model).state_dict()
        save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, partial / "model.safetensors")
        kept = {} if loss is None else loss.state_dict()
        if kept:
            save_file({k: v.detach().cpu().contiguous() for k, v in kept.items()}, partial / "loss.safetensors")
        saved = {"optimizer": optimizer.state_dict()}
        if accelerator.scaler is not None:
            saved["scaler"] = accelerator.scaler.state_dict()
        torch.save(saved, partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)  # the commit: a name without the prefix is whole
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("step_*") if (m := re.fullmatch(r"step_(\d+)", p.name))]
    return [path for _, path in sorted(found) if (path / "state.json").is_file()]


def load_checkpoint(
    path: Path,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    identity: dict[str, Any],
    *,
    loss: nn.Module | None = None,
) -> dict[str, Any]:
    """Put model, optimizer, what the loss keeps and random states back; returns the saved state.

    The optimizer's moments come from the checkpoint; rate, decay, betas and eps stay those of this run, so that they
    can be changed on the way.

    Raises:
        UserError: see `check_identity`; or the checkpoint holds nothing of a loss that keeps something.
    """
    state = check_identity(path, identity)
    accelerator.unwrap_model(model).load_state_dict(load_file(path / "model.safetensors"))
    if loss is not None and loss.state_dict():
        kept = path / "loss.safetensors"
        values = load_file(kept) if kept.is_file() else {}
        if {k: v.shape for k, v in values.items()} != {k: v.shape for k, v in loss.state_dict().items()}:
            raise UserError(
                f"{path}: cannot resume, it does not hold what the loss keeps from step to step "
                f"({', '.join(loss.state_dict())}); resume with the loss that the run was started with"
            )
        loss.load_state_dict(values)
    saved = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved["optimizer"])
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
    if accelerator.scaler is not None and "scaler" in saved:
        accelerator.scaler.load_state_dict(saved["scaler"])
    own = path / f"random_{accelerator.process_index}.pt"
    if own.is_file():  # absent when the run goes on with more processes; the loader does not depend on it
        restore_random_state(torch.load(own, weights_only=True))
    return state


def check_identity(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The state of the checkpoint `path`, if it belongs to a run with this `identity`.

    Args:
        identity: entries of the state that must be equal (the model's description …); those under "loader" are
            entries of the loader's state (the data's fingerprint …), which holds more.

    Raises:
        UserError: the checkpoint belongs to another model, data set or batch size.
    """
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    loader = state.get("loader", {})
    pairs = [(key, state.get(key), value) for key, value in identity.items() if key != "loader"]
    pairs += [(key, loader.get(key), value) for key, value in identity.get("loader", {}).items()]
    for key, saved, now in pairs:
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
