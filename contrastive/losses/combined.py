"""A weighted sum of losses, and a loss of the user's own."""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from contrastive.errors import UserError


class WeightedSum(nn.Module):
    """Several losses added up, each times its weight; each keeps the contract, so their sum does.

    Args:
        terms: ``(name, loss, weight)``; names are different from one another and head what is logged.

    Returns "loss", and every term's own entries as ``<name>_<entry>`` (``siglip_loss``, without its weight).
    """

    def __init__(self, terms: Sequence[tuple[str, nn.Module, float]]) -> None:
        super().__init__()
        names = [name for name, _, _ in terms]
        if not terms or len(set(names)) != len(names):
            raise UserError(f"a sum of losses named {names}: give at least one, and each a name of its own")
        for name, _, weight in terms:
            if not math.isfinite(weight):
                raise UserError(f"weight {weight} of {name}: choose a finite number")
        self.losses = nn.ModuleDict({name: loss for name, loss, _ in terms})
        self.weights = {name: weight for name, _, weight in terms}
        self.needs = tuple(sorted({need for _, loss, _ in terms for need in needs_of(loss)}))

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        ids: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        valid: Tensor | None = None,
        **further: Tensor,
    ) -> dict[str, Tensor]:
        """Call each loss with what it needs of `further`."""
        total = torch.zeros((), device=image.device)
        logged: dict[str, Tensor] = {}
        for name, loss in self.losses.items():
            wanted = {need: further[need] for need in needs_of(loss) if need in further}
            result = loss(image, text, scale, bias, ids, group, valid, **wanted)
            total = total + self.weights[name] * result["loss"]
            logged |= {f"{name}_{key}": value.detach() for key, value in result.items() if torch.is_tensor(value)}
        return {"loss": total, **logged}


def needs_of(loss: Any) -> tuple[str, ...]:
    """What else of a batch a loss wants, beyond the contract: see `Loss`."""
    return tuple(getattr(loss, "needs", ()))


class CustomLoss(nn.Module):
    """A loss of the user's own, by import path, with arguments bound.

    Args:
        path: ``package.module:name`` of a function that keeps the loss contract (further arguments as keywords), or of
            a class whose instances do.
        arguments: for the class's constructor, or bound as keywords of the function.

    Raises:
        UserError: nothing of that name can be imported, or it does not take the arguments.
    """

    def __init__(self, path: str, arguments: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.path, self.arguments = path, dict(arguments or {})
        found = _import(path)
        self.bound: dict[str, Any] = {}
        try:
            if inspect.isclass(found):
                inspect.signature(found).bind(**self.arguments)
            else:  # as a training step calls it
                inspect.signature(found).bind(None, None, None, None, ids=None, valid=None, **self.arguments)
                self.bound = self.arguments
        except TypeError as error:
            raise UserError(
                f"loss.args: {path} does not take {self.arguments} beside image, text, scale, bias, ids, valid: {error}"
            ) from None
        if inspect.isclass(found):
            try:
                found = found(**self.arguments)
            except ValueError as error:
                raise UserError(f"loss.args: {path} refuses {self.arguments}: {error}") from error
            if any(parameter.requires_grad for parameter in getattr(found, "parameters", tuple)()):
                raise UserError(f"loss.path: {path} has parameters, which no optimizer trains; keep them in the model")
        self.loss: Callable[..., Any] = found  # a module registers itself here, so that its state is saved
        self.needs = needs_of(found)

    def forward(self, *arguments: Any, **keywords: Any) -> dict[str, Tensor]:
        """Call it; what it returns must be a dict with a 0-d "loss"."""
        result = self.loss(*arguments, **keywords, **self.bound)
        loss = result.get("loss") if isinstance(result, dict) else None
        if not (torch.is_tensor(loss) and loss.numel() == 1):
            raise UserError(
                f"loss.path: {self.path} must return a dict with a 0-d tensor 'loss'; it returned {result!r:.80}"
            )
        return result


def _import(path: str) -> Any:
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise UserError(f"loss.path: {path!r} is no import path such as my_package.losses:MyLoss")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, SyntaxError) as error:
        raise UserError(
            f"loss.path: {module} cannot be imported here ({error}); start in the folder of {module}.py, or install it"
        ) from None
    except AttributeError:
        raise UserError(f"loss.path: {module} has no {name}") from None
    if not callable(found):
        raise UserError(f"loss.path: {path} is {type(found).__name__}, neither a function nor a class")
    return found
