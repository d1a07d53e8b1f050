"""What every loss asks of its arguments, and the module that binds a loss function's options."""

import inspect
import math
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from contrastive.errors import UserError

# How far the norm of a feature may be from 1. bfloat16 keeps 8 bits: rounding normalised features moves it by 0.004.
NORM_TOLERANCE = 0.01
SMALLEST_FLOAT, LARGEST_FLOAT = sys.float_info.min, sys.float_info.max
EXCHANGES = ("auto", "gather", "ring")


def check_arguments(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    valid: Tensor | None,
    check: bool | None,
) -> None:
    """Raise UserError for what no loss can take.

    check: whether to look at the *values* too (norms, scale). None looks on a CPU only: on an accelerator it would
    make the host wait for the device in every step.
    """
    for name, value in (("image", image), ("text", text), ("ids", ids), ("valid", valid)):
        if not (isinstance(value, Tensor) or (value is None and name in ("ids", "valid"))):
            raise UserError(f"{name} is a {type(value).__name__}: a loss takes tensors; pass torch.as_tensor({name})")
    if image.ndim != 2 or text.ndim != 2 or image.shape[0] == 0:
        raise UserError(
            f"image {tuple(image.shape)} and text {tuple(text.shape)}: a loss takes features of shape (n, dim), n > 0: "
            "a row for each pair"
        )
    if image.shape[0] != text.shape[0]:
        raise UserError(
            f"image {tuple(image.shape)} and text {tuple(text.shape)}: give as many captions as images, (n, dim) both"
        )
    if image.shape[1] != text.shape[1]:
        raise UserError(
            f"image {tuple(image.shape)} and text {tuple(text.shape)}: features of {image.shape[1]} and "
            f"{text.shape[1]} dimensions cannot be compared; project both towers to the same width"
        )
    if not (image.is_floating_point() and text.is_floating_point()):
        raise UserError(f"image {image.dtype} and text {text.dtype}: a loss takes floating-point features")
    for name, value in (("scale", scale), ("bias", bias)):
        if (value is not None or name == "scale") and not (isinstance(value, Tensor) and value.numel() == 1):
            shown = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
            raise UserError(f"{name} {shown}: a loss takes a 0-d tensor, such as torch.tensor(10.0)")
    rows = image.shape[0]
    if ids is not None and (ids.shape not in ((rows,), (rows, 2)) or ids.dtype != torch.int64):
        raise UserError(
            f"ids is {ids.dtype} {tuple(ids.shape)}: a loss takes torch.int64 ({rows},), the ids of captions, or "
            f"({rows}, 2), those of captions and of images"
        )
    if valid is not None and (valid.shape != (rows,) or valid.dtype != torch.bool):
        raise UserError(f"valid is {valid.dtype} {tuple(valid.shape)}: a loss takes torch.bool ({rows},)")
    if looks_at_values(check, image.device):
        _check_scale(scale)
        if bias is not None and not math.isfinite(float(bias.detach())):
            raise UserError(f"bias {float(bias.detach())}: the logit bias must be finite; lower the learning rate")
        for name, features in (("image", image), ("text", text)):
            check_norms(name, features, valid)


def looks_at_values(check: bool | None, device: torch.device) -> bool:
    """Whether `check` asks to look at values on `device`."""
    return device.type == "cpu" if check is None else check


def _check_scale(scale: Tensor) -> None:
    value = float(scale.detach())
    if not (math.isfinite(value) and value > 0):
        raise UserError(
            f"scale {value}: the logit scale must be finite and above 0 (pass 1 / temperature, not its logarithm); "
            "if it went wrong during training, lower the learning rate or cap the scale, 100 is usual"
        )


def check_norms(name: str, features: Tensor, valid: Tensor | None) -> None:
    """Raise UserError for a valid row that is not L2-normalised, with its number."""
    norms = torch.linalg.vector_norm(features.detach(), dim=1, dtype=torch.promote_types(features.dtype, torch.float32))
    # NaN is let through: the loss becomes NaN, and the trainer stops all ranks alike, where this would stop one
    wrong = (norms - 1).abs() > NORM_TOLERANCE
    if valid is not None:
        wrong &= valid
    if bool(wrong.any()):
        row, rows = int(wrong.nonzero()[0, 0]), f"{int(wrong.sum())} of {len(norms)} rows"
        raise UserError(
            f"{name} features: row {row} has norm {float(norms[row]):.4g}, {rows} are not L2-normalised; pass "
            "F.normalize(features, dim=-1) (a zero vector has no direction: look at the tower), or check=False to skip "
            "this"
        )


def check_batch_size(rows: int) -> None:
    """Raise UserError for a global batch in which nothing is compared with anything."""
    if rows < 2:
        raise UserError(
            "the global batch has one pair: a contrastive loss compares pairs with one another; give at least 2, "
            "better hundreds"
        )


def check_same_caption(same_caption: str, choices: tuple[str, ...]) -> None:
    """Raise UserError for an unknown treatment of equal captions."""
    if same_caption not in choices:
        raise UserError(f"same_caption {same_caption!r}: choose one of {', '.join(choices)}")


def check_ids(same_caption: str, ids: Tensor | None) -> None:
    """Raise UserError for ids missing where the treatment of equal captions needs them."""
    if same_caption != "negative" and ids is None:
        raise UserError(f"same_caption {same_caption!r} needs the captions' ids: pass `ids`, or use 'negative'")


def check_number(name: str, value: float, low: float, high: float, meaning: str) -> None:
    """Raise UserError for an option that is no number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name} {value!r}: {meaning}")


def check_samples(name: str, samples: Tensor | None, rows: int, size: int) -> None:
    """Raise UserError for what are no `(rows,)` numbers of samples in a data set of `size`."""
    if samples is None:
        raise UserError(f"{name} keeps something for each sample of the data set: pass their numbers as `samples`")
    if not isinstance(samples, Tensor) or samples.dtype != torch.int64 or samples.shape != (rows,):
        shown = f"{samples.dtype} {tuple(samples.shape)}" if isinstance(samples, Tensor) else type(samples).__name__
        raise UserError(
            f"samples is {shown}: {name} takes torch.int64 ({rows},), the number of each pair in the data set"
        )
    low, high = int(samples.min()), int(samples.max())
    if low < 0 or high >= size:
        raise UserError(f"samples from {low} to {high}: {name} knows numbers below {size}, the size of the data set")


def device_type(image: Tensor) -> str:
    """The kind of device that the features lie on. Raises UserError if they are no tensor."""
    if not isinstance(image, Tensor):
        raise UserError(f"image is a {type(image).__name__}: a loss takes tensors; pass torch.as_tensor(image)")
    return image.device.type


def check_tiling(tile: int | str | None, exchange: str) -> None:
    """Raise UserError for a tile or an exchange that does not exist."""
    if tile is not None and tile != "auto" and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
        raise UserError(f"tile {tile!r}: choose 'auto', None for the plain loss, or the side of a tile, as in 1024")
    if exchange not in EXCHANGES:
        raise UserError(f"exchange {exchange!r}: choose one of {', '.join(EXCHANGES)}")
    if tile is None and exchange == "ring":
        raise UserError("exchange 'ring' passes blocks on, which the plain loss (tile None) does not have; set a tile")


class Loss(nn.Module):
    """A loss function with its options bound: ``InfoNCE(tile=512)(image, text, scale)``.

    A subclass names its `function`; options are the function's keyword-only arguments. It has no parameters; one
    that keeps something from step to step keeps it in buffers, which the trainer saves in checkpoints.

    `needs` names what else of a batch the loss wants as keyword arguments, a tensor with a row for each pair.
    """

    function: ClassVar[Callable[..., dict[str, Tensor]]]
    needs: tuple[str, ...] = ()

    def __init__(self, **options: Any) -> None:
        super().__init__()
        parameters = inspect.signature(self.function).parameters.values()
        # what has no default is no option, but given with each batch
        valid = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty]
        for name in options:
            if name not in valid:
                raise TypeError(f"{type(self).__name__} has no option {name!r}; it has {', '.join(valid)}")
        self.options = options

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        ids: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        valid: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Call the function with the bound options."""
        return type(self).function(image, text, scale, bias, ids, group, valid, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
