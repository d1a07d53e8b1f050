"""The state of every generator of random numbers that a step may draw from, as tensors."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """What `restore_random_state` takes: torch's, numpy's and Python's generators, and the accelerator's."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    _, words, normal = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.array([*keys, position, has_gauss], np.int64)),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if normal is None else [normal], dtype=torch.float64),
    }
    if torch.accelerator.is_available():
        state["accelerator"] = torch.get_device_module().get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Put every generator back to what `random_state` saw."""
    torch.set_rng_state(state["torch"])
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, float(state["numpy_gauss"])))
    normal = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), normal[0] if normal else None))
    if "accelerator" in state and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state["accelerator"])
