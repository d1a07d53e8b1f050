"""From a recipe's ``loss`` to the module that the step calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from contrastive.config import (
    Config,
    CustomLossConfig,
    CyCLIPConfig,
    DCLConfig,
    DistillationConfig,
    InfoNCEConfig,
    MarginConfig,
    SigLIPConfig,
    SogCLRConfig,
    terms_of,
)
from contrastive.losses import (
    DCL,
    CustomLoss,
    CyCLIP,
    Distillation,
    InfoNCE,
    Margin,
    SigLIP,
    SogCLR,
    WeightedSum,
)


class Teacher(NamedTuple):
    """What a teacher makes of the training set: rows as in the index, L2-normalised; and its logit scale."""

    image: torch.Tensor
    text: torch.Tensor
    scale: float


def build_loss(config: Config, samples: int, teachers: Mapping[str, Teacher]) -> nn.Module:
    """The loss of a recipe.

    Args:
        samples: the size of the training set, for a loss that keeps something for each sample.
        teachers: by the name that the recipe gives them.
    """
    terms = [(_build_term(term, samples, teachers), term.weight) for term in terms_of(config.loss)]
    if not isinstance(config.loss, tuple):
        return terms[0][0]
    kinds = [term.kind for term in config.loss]
    names = [f"{kind}{i}" if kinds.count(kind) > 1 else kind for i, kind in enumerate(kinds)]
    return WeightedSum([(name, loss, weight) for name, (loss, weight) in zip(names, terms, strict=True)])


def _build_term(term: Any, samples: int, teachers: Mapping[str, Teacher]) -> nn.Module:
    options = term.model_dump(exclude={"kind", "weight"})
    match term:
        case InfoNCEConfig():
            return InfoNCE(**options)
        case DCLConfig():
            return DCL(**options)
        case SigLIPConfig():
            return SigLIP(**options)
        case MarginConfig():
            return Margin(**options)
        case CyCLIPConfig():
            return CyCLIP(**options)
        case SogCLRConfig():
            return SogCLR(samples, **options)
        case DistillationConfig():
            teacher = teachers[options.pop("teacher")]
            options["teacher_scale"] = options["teacher_scale"] or teacher.scale
            return Distillation(teacher.image, teacher.text, **options)
        case CustomLossConfig():
            return CustomLoss(term.path, term.args)
        case _:
            raise AssertionError(term)
