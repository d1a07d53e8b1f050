"""From a recipe's ``data`` to the pairs, and how they are changed and tokenized on the way."""

from __future__ import annotations

import math

from contrastive.config import (
    Config,
)
from contrastive.errors import UserError
from contrastive.models import (
    TwoTower,
)
from contrastive.shards import Augment, Mixture, TokenCache, compile_pixels, open_index, why_not_compiled
from contrastive.training import (
    check_share,
)


def build_data(config: Config) -> Mixture:
    """The training sets of a recipe, as one.

    Raises:
        UserError: a set cannot be opened, or indexing left out more of one than ``data.max_skip_rate``.
    """
    parts = []
    for path in config.data.train_sets:
        index = open_index(path)
        check_share(index.rejected, len(index), config.data.max_skip_rate, path)
        parts.append(index)
    return Mixture(parts, list(config.data.train_sets.values()))


def token_cache(model: TwoTower, context: int | None = None) -> TokenCache:
    """The model's tokenizer with a memory, for one loader; `context`: the tokens that are kept, where fewer."""
    if context is not None and context < model.tokenizer.context:
        return TokenCache(model.tokenizer.shortened(context), model.tokenizer.pad_id)
    width = None if model.text.cuts_text else model.tokenizer.context
    return TokenCache(model.tokenize, model.tokenizer.pad_id, width=width)


def build_augment(config: Config) -> Augment:
    """The augmentation of a recipe."""
    return Augment(**config.data.augment.model_dump())


def uses_compiled(config: Config) -> bool:
    """Whether the loader has pixels made by compiled code.

    Raises:
        UserError: the recipe insists on that, and it cannot be had here.
    """
    if config.data.compiled is True:
        compile_pixels()
    return config.data.compiled is not False and has_work_for_compiled(config) and why_not_compiled() is None


def has_work_for_compiled(config: Config) -> bool:
    """Whether there is anything in a batch that compiled code makes."""
    change, cache = config.data.augment, config.data.cache
    colors = change.color > 0 or change.grayscale > 0 or change.tint > 0
    return cache != "features" and (colors or (cache == "pixels" and change.rotate == 0))


def check_batch(config: Config, data: Mixture) -> None:
    """Raise UserError for a global batch that takes more pairs of a set than there are."""
    batch = config.train.global_batch
    for path, part, weight in zip(config.data.train_sets, data.parts, data.weights, strict=True):
        share = math.ceil(batch * weight / sum(data.weights))
        if share > len(part):
            taken = f"{batch}" if share == batch else f"{batch} takes {share} of one set at once, which"
            raise UserError(f"train.global_batch: {taken} is more than the {len(part)} pairs of {path}")
