"""Which layer of its tower a parameter is in, counted from the input."""

from __future__ import annotations

from typing import Any

from timm.models import group_parameters
from torch import nn

from contrastive.errors import UserError

# open_clip's own ResNet, whose blocks stand in four stages; 99999 is timm's "the layer before".
_STAGES = {
    "stem": r"^(?:conv|bn)\d",
    "blocks": [(r"^layer(\d+)\.(\d+)", None), (r"^", (99999,))],
}


def layers_of(tower: Any) -> dict[str, int]:
    """The layer of each parameter of a tower, by its name there.

    Stem, embeddings and positions are layer 0, the blocks 1, 2, ...; a norm or a pooling behind the blocks belongs to
    the last of them, as in timm; the projection is the layer after that. Adapters are in the layer that they adapt.

    A timm network tells its blocks itself (``group_matcher``). Of another one, its blocks are the longest list of
    modules that is in no other list, and what is registered before them is layer 0.

    Raises:
        UserError: no blocks are to be found.
    """
    projection = {id(parameter) for parameter in tower.projection_parameters()}
    trunk = [name for name, parameter in tower.named_parameters() if id(parameter) not in projection]
    found = _told_by_timm(tower) or _by_list(tower, trunk) or _by_stage(tower)
    if not found:
        raise UserError(f"layer_decay: the layers of a {type(tower).__name__} of this kind are not known; use 1")
    last = max(found[name] for name in trunk if name in found)
    return {name: found.get(name, last) if name in set(trunk) else last + 1 for name, _ in tower.named_parameters()}


def _told_by_timm(tower: nn.Module) -> dict[str, int]:
    for prefix, network in tower.named_modules():
        if hasattr(network, "group_matcher"):
            told = group_parameters(network, network.group_matcher(coarse=False), reverse=True)
            return {f"{prefix}.{name}": layer for name, layer in told.items()}
    return {}


def _by_list(tower: nn.Module, names: list[str]) -> dict[str, int]:
    lists: dict[str, int] = {}
    for prefix, part in tower.named_modules():
        if isinstance(part, nn.ModuleList) and not any(prefix.startswith(f"{outer}.") for outer in lists):
            lists[prefix] = len(part)
    if not lists:
        return {}
    blocks = max(lists, key=lambda prefix: lists[prefix])
    layers, layer = {}, 0
    for name in names:
        if name.startswith(f"{blocks}."):
            layer = int(name.removeprefix(f"{blocks}.").split(".")[0]) + 1
        layers[name] = layer  # before the blocks: 0; behind them: that of the last
    return layers


def _by_stage(tower: nn.Module) -> dict[str, int]:
    for prefix, network in tower.named_modules():
        if all(hasattr(network, f"layer{stage}") for stage in (1, 2, 3, 4)):
            told = group_parameters(network, _STAGES, reverse=True)
            return {f"{prefix}.{name}": layer for name, layer in told.items()}
    return {}
