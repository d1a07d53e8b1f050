"""From labels and templates to prompts, and from prompts to one weight a label.

Legend: K labels, D dimensions, P prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from contrastive.errors import UserError
from contrastive.evaluation.embed import embed_texts
from contrastive.evaluation.labels import check_labels
from contrastive.evaluation.protocol import Model, inference
from contrastive.evaluation.templates import read_templates

Templates = str | Path | Sequence[str] | Mapping[str, Sequence[str]]
Aliases = Mapping[str, Sequence[str]]


def class_prompts(
    labels: Sequence[str], templates: Templates | None = None, aliases: Aliases | None = None
) -> list[list[str]]:
    """The prompts of each label.

    Args:
        templates: see `read_templates`; or one's own prompts, a mapping label -> prompts (or a `.json` file of one),
            in which `{}` stands for the label.
        aliases: label -> the names to use in its stead ("tv": ["television", "TV set"]); others keep their own.

    Raises:
        UserError: labels that cannot be meant, a label without prompts, prompts or aliases of a label not given.
    """
    names = check_labels(labels)
    known = _by_label(aliases or {}, names, "aliases")
    own = read_class_prompts(templates)
    if own is None:
        wordings = read_templates(templates)  # type: ignore[arg-type]  # mappings are dealt with
        return [
            [wording.replace("{}", name) for name in known.get(label, [label]) for wording in wordings]
            for label in names
        ]
    own = _by_label(own, names, "prompts")
    missing = [label for label in names if label not in own]
    if missing:
        raise UserError(f"prompts: none for {', '.join(missing[:5])}; give every label at least one")
    return [
        list(dict.fromkeys(prompt.replace("{}", name) for name in known.get(label, [label]) for prompt in own[label]))
        for label in names
    ]


def read_class_prompts(templates: Templates | None) -> dict[str, list[str]] | None:
    """Prompts by label, of a mapping or a `.json` file that holds one; None where `templates` is something else."""
    if isinstance(templates, (str, Path)) and str(templates).endswith(".json"):
        path = Path(templates)
        if not path.is_file():
            raise UserError(f"templates: {path}: no such file")
        try:
            templates = json.loads(path.read_text(encoding="utf-8-sig"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"templates: {path} is not JSON ({error})") from None
        if not isinstance(templates, dict):
            raise UserError(
                f"templates: {path} holds no object; write {{label: [prompt, …]}}, or a text file of templates"
            )
    if not isinstance(templates, Mapping):
        return None
    return {
        str(label): [prompts] if isinstance(prompts, str) else list(prompts) for label, prompts in templates.items()
    }


def embed_prompts(
    model: Model, prompts: Sequence[str], *, batch_size: int = 256, dtype: torch.dtype | None = None
) -> NDArray[np.float32]:
    """Normalised embeddings of prompts, float32 (P, D), as `embed_texts` gives them, to 1e-5.

    Each distinct prompt is computed once. Where the text tower allows it (causal, pooled at the last token), so is each
    beginning that prompts share, and nothing is padded; other towers get batches of like length.
    """
    encode = getattr(model, "encode_prompts", None)
    if not prompts or encode is None or not getattr(model, "shares_prefixes", False):
        return embed_texts(model, prompts, batch_size=batch_size, dtype=dtype)
    row = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    with inference(model, dtype):
        encoded: NDArray[np.float32] = encode(model.tokenize(list(row)).to(model.device)).float().cpu().numpy()
    return encoded[[row[prompt] for prompt in prompts]]


def label_weights(
    model: Model,
    prompts: Sequence[Sequence[str]],
    *,
    batch_size: int = 256,
    dtype: torch.dtype | None = None,
) -> NDArray[np.float32]:
    """One column a label (D, K): the normalised mean of the normalised embeddings of its prompts.

    Equal to `open_clip.build_zero_shot_classifier` to 1e-5.
    """
    encoded_PD = embed_prompts(model, [p for own in prompts for p in own], batch_size=batch_size, dtype=dtype)
    counts = np.asarray([len(own) for own in prompts])
    sums_KD = np.add.reduceat(encoded_PD, np.cumsum(counts) - counts, axis=0)
    return normalise(sums_KD / counts[:, None]).T


def normalise(rows_ND: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows of length 1; a row of zeros stays."""
    norms = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    return (rows_ND / np.maximum(norms, 1e-12)).astype(np.float32)


def _by_label(given: Mapping[str, Sequence[str]], labels: Sequence[str], what: str) -> dict[str, list[str]]:
    found = {
        str(label).strip(): [names] if isinstance(names, str) else [str(name).strip() for name in names]
        for label, names in given.items()
    }
    strange = [label for label in found if label not in labels]
    if strange:
        raise UserError(f"{what}: no such label: {', '.join(strange[:5])}; the labels are {', '.join(labels[:10])}")
    for label, names in found.items():
        if not names or "" in names:
            raise UserError(f"{what}: '{label}' has an empty one or none; give at least one, or leave the label out")
    return found
