"""Classify images by the text of the labels alone.

Legend: N images, K labels, D dimensions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy.special import softmax

from contrastive.errors import UserError
from contrastive.evaluation.embed import embed, embed_texts
from contrastive.evaluation.protocol import Model, inference
from contrastive.evaluation.templates import read_templates


class ZeroShotClassifier:
    """A classifier whose weights are the embeddings of its labels (Radford et al. 2021, section 3.1).

    A label's weight is the normalised mean of the embeddings of all templates filled with it. There is
    nothing to learn from images: the weights are built by `fit()`, or when they are first needed.

    Args:
        model: as `contrastive.load` gives it.
        labels: K names, each once.
        templates: None or "none" for the bare label, "short" for a small built-in set, a list of strings with
            `{}`, or a file with one a line.

    Learned: `weights_` float32 (D, K), `classes_` (K,).

    Raises (when the weights are built):
        UserError: labels that are empty or given twice, a template without `{}`.
    """

    def __init__(
        self,
        model: Model,
        labels: Sequence[str],
        templates: str | Path | Sequence[str] | None = None,
        *,
        batch_size: int = 256,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.labels, self.templates = model, labels, templates
        self.batch_size, self.dtype = batch_size, dtype

    def fit(self, X: Any = None, y: Any = None) -> ZeroShotClassifier:
        """Build the weights; images and labels are ignored."""
        labels, templates = check_labels(self.labels), read_templates(self.templates)
        prompts = [template.replace("{}", label) for label in labels for template in templates]
        encoded = embed_texts(self.model, prompts, batch_size=self.batch_size, dtype=self.dtype)
        mean_KD = encoded.reshape(len(labels), len(templates), -1).mean(axis=1)
        self._weights = normalise(mean_KD).T
        return self

    @property
    def weights_(self) -> NDArray[np.float32]:
        """One normalised column a label, (D, K)."""
        if not hasattr(self, "_weights"):
            self.fit()
        return self._weights

    @property
    def classes_(self) -> NDArray[np.str_]:
        """The labels, in the order given."""
        return np.asarray(check_labels(self.labels))

    def features(self, X: Any) -> NDArray[np.float32]:
        """Normalised image embeddings (N, D) of whatever `predict` takes.

        X: a list of PIL images and paths, anything that `embed` takes, pixels (N, 3, H, W) as the model takes
        them, or ready embeddings (N, D). Raises `UserError` where an image cannot be read: rows must fit the
        input.
        """
        if isinstance(X, Sequence) and len(X) and isinstance(X[0], (np.ndarray, torch.Tensor)):
            X = torch.stack([torch.as_tensor(row) for row in X])
        if not isinstance(X, (np.ndarray, torch.Tensor)):
            source = [X] if isinstance(X, Image.Image) else X
            found = embed(self.model, source, batch_size=self.batch_size, text=False, dtype=self.dtype)
            if found.failures:
                key, reason = next(iter(found.failures.items()))
                more = f" and {len(found.failures) - 1} more" if len(found.failures) > 1 else ""
                raise UserError(f"{key}: {reason}{more}; leave it out")
            return found.image
        rows = torch.as_tensor(X)
        if rows.ndim == 2:
            if rows.shape[1] != self.model.dim:
                raise UserError(f"features have width {rows.shape[1]}, the model's embeddings {self.model.dim}")
            return normalise(rows.detach().float().cpu().numpy())
        if rows.ndim != 4 or rows.shape[1] != 3:
            raise UserError(f"shape {tuple(rows.shape)} is neither pixels (n, 3, h, w) nor features (n, dim)")
        with inference(self.model, self.dtype):
            blocks = [
                self.model.encode_image(part.to(self.model.device)).float().cpu().numpy()
                for part in rows.split(self.batch_size)
            ]
        return np.concatenate(blocks)

    def decision_function(self, X: Any) -> NDArray[np.float32]:
        """Logits (N, K): cosine similarity times the model's logit scale."""
        scale = float(self.model.logit_scale.detach().exp())
        logits: NDArray[np.float32] = scale * (self.features(X) @ self.weights_)
        return logits

    def predict_proba(self, X: Any) -> NDArray[np.float32]:
        """Softmax over the labels (N, K): how the labels compare, not whether any of them fits."""
        return softmax(self.decision_function(X), axis=1)

    def predict(self, X: Any) -> NDArray[np.str_]:
        """The best label of each image, (N,)."""
        return self.classes_[self.decision_function(X).argmax(axis=1)]

    def score(self, X: Any, y: ArrayLike) -> float:
        """Share of the images whose best label is `y`."""
        return float((self.predict(X) == np.asarray(y)).mean())


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


def normalise(rows_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1; a row of zeros stays."""
    norms = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    return (rows_ND / np.maximum(norms, 1e-12)).astype(np.float32)
