"""The evaluation of a set of pairs: retrieval, zero-shot classification among its captions, order of words."""

from __future__ import annotations

import time
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from contrastive.errors import UserError
from contrastive.evaluation.checks import check_finite
from contrastive.evaluation.composition import pair_scores, swapped
from contrastive.evaluation.embed import Embeddings, Progress, embed, embed_texts
from contrastive.evaluation.examples import Examples, draw_examples
from contrastive.evaluation.items import Images
from contrastive.evaluation.metrics import share
from contrastive.evaluation.protocol import Model
from contrastive.evaluation.remarks import source_remarks
from contrastive.evaluation.retrieval import hubness_by_direction, rank_both, retrieval_ranks, summary
from contrastive.evaluation.tasks import TOPS, Evaluation
from contrastive.shards import caption_id
from contrastive.wording import counted


def evaluate_pairs(
    model: Model,
    source: Images,
    *,
    name: str = "validation",
    examples: int = 0,
    captions: str = "first",
    thorough: bool = False,
    invert: bool = False,
    batch_size: int = 256,
    workers: int = 0,
    dtype: torch.dtype | None = None,
    cache: str | PathLike[str] | None = None,
    max_unreadable: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Retrieval in both directions, and zero-shot classification among the set's distinct captions.

    Captions that are equal apart from case and white space are one (`contrastive.shards.caption_id`), and so are images
    whose first captions are.

    Args:
        source: images with captions: a `ShardIndex` or anything that `embed` takes.
        examples: how many captions, and how many right and wrong cases, to keep images of.
        captions: "first", or "all" captions of each image: then each of them is right for it.
        thorough: hubness and the order of words as well.
        cache, max_unreadable: see `embed`.

    Returns:
        results: `{"name", "kind": "pairs", "samples", "captions", "retrieval": see `recalls`, "zeroshot": {"top1": M,
        "top5": M}, "rejected", "failures", "seconds"}` where M is `{"value", "low", "high", "chance"}`, a 95 %
        interval over samples; thorough: "hubness" (see `hubness`, by direction) and "composition" (see `pair_scores`,
        with "unswappable", the captions that have no order to swap).

    Raises:
        UserError: images without captions, none that can be read, features that are not finite.
    """
    started = time.perf_counter()
    found = embed(
        model,
        source,
        batch_size=batch_size,
        workers=workers,
        features="both" if cache else "projected",
        text=captions,
        invert=invert,
        dtype=dtype,
        cache=cache,
        max_unreadable=max_unreadable,
        progress=progress,
    )
    owners = found.image_of_text
    if found.text is None or owners is None or len(np.unique(owners)) < len(found.keys):
        given = set() if owners is None else set(owners.tolist())
        texts = found.captions or [""] * len(found.keys)
        without = [key for row, key in enumerate(found.keys) if (row not in given if given else not texts[row])]
        total = counted(len(found.keys), "image") + (" has" if len(found.keys) == 1 else " have")
        raise UserError(
            f"{name}: {len(without)} of {total} no caption, the first is {without[0]}; retrieval needs pairs"
        )
    check_finite(name, found.keys, found.image)
    check_finite(name, found.captions or [], found.text)
    assert found.captions is not None
    first = np.unique(owners, return_index=True)[1]
    ids = np.asarray([caption_id(found.captions[row]) for row in first], dtype=np.int64)
    text_ids = ids[owners]
    unique, firsts, inverse = np.unique(ids, return_index=True, return_inverse=True)
    weights_KD = found.text[first[firsts]]
    ranks = retrieval_ranks(found.image, weights_KD, ids, unique)
    both = rank_both(found.image, found.text, ids, text_ids)
    retrieval = {
        "image_to_text": summary(both[0], ids, text_ids, seed=seed),
        "text_to_image": summary(both[1], text_ids, ids, seed=seed),
    }
    results: dict[str, Any] = {
        "name": name,
        "kind": "pairs",
        "samples": len(ids),
        "captions": len(unique) if captions == "first" else len(text_ids),
        "retrieval": retrieval,
        "zeroshot": {f"top{k}": share(ranks < k, seed=seed) | {"chance": min(1.0, k / len(unique))} for k in TOPS},
        "rejected": found.rejected,
    }
    if found.failures:
        results["failures"] = found.failures
    remarks = source_remarks(source)
    if remarks:
        results["remarks"] = remarks
    if thorough:
        results |= {"hubness": hubness_by_direction(found.image, found.text), "content": found.content}
        order = _composition(model, found, owners, seed, batch_size, dtype)
        if order is not None:
            results["composition"] = order
    results["seconds"] = time.perf_counter() - started
    shown = Examples()
    if examples:
        scale = float(model.logit_scale.detach().exp())
        names = [found.captions[first[row]] for row in firsts]
        chances = softmax(scale * (found.image @ weights_KD.T), axis=1)
        shown = draw_examples(
            source, found, chances, names, inverse, examples, queries_KD=weights_KD, seed=seed, invert=invert
        )
    samples: dict[str, NDArray[Any]] = {}
    for direction, one in zip(retrieval, both, strict=True):
        samples[f"{direction}/recall@1"] = one.pessimistic < 1
        samples[f"{direction}/mrr"] = 1 / (one.pessimistic + 1)
    samples["zeroshot/top1"] = ranks < 1
    return Evaluation(results, shown, samples=samples, keys=found.keys)


def _composition(
    model: Model,
    found: Embeddings,
    owners_T: NDArray[np.int64],
    seed: int,
    batch_size: int,
    dtype: torch.dtype | None,
) -> dict[str, Any] | None:
    assert found.captions is not None and found.text is not None
    swaps = [swapped(caption) for caption in found.captions]
    rows = [row for row, swap in enumerate(swaps) if swap is not None]
    if not rows:
        return None
    wrong = embed_texts(model, [str(swaps[row]) for row in rows], batch_size=batch_size, dtype=dtype)
    image, blind = found.image[owners_T[rows]], found.image.mean(axis=0)
    scores = pair_scores(image, found.text[rows], wrong, blind_D=blind, seed=seed)
    return scores | {"unswappable": len(swaps) - len(rows)}
