"""Two models on the same samples: is the difference more than the draw of the samples?

Shapes: N samples, the same ones in the same order for both models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from contrastive.errors import UserError
from contrastive.evaluation.metrics import resamples


def mcnemar(right_a_N: ArrayLike, right_b_N: ArrayLike) -> dict[str, Any]:
    """McNemar's exact test: `{"only_a", "only_b", "p"}`.

    Samples that both or neither model get right say nothing about their difference; of the others each model should
    win half. p: two-sided, binomial (McNemar 1947 with the exact distribution); 1 without such samples.
    """
    a, b = _same(right_a_N, right_b_N, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return {"only_a": only_a, "only_b": only_b, "p": p}


def paired_difference(values_a_N: ArrayLike, values_b_N: ArrayLike, *, seed: int = 0) -> dict[str, float]:
    """The mean of b - a: `{"value", "low", "high", "p"}`, from redrawing samples of both models together.

    A 95 % percentile interval of 1,000 resamples. p: twice the smaller share of resamples on either side of 0 (with
    one added to both counts, so at least 0.002).
    """
    a, b = _same(values_a_N, values_b_N, np.float64)
    values, counts = np.unique(b - a, return_counts=True)
    drawn = np.concatenate([weights_RN @ values / len(a) for weights_RN in resamples(counts, seed)])
    low, high = np.quantile(drawn, [0.025, 0.975])
    smaller = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * (smaller + 1) / (len(drawn) + 1))
    return {"value": float((b - a).mean()), "low": float(low), "high": float(high), "p": float(p)}


def compare_samples(
    first: Mapping[str, NDArray[Any]], second: Mapping[str, NDArray[Any]], *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Every measure that both evaluations have: name -> `{"a", "b", "difference": M, "mcnemar"}`.

    first, second: see `Evaluation.samples`. difference: see `paired_difference`. mcnemar: of measures that are right or
    wrong for each sample; absent for others.
    """
    found = {}
    for name, a in first.items():
        if name not in second:
            continue
        b = second[name]
        found[name] = {
            "a": float(np.mean(a)),
            "b": float(np.mean(b)),
            "difference": paired_difference(a, b, seed=seed),
        }
        if a.dtype == bool:
            found[name]["mcnemar"] = mcnemar(a, b)
    return found


def check_same_samples(keys_a: Sequence[str], keys_b: Sequence[str]) -> None:
    """Raises `UserError` unless both models have seen the same images in the same order."""
    if list(keys_a) != list(keys_b):
        only = sorted(set(keys_a) ^ set(keys_b))
        shown = f"; {len(only)} are in one only, such as {only[0]}" if only else "; the order differs"
        raise UserError(f"compare: the two models were measured on different images{shown}")


def format_comparison(found: Mapping[str, Mapping[str, Any]], first: str, second: str) -> str:
    """The comparison as a plain-text table; shares in percent, log-likelihoods a sample as they are."""
    lines = [f"a = {first}, b = {second}", f"{'':<36}{'a':>8}{'b':>8}{'b - a':>9}   95 % interval    p"]
    for name, row in found.items():
        change = row["difference"]
        p, test = (row["mcnemar"]["p"], "McNemar") if "mcnemar" in row else (change["p"], "bootstrap")
        unit, digits = scale_of(name)
        a, b, value, low, high = (
            unit * x for x in (row["a"], row["b"], *(change[k] for k in ("value", "low", "high")))
        )
        numbers = f"{a:>8.{digits}f}{b:>8.{digits}f}{value:>+9.{digits}f}   {low:+6.{digits}f} … {high:+6.{digits}f}"
        lines.append(f"{name:<36}{numbers}  {p:.3g} ({test})")
    return "\n".join(lines)


def scale_of(measure: str) -> tuple[int, int]:
    """What a measure is multiplied by to be shown, and its decimals: shares in percent, a log-likelihood as it is."""
    return (1, 3) if measure.endswith("log-likelihood") else (100, 1)


def _same(a_N: ArrayLike, b_N: ArrayLike, kind: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    a, b = np.asarray(a_N, kind), np.asarray(b_N, kind)
    assert a.shape == b.shape and a.ndim == 1 and len(a), "the same samples of both models"
    return a, b
