"""How much the wording of the prompts matters: names alone and single templates beside the ensemble.

Legend: N images, K labels, T templates, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from contrastive.evaluation.checks import check_class_numbers
from contrastive.evaluation.labels import check_labels
from contrastive.evaluation.metrics import share
from contrastive.evaluation.prompts import Aliases, class_prompts, embed_prompts, label_weights, normalise
from contrastive.evaluation.protocol import Model
from contrastive.evaluation.templates import read_templates


def template_spread(
    model: Model,
    features_ND: NDArray[np.float32],
    target_N: NDArray[np.int64],
    labels: Sequence[str],
    templates: str | Path | Sequence[str] | None = "openai80",
    *,
    aliases: Aliases | None = None,
    batch_size: int = 256,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Zero-shot top-1 on ready image embeddings by three ways to word the labels; each prompt is encoded once.

    Args:
        features_ND: normalised image embeddings.  target_N: index into `labels` of each image's own.
        templates: the ensemble, as `read_templates` takes it.

    Returns:
        `{"names_only": A, "ensemble": A, "single": {"mean", "std", "low", "high", "best", "worst"}, "templates":
        [{"template", "top1"}]}`. A is `{"value", "low", "high"}`, a 95 % interval over images. `single` is over the
        templates taken one by one: low and high are the extremes, best and worst their templates, std the population's;
        "templates" is in the order of the accuracy. To choose the best of them here would be tuning on the test.
    """
    wordings, names = read_templates(templates), check_labels(labels)
    target_N = check_class_numbers(target_N, "template_spread", len(names))

    def weights(wording: str) -> NDArray[np.float32]:
        """One label a row, the mean over its aliases not yet normalised, so that they add up to the ensemble's."""
        own = class_prompts(names, [wording], aliases)
        counts = np.asarray([len(prompts) for prompts in own])
        rows_PD = np.stack([encoded[prompt] for prompts in own for prompt in prompts])
        sums_KD: NDArray[np.float32] = np.add.reduceat(rows_PD, np.cumsum(counts) - counts, axis=0)
        return sums_KD / counts[:, None]

    def right(weights_KD: NDArray[np.float32]) -> NDArray[np.bool_]:
        hits: NDArray[np.bool_] = (features_ND @ normalise(weights_KD).T).argmax(axis=1) == target_N
        return hits

    distinct = list(
        dict.fromkeys(
            p for wording in ("{}", *wordings) for own in class_prompts(names, [wording], aliases) for p in own
        )
    )
    encoded = dict(zip(distinct, embed_prompts(model, distinct, batch_size=batch_size, dtype=dtype), strict=True))
    ensemble_KD = np.zeros((len(names), features_ND.shape[1]), np.float64)
    rows = []
    for wording in wordings:
        own_KD = weights(wording)
        ensemble_KD += own_KD
        rows.append({"template": wording, "top1": float(right(own_KD).mean())})
    rows.sort(key=lambda row: -row["top1"])  # type: ignore[operator]
    values = np.asarray([row["top1"] for row in rows], np.float64)
    return {
        "names_only": share(right(weights("{}")), seed=seed),
        "ensemble": share(right(ensemble_KD.astype(np.float32)), seed=seed),
        "single": {
            "mean": float(values.mean()),
            "std": float(values.std()),
            "low": float(values.min()),
            "high": float(values.max()),
            "best": rows[0]["template"],
            "worst": rows[-1]["template"],
        },
        "templates": rows,
    }


def label_order_difference(
    model: Model,
    labels: Sequence[str],
    templates: str | Path | Sequence[str] | None = None,
    *,
    seed: int = 0,
    batch_size: int = 256,
    dtype: torch.dtype | None = None,
) -> float:
    """The canary: the largest difference of any label's weight when half of the others are gone, the rest shuffled.

    Float32 rounding gives about 1e-7. Anything above 1e-4 says that a label's weight depends on its neighbours, as with
    a tower that sees the padding of its batch.
    """
    names = check_labels(labels)
    order = np.random.default_rng(seed).permutation(len(names))

    def weights(some: Sequence[str]) -> NDArray[np.float32]:
        return label_weights(model, class_prompts(some, templates), batch_size=batch_size, dtype=dtype)

    whole_DK = weights(names)
    halves = [half for half in (order[: len(order) // 2], order[len(order) // 2 :]) if len(half)]
    return max(float(np.abs(whole_DK[:, half] - weights([names[k] for k in half])).max()) for half in halves)
