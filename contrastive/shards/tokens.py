"""Tokens of captions that were tokenized before: captions come again every epoch, and many are shared."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

CAPTIONS = 1 << 17  # remembered in each loader process: about 50 MB of captions of twenty tokens


class TokenCache:
    """`tokenize` with a memory: the same tokens, of all new captions of a batch by one call.

    tokenize: list of n captions → int64 (n, length), padded with `pad_id` behind each caption.
    width: the length that the tokenizer pads to whatever the captions; None: to the longest of a call.
    captions: how many are remembered, the first ones.
    """

    def __init__(
        self, tokenize: Callable[[list[str]], Any], pad_id: int, *, width: int | None = None, captions: int = CAPTIONS
    ) -> None:
        self.tokenize, self.pad_id, self.width, self.captions = tokenize, pad_id, width, captions
        self._known: dict[str, np.ndarray] = {}
        alone = np.asarray(tokenize(["a"]))[0]
        # The tokenizer ends a caption with the token that it pads with (CLIP's): then one of them belongs to it.
        self._closing = int(width is None and alone[-1] == pad_id)

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        """int64 (n, length), padded to the longest caption, or as the tokenizer always does."""
        new = list(dict.fromkeys(caption for caption in captions if caption not in self._known))
        rows = {caption: self._known[caption] for caption in captions if caption in self._known}
        if new:
            found = np.asarray(self.tokenize(new)).astype(np.int32)
            used = found != self.pad_id
            lengths = np.where(used.any(1), used.shape[1] - used[:, ::-1].argmax(1), 0) + self._closing
            for caption, row, length in zip(new, found, lengths.tolist(), strict=True):
                rows[caption] = row[:length].copy()
            for caption in new[: max(0, self.captions - len(self._known))]:
                self._known[caption] = rows[caption]
        width = self.width or max((len(rows[caption]) for caption in captions), default=1) or 1
        tokens = np.full((len(captions), width), self.pad_id, np.int64)
        for number, caption in enumerate(captions):
            row = rows[caption]
            tokens[number, : len(row)] = row
        return torch.from_numpy(tokens)
