"""A table of all losses, each variant with its oracles, for the tests of what they have in common."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from contrastive import losses
from tests.losses import dense


@dataclass(frozen=True)
class Variant:
    function: Callable[..., dict[str, Tensor]]
    loops: Callable[..., Tensor]
    matrix: Callable[..., Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    tiled: bool = True


def _variant(name: str, **options: Any) -> Variant:
    oracles = (getattr(dense, f"{name}_loops"), getattr(dense, f"{name}_matrix"))
    return Variant(getattr(losses, name), *oracles, options, tiled=name != "cyclip")


VARIANTS = {
    "infonce": _variant("infonce"),
    "infonce ignore": _variant("infonce", same_caption="ignore"),
    "infonce positive": _variant("infonce", same_caption="positive"),
    "infonce ignore, smoothed": _variant("infonce", same_caption="ignore", label_smoothing=0.1),
    "infonce positive, smoothed": _variant("infonce", same_caption="positive", label_smoothing=0.1),
    "dcl": _variant("dcl"),
    "dcl ignore": _variant("dcl", same_caption="ignore"),
    "siglip": _variant("siglip"),
    "siglip ignore": _variant("siglip", same_caption="ignore"),
    "siglip positive": _variant("siglip", same_caption="positive"),
    "margin sum": _variant("margin"),
    "margin sum, ignore, adaptive": _variant("margin", same_caption="ignore", margin=0.3, adaptive=0.5),
    "margin hardest, ignore": _variant("margin", negatives="hardest", same_caption="ignore"),
    "margin half hardest": _variant("margin", negatives="hardest", hardness=0.4),
    "margin semi-hard, ignore": _variant("margin", negatives="semi-hard", same_caption="ignore"),
    "cyclip": _variant("cyclip", in_modal=0.3, cross_modal=0.7),
    "sogclr": _variant("sogclr", gamma=0.7, same_caption="ignore"),
    "sogclr rho": _variant("sogclr", gamma=0.7, rho=6.5),
    "distillation": _variant("distillation", teacher_scale=20.0),
}
TILED = {name: variant for name, variant in VARIANTS.items() if variant.tiled}


def extras(variant: Variant, rows: int) -> dict[str, Tensor]:
    """What a loss wants beyond the contract, with a row for each pair: the teacher's features, the averages."""
    generator = torch.Generator().manual_seed(rows)
    if variant.function is losses.sogclr:
        log_u = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
        log_u[::3] = -torch.inf  # not seen before
        return {"log_u": log_u}
    if variant.function is losses.distillation:
        # of another width than the student's
        image, text = (x.detach() for x in dense.features(rows, rows, 5))
        return {"teacher_image": image, "teacher_text": text}
    return {}
