"""Labels: which cannot be meant (errors), and which deserve a second look (lint).

Legend: K labels, D dimensions.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from contrastive.errors import UserError
from contrastive.evaluation.label_arrays import is_missing
from contrastive.wording import a_type, plain_repr

if TYPE_CHECKING:
    from contrastive.evaluation.protocol import Model

NEAR = 0.97  # cosine of two labels' weights above which a model hardly tells them apart
SHOWN = 5  # of one kind of finding
MARKS = re.compile(r"(?<!\w)[-+−.]+(?=\d)|(?<=\d)[.,:/-](?=\d)|(?<=\w)[-−]$|[+#%&*<>=≤≥±°@$€£¥]|(?P<folded>[\W_])")
ROWS = 1024  # labels compared at once: memory stays small for 20,000 of them


def check_labels(labels: Sequence[str]) -> list[str]:
    """The labels without outer white space.

    Raises `UserError` for none, a missing or empty one, one that is no text, one given twice, and for anything but a
    list of names: a dict says two things, a set has no order, an iterator is empty the second time.
    """
    for item, number in zip(_listed(labels), range(1, len(labels) + 1), strict=True):
        if isinstance(item, str) and item.strip():
            continue
        if is_missing(item):
            raise UserError(f"labels: number {number} is {'empty' if isinstance(item, str) else item}; remove it")
        raise UserError(
            f"labels: number {number} is {plain_repr(item)}, {a_type(item)}; the text tower reads names: give text, "
            "such as 'cat'"
        )
    plain = [str(label).strip() for label in labels]
    if not plain:
        raise UserError("labels: there is none; give at least two")
    twice = [label for label, count in Counter(plain).items() if count > 1]
    if twice:
        raise UserError(f"labels: given twice: {', '.join(twice)}; give each label once")
    return plain


def check_several(labels: Sequence[str], remedy: str) -> None:
    """Raises `UserError` for one label alone: probabilities compare labels, and one has 1.0 for every image."""
    if len(labels) == 1:
        raise UserError(f"labels: '{labels[0]}' is the only one, so its probability is always 1; {remedy}")


def _listed(labels: Sequence[str]) -> Sequence[str]:
    if isinstance(labels, (str, bytes)):
        name = labels if isinstance(labels, str) else labels.decode("utf-8", "replace")
        raise UserError(f"labels: a list is needed, got the text {name!r}; give several labels, as [{name!r}, 'other']")
    if isinstance(labels, Mapping):
        shown = next(iter(labels), None)
        raise UserError(
            f"labels: a list is needed, got a dict (its first key is {shown!r}); give list(d) as labels, with "
            "templates=d where the values are prompts, or list(d.values()) where the values are the names"
        )
    if isinstance(labels, (set, frozenset)) or not hasattr(labels, "__len__") or not hasattr(labels, "__iter__"):
        raise UserError(f"labels: a list is needed, got {a_type(labels)}; give list(…) or sorted(…) of it")
    if getattr(labels, "ndim", 1) != 1:
        raise UserError(f"labels: a list of names is needed, got the shape {labels.shape}")  # type: ignore[attr-defined]
    return labels


def are_numbers(labels: Sequence[str]) -> bool:
    """Whether all labels are whole numbers, as folders named 1, 2, 10 are."""
    return bool(len(labels)) and all(re.fullmatch(r"[0-9]+", label) for label in labels)


def in_order(labels: Iterable[str]) -> list[str]:
    """Distinct labels sorted, numbers by value: 1, 2, 10."""
    names = sorted(set(labels))
    return sorted(names, key=lambda name: (int(name), name)) if are_numbers(names) else names


def number_remark(labels: Sequence[str]) -> list[str]:
    """One line where all labels are numbers, which say nothing to a text tower; else none."""
    if not are_numbers(labels):
        return []
    shown = ", ".join(labels[:3]) + (", …" if len(labels) > 3 else "")
    return [f"labels are numbers ({shown}), which say nothing to a text tower; name them with --class-names FILE"]


def alike(labels: Sequence[str]) -> list[list[str]]:
    """Groups of labels that differ in case, white space or punctuation alone.

    What changes the meaning is no punctuation: signs and marks of numbers (-1 and 1, 1.5 and 15, 0-9 and 09), signs
    at the end (A and A-) and symbols (C, C++ and C#).
    """
    groups = defaultdict(list)
    for label in labels:
        folded = MARKS.sub(lambda mark: " " if mark["folded"] else mark[0], label.casefold())
        groups[" ".join(folded.split())].append(str(label))
    return [group for group in groups.values() if len(group) > 1]


def _quoted(labels: Iterable[str]) -> str:
    return " and ".join(f"'{label}'" for label in labels)


def spelling_remarks(labels: Sequence[str]) -> list[str]:
    """One line for each group of `alike`."""
    return [f"labels {_quoted(group)} differ in spelling alone" for group in alike(labels)]


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
    lines = spelling_remarks(labels) + number_remark(labels)
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
        lines += [f"'{prompt}' is a prompt of {_quoted(names)}" for prompt, names in shared[:SHOWN]]
        if model is not None:
            cut = cut_prompts(model, list(owners))
            if cut:
                more = f", and so do {len(cut) - 1} more prompts" if len(cut) > 1 else ""
                lines.append(f"'{cut[0][:60]}…' fills the text tower's context, words behind it are not read{more}")
    return lines
