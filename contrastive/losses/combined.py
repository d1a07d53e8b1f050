"""A weighted sum of losses, and a loss of the user's own."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from contrastive.errors import UserError
from contrastive.losses.contract import LARGEST_FLOAT, check_number


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
            if "." in name or not name:
                raise UserError(f"a loss named {name!r}: names head what is logged; choose one without a dot")
            check_number(f"weight of {name}", weight, -LARGEST_FLOAT, LARGEST_FLOAT, "choose a finite number")
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
        if not callable(found):
            raise UserError(f"loss.path: {path} makes a {type(found).__name__}, which cannot be called")
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
        learning = torch.is_grad_enabled() and any(torch.is_tensor(x) and x.requires_grad for x in arguments)
        if learning and not loss.requires_grad:
            raise UserError(f"loss.path: the 'loss' of {self.path} has no gradient; do not detach it")
        return result


def _import(path: str) -> Any:
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise UserError(f"loss.path: {path!r} is no import path such as my_package.losses:MyLoss")
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # a module of the user's own may fail in any way
        raise UserError(
            f"loss.path: {module} cannot be imported here ({type(error).__name__}: {error}); start in the folder of "
            f"{module}.py, or install it"
        ) from error
    found = getattr(imported, name, None)
    if found is None:
        raise UserError(f"loss.path: {module} has no {name}")
    if not callable(found):
        raise UserError(f"loss.path: {path} is {type(found).__name__}, neither a function nor a class")
    return found
