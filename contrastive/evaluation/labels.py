"""Labels: which cannot be meant (errors), and which deserve a second look (lint).

Legend: K labels, D dimensions.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from contrastive.errors import UserError

if TYPE_CHECKING:
    from contrastive.evaluation.protocol import Model

NEAR = 0.97  # cosine of two labels' weights above which a model hardly tells them apart
SHOWN = 5  # of one kind of finding
ROWS = 1024  # labels compared at once: memory stays small for 20,000 of them


def check_labels(labels: Sequence[str]) -> list[str]:
    """The labels without outer white space. Raises `UserError` for none, an empty one, or one given twice."""
    if isinstance(labels, str):
        raise UserError(f"labels: a list is needed, got the text '{labels}'")
    plain = [str(label).strip() for label in labels]
    if not plain:
        raise UserError("labels: there is none; give at least one")
    if "" in plain:
        raise UserError(f"labels: number {plain.index('') + 1} is empty; remove it")
    twice = [label for label, count in Counter(plain).items() if count > 1]
    if twice:
        raise UserError(f"labels: given twice: {', '.join(twice)}; give each label once")
    return plain


def alike(labels: Sequence[str]) -> list[list[str]]:
    """Groups of labels that differ in case, white space or punctuation alone."""
    groups = defaultdict(list)
    for label in labels:
        groups[re.sub(r"[\W_]+", " ", label.casefold()).strip()].append(label)
    return [group for group in groups.values() if len(group) > 1]


def near_synonyms(
    labels: Sequence[str], weights_DK: NDArray[np.float32], near: float = NEAR
) -> list[tuple[str, str, float]]:
    """Pairs of labels whose weights have a cosine of at least `near`, the nearest first, with that cosine."""
    weights_KD = weights_DK.T / np.maximum(np.linalg.norm(weights_DK.T, axis=1, keepdims=True), 1e-12)
    pairs: list[tuple[str, str, float]] = []
    for start in range(0, len(labels), ROWS):
        cosine = weights_KD[start : start + ROWS] @ weights_KD.T
        for row, column in zip(*np.nonzero(cosine >= near), strict=True):
            if start + row < column:
                pairs.append((labels[start + row], labels[column], float(cosine[row, column])))
    return sorted(pairs, key=lambda pair: -pair[2])


def cut_prompts(model: Model, prompts: Sequence[str]) -> list[str]:
    """Prompts that fill the tower's context, so that words behind them are not read: the longest come first.

    Found without knowing the tokenizer: more words at the end change nothing.
    """
    distinct = sorted(set(prompts), key=lambda prompt: (-len(prompt), prompt))
    found: list[str] = []
    for start in range(0, len(distinct), 64):
        part = distinct[start : start + 64]
        tokens = model.tokenize([*part, *(f"{prompt} and some more words" for prompt in part)])
        full = (tokens[: len(part)] == tokens[len(part) :]).all(dim=1).tolist()
        found += [prompt for prompt, same in zip(part, full, strict=True) if same]
        if not any(full):  # shorter ones fit
            break
    return found


def lint_labels(
    labels: Sequence[str],
    weights_DK: NDArray[np.float32],
    *,
    model: Model | None = None,
    prompts: Sequence[Sequence[str]] | None = None,
    near: float = NEAR,
) -> list[str]:
    """What deserves a second look in a set of labels, one line each; nothing found gives an empty list.

    Labels alike but for case or punctuation, labels that the text tower hardly tells apart, prompts that two labels
    share, and (with `model`) prompts longer than its context. `prompts`: of each label, see `class_prompts`.
    """
    lines = [f"labels {' and '.join(map(repr, group))} differ in spelling alone" for group in alike(labels)]
    pairs = near_synonyms(labels, weights_DK, near)
    lines += [
        f"labels '{one}' and '{other}' are hardly told apart (cosine {cosine:.3f})"
        for one, other, cosine in pairs[:SHOWN]
    ]
    if len(pairs) > SHOWN:
        lines.append(f"{len(pairs) - SHOWN} more pairs of labels have a cosine above {near}")
    if prompts is not None:
        owners = defaultdict(list)
        for label, own in zip(labels, prompts, strict=True):
            for prompt in dict.fromkeys(own):
                owners[prompt].append(label)
        shared = [(prompt, names) for prompt, names in owners.items() if len(names) > 1]
        lines += [f"'{prompt}' is a prompt of {' and '.join(map(repr, names))}" for prompt, names in shared[:SHOWN]]
        if model is not None:
            cut = cut_prompts(model, list(owners))
            if cut:
                more = f", and so do {len(cut) - 1} more prompts" if len(cut) > 1 else ""
                lines.append(f"'{cut[0][:60]}…' fills the text tower's context, words behind it are not read{more}")
    return lines
