"""What a run in stages asks of the towers: images of other sizes, shorter captions, patches left out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from open_clip import transformer as open_clip_transformer
from timm.layers import PatchDropout
from timm.models.vision_transformer import VisionTransformer

from contrastive.errors import UserError

if TYPE_CHECKING:
    from contrastive.models.two_tower import TwoTower

PATCH_DROPOUTS = (PatchDropout, open_clip_transformer.PatchDropout)


def add_patch_dropout(model: TwoTower) -> None:
    """Give the image tower a patch dropout that leaves out nothing until `TwoTower.set_patch_dropout`.

    FLIP (Li et al. 2022, arXiv:2212.00794): in training, a random share of an image's patches does not enter the
    transformer. Class and register tokens always do. In evaluation mode all patches do.

    Raises:
        UserError: the tower is no vision transformer of timm or open_clip.
    """
    found = False
    for part in model.image.modules():
        if isinstance(part, VisionTransformer):
            part.patch_drop = PatchDropout(0.0, num_prefix_tokens=part.num_prefix_tokens)
            found = True
        elif isinstance(part, open_clip_transformer.VisionTransformer):
            part.patch_dropout = open_clip_transformer.PatchDropout(0.0)
            found = True
    if not found:
        raise UserError(
            f"model.image.patch_dropout: {_name(model)} has no patches that could be left out (vision transformers of "
            "timm and open_clip have); set it to 0, in train.curriculum too"
        )


def check_sizes(model: TwoTower, sizes: Iterable[int]) -> None:
    """Show the image tower an image of each size.

    Raises:
        UserError: it does not take one.
    """
    training = model.training
    model.eval()  # one image is no batch to take statistics from
    try:
        for size in sizes:
            _check_size(model, size)
    finally:
        model.train(training)


def _check_size(model: TwoTower, size: int) -> None:
    try:
        with torch.inference_mode():
            shape = tuple(model.image.features(torch.zeros(1, 3, size, size)).shape)
    except Exception as error:  # towers tell of sizes in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    else:
        if shape == (1, model.image.width):
            return
        reason = f"its features come out as {shape}"
    raise UserError(
        f"train.curriculum: {_name(model)}, built for {model.image_size} px, does not take images of {size} px "
        f"({reason}); choose a size that it takes, or another tower"
    )


def check_contexts(model: TwoTower, contexts: Iterable[int]) -> None:
    """Raise UserError for captions that the text tower cannot take so short or so long."""
    for context in contexts:
        if not model.text.cuts_text:
            raise UserError(
                f"train.curriculum: context {context} saves nothing with the text tower of {model.name}, which wants "
                f"all {model.tokenizer.context} tokens; leave context out"
            )
        if context > model.tokenizer.context:
            raise UserError(
                f"train.curriculum: context {context} is above the {model.tokenizer.context} tokens that "
                f"{model.name} is built for"
            )


def _name(model: TwoTower) -> str:
    return f"the image tower {getattr(model.image, 'name', None) or model.name}"
