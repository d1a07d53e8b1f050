"""Low-rank adapters on a locked tower (LoRA, Hu et al. 2021, arXiv:2106.09685), by peft.

A layer's weight W stays as it is, and B A x · alpha / rank is added to what it returns; B starts at zero. Legend: A is
``(rank, in)``, B ``(out, rank)``.

peft's own way for ``nn.MultiheadAttention`` is not used: it adds the product to the weight before every forward and
takes it off again, which leaves the weight changed by the rounding, and puts a new parameter in the place of the one
that DDP and the optimizer hold.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from contrastive.errors import UserError
from contrastive.models.two_tower import TwoTower

KINDS = (nn.Linear, nn.Conv2d, nn.Embedding)
NAME = "default"  # of the one adapter of a layer, in peft


def add_adapters(
    model: TwoTower,
    tower: str,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
) -> None:
    """Lock a tower and give it adapters, in place; what it returns does not change. Its projection learns whole.

    Args:
        tower: "image" or "text".
        dropout: probability, on what the adapters read.
        targets: names of modules as they end ("mlp.fc1", "qkv"); None: all linear maps in front of the projection, or,
            in a tower without any, all convolutions (those in groups left out). Only modules that are called can be
            adapted, which one forward tells: CLIP's attention reads the weights of its linear maps and calls none.

    Raises:
        UserError: peft is not installed, or there is nothing of that name, or it cannot be adapted.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError(f"model.{tower}.lora needs peft; `pip install contrastive[lora]`") from None
    half: Any = getattr(model, tower)
    model.lock(tower)
    learned = [parameter for parameter in half.parameters() if parameter.requires_grad]
    key = f"model.{tower}.lora.targets"
    called = _called(model, tower)
    names = _every_layer(called, key) if targets is None else _named(half, called, targets, key)
    if dropout and any(isinstance(called[name], nn.Embedding) for name in names):
        raise UserError(f"model.{tower}.lora.dropout: {dropout:g} does nothing for an embedding; set it to 0")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules="|".join(re.escape(name) for name in names),
    )
    inject_adapter_in_model(config, half, NAME)
    for parameter in learned:  # peft locks all but its own
        parameter.requires_grad_(True)
    model.adapters[tower] = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": names}


def _called(model: TwoTower, tower: str) -> dict[str, nn.Module]:
    """The modules in front of the projection that one forward of the tower calls, by name."""
    half: Any = getattr(model, tower)
    projection = {id(parameter) for parameter in half.projection_parameters()}
    called: list[nn.Module] = []
    parts = {
        name: part
        for name, part in half.named_modules()
        if isinstance(part, KINDS) and not any(id(parameter) in projection for parameter in part.parameters())
    }
    hooks = [part.register_forward_hook(lambda part, *_: called.append(part)) for part in parts.values()]
    model.eval()
    with torch.no_grad():
        if tower == "image":
            model.image_features(torch.zeros(1, 3, *model.input_size, device=model.device))
        else:
            model.text_features(model.tokenize(["a"]).to(model.device))
    for hook in hooks:
        hook.remove()
    return {name: part for name, part in parts.items() if any(part is one for one in called)}


def _every_layer(called: dict[str, nn.Module], key: str) -> list[str]:
    linear = [name for name, part in called.items() if isinstance(part, nn.Linear)]
    convolutions = [name for name, part in called.items() if isinstance(part, nn.Conv2d) and part.groups == 1]
    if not linear and not convolutions:
        raise UserError(f"{key}: auto finds neither linear maps nor convolutions; name modules, such as [embedding]")
    return linear or convolutions


def _named(half: nn.Module, called: dict[str, nn.Module], targets: Sequence[str], key: str) -> list[str]:
    names: list[str] = []
    for target in targets:
        found = {name: part for name, part in half.named_modules() if f".{name}".endswith(f".{target}")}
        if not found:
            near = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in called))
            raise UserError(f"{key}: no module of that tower is called {target!r}; such as: {near}")
        for name, part in found.items():
            if name not in called:
                why = "is no linear map, convolution or embedding in front of the projection"
                if isinstance(part, KINDS):
                    why = "is not called: what stands around it reads its weight, or it is the projection"
                raise UserError(f"{key}: {name} ({type(part).__name__}) cannot be adapted, as it {why}")
            if isinstance(part, nn.Conv2d) and part.groups > 1:
                raise UserError(f"{key}: {name} cannot be adapted, as it is a convolution in {part.groups} groups")
        names += [name for name in found if name not in names]
    return names


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model`, its adapters merged: names and shapes are those of the model without them."""
    state: dict[str, Tensor] = model.state_dict()
    for name, part in model.named_modules():
        if not (hasattr(part, "base_layer") and hasattr(part, "get_delta_weight")):
            continue
        layer: Any = part
        for key in [key for key in state if key.startswith(f"{name}.")]:
            value = state.pop(key)
            if key.startswith(f"{name}.base_layer."):
                state[f"{name}.{key.removeprefix(f'{name}.base_layer.')}"] = value
        with torch.no_grad():
            state[f"{name}.weight"] = layer.base_layer.weight + layer.get_delta_weight(NAME)
    return state
