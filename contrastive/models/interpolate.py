"""Between a model and what fine-tuning made of it (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contrastive.errors import UserError
from contrastive.models.adapters import plain_state
from contrastive.models.folder import describe, load, reinitialised
from contrastive.models.two_tower import TwoTower
from contrastive.preprocessing import differences


def interpolate(start: str | Path | TwoTower, tuned: str | Path | TwoTower, alpha: float) -> TwoTower:
    """The model with the weights (1 - alpha) · start + alpha · tuned, on the CPU, in evaluation mode.

    All floating-point tensors are mixed, the logit scale (as its logarithm) and batch statistics among them, in their
    own precision; 0 gives `start` and 1 `tuned`, bit for bit. What is no floating-point number (a counter, a mask)
    comes from the nearer model, from `tuned` at 0.5.

    Args:
        start, tuned: a run folder, a model folder, or a model; one architecture and one tokenizer.
        alpha: 0 to 1.

    Raises:
        UserError: alpha is outside, or the models differ; it names the first tensor or setting that does.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha: {alpha:g} is not between 0 and 1")
    first, second = (end if isinstance(end, TwoTower) else load(end, device="cpu") for end in (start, tuned))
    before, after = plain_state(first), plain_state(second)
    _check_alike(first, second, before, after)
    mixed = reinitialised(first).cpu()
    mixed.load_state_dict({name: _between(value, after[name], alpha) for name, value in before.items()})
    return mixed.eval()


def _between(start: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    start, tuned = start.detach().cpu(), tuned.detach().cpu()
    if alpha in (0, 1) or not start.is_floating_point():
        return (start if alpha < 0.5 else tuned).clone()
    wide = torch.promote_types(start.dtype, torch.float32)
    return torch.lerp(start.to(wide), tuned.to(wide), alpha).to(start.dtype)


def _check_alike(first: TwoTower, second: TwoTower, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    for name in [*before, *(name for name in after if name not in before)]:
        shapes = [f"{tuple(state[name].shape)}" if name in state else "missing" for state in (before, after)]
        if shapes[0] != shapes[1]:
            raise UserError(f"the models differ: {name} is {shapes[0]} in the first and {shapes[1]} in the second")
        if before[name].dtype != after[name].dtype:
            raise UserError(f"the models differ: {name} is {before[name].dtype} and {after[name].dtype}")
    if first.preprocessing != second.preprocessing:
        ours, theirs = differences(first.preprocessing, second.preprocessing)
        raise UserError(f"the models differ in preprocessing: {ours} in the first, {theirs} in the second")
    one, other = describe(first), describe(second)
    for key in sorted({*one, *other}):
        if key != "name" and one.get(key) != other.get(key):
            raise UserError(f"the models differ in {_first_difference(key, one.get(key), other.get(key))}")
    if _tokenizer(first) != _tokenizer(second):
        raise UserError("the models differ in their tokenizers: a token of one is another word to the other")


def _first_difference(path: str, one: Any, other: Any) -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        key = next(key for key in sorted({*one, *other}) if one.get(key) != other.get(key))
        return _first_difference(f"{path}.{key}", one.get(key), other.get(key))
    return f"{path}: {one} in the first, {other} in the second"


def _tokenizer(model: TwoTower) -> tuple[dict[str, Any], dict[str, bytes]]:
    with tempfile.TemporaryDirectory() as folder:
        described = model.tokenizer.save(Path(folder))
        return described, {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
