"""Does the model read the order of words, or a bag of them? An image beside its caption and the caption's swap.

The task is that of ARO's and Winoground's text side (Yuksekgonul et al. 2023; Thrush et al. 2022), made from the set's
own captions: no language model writes the wrong ones, so they may be odd sentences. The blind baseline is for that:
it sees the two captions and no image, and a set that it solves measures the captions, not the model (Hsieh et al.
2023).

Shapes: P pairs of a right and a swapped caption, D dimensions.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from contrastive.evaluation.metrics import share

# Words that two things stand around. Longer ones first: "on top of" is not "on".
BETWEEN = (
    "to the left of", "to the right of", "in front of", "on top of", "next to", "left of", "right of", "behind",
    "above", "below", "under", "over", "inside", "beside", "holding", "wearing", "with", "and", "near", "on",
    "in", "at", "of",
)  # fmt: skip
_BETWEEN = re.compile(r"^(.+?)\s+(" + "|".join(BETWEEN) + r")\s+(.+?)([.!?]*)$", re.IGNORECASE | re.DOTALL)


def swapped(caption: str) -> str | None:
    """The caption with what stands around its first joining word exchanged; None where there is none to exchange.

    "A dog on a mat." becomes "a mat on A dog.": the same words in another order.
    """
    match = _BETWEEN.match(caption.strip())
    if match is None or match[1].casefold() == match[3].casefold():
        return None
    return f"{match[3]} {match[2]} {match[1]}{match[4]}"


def pair_scores(
    image_PD: ArrayLike, right_PD: ArrayLike, wrong_PD: ArrayLike, *, blind_D: ArrayLike, seed: int = 0
) -> dict[str, Any]:
    """How often the right caption is nearer: `{"pairs", "model": M, "blind": M}`, M as in `recalls`, chance 0.5.

    All rows normalised. model: the image is nearer to the right caption than to the wrong one; a tie counts against.
    blind: the same with one image for all, `blind_D`, the mean of the set's embeddings: what the captions alone give
    away. Where blind is far from 0.5 the set says little.
    """
    image, right, wrong = (np.asarray(rows, np.float64) for rows in (image_PD, right_PD, wrong_PD))
    difference_PD = right - wrong
    result: dict[str, Any] = {"pairs": len(image)}
    for name, seen in (("model", image), ("blind", np.asarray(blind_D, np.float64)[None])):
        better_P = (seen * difference_PD).sum(axis=1)
        result[name] = share(better_P > 1e-6, seed=seed) | {
            "chance": 0.5,
            "optimistic": float((better_P >= -1e-6).mean()),
        }
    return result
