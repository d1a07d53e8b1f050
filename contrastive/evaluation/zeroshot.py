"""Classify images by the text of the labels alone.

Legend: N images (U of none of the labels), K labels, M names of a level, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy.special import softmax

from contrastive.errors import UserError
from contrastive.evaluation.calibration import temperature
from contrastive.evaluation.embed import embed
from contrastive.evaluation.hierarchy import Hierarchy
from contrastive.evaluation.label_arrays import check_rows, label_array, label_places
from contrastive.evaluation.labels import check_labels, check_several, lint_labels
from contrastive.evaluation.prompts import Aliases, Templates, class_prompts, label_weights, normalise
from contrastive.evaluation.protocol import Model, inference
from contrastive.evaluation.rejection import (
    KEPT,
    area_under_curve,
    below,
    false_positive_rate,
    keep_threshold,
    label_thresholds,
    separating_threshold,
)
from contrastive.evaluation.template_spread import label_order_difference

CANARIES = 16  # labels whose weights are built a second time, among others
ORDER_MATTERS = 1e-4  # rounding gives 1e-7


class ZeroShotClassifier:
    """A classifier whose weights are the embeddings of its labels (Radford et al. 2021, section 3.1).

    A label's weight is the normalised mean of the embeddings of its prompts. There is nothing to learn from images: the
    weights are built by `fit()`, or when they are first needed. Images of a validation split set what stands on the
    weights: `fit_temperature`, `fit_rejection` ("none of these"), `fit_thresholds` (several labels an image).

    Args:
        model: as `contrastive.load` gives it.
        labels: a list of K names, each once. One alone has nothing to be compared with: only `fits` and
            `predict_labels` take it.
        templates: a name, a list, a file, or prompts by label; see `class_prompts` and `read_templates`.
        aliases: label -> names to use in its stead.
        parents: child -> parent, for `predict` at a level; see `Hierarchy`.

    Learned: `weights_` float32 (D, K), `classes_` (K,); `temperature_` (1 until fitted), `rejection_` and `thresholds_`
    (None until fitted), both on the logits before the temperature.

    Raises (when the weights are built):
        UserError: labels that are empty or given twice, a template without `{}`, a label without prompts.
    """

    temperature_: float = 1.0
    rejection_: float | None = None
    thresholds_: NDArray[np.float64] | None = None
    inverted: bool = False  # of the images that set them: what a file tells `contrastive classify`

    def __init__(
        self,
        model: Model | None,
        labels: Sequence[str],
        templates: Templates | None = None,
        *,
        aliases: Aliases | None = None,
        parents: Mapping[str, str] | None = None,
        batch_size: int = 256,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.labels, self.templates = model, labels, templates
        self.aliases, self.parents = aliases, parents
        self.batch_size, self.dtype = batch_size, dtype

    # ---- building it

    def fit(self, X: Any = None, y: Any = None) -> ZeroShotClassifier:
        """Build the weights, and forget what was fitted on others; images and labels are ignored."""
        self._weights = label_weights(self._model, self.prompts(), batch_size=self.batch_size, dtype=self.dtype)
        self.temperature_, self.rejection_, self.thresholds_ = 1.0, None, None
        return self

    def prompts(self) -> list[list[str]]:
        """What the text tower reads, by label."""
        return class_prompts(self.labels, self.templates, self.aliases)

    def fit_temperature(self, X: Any, y: ArrayLike) -> ZeroShotClassifier:
        """Set the temperature that minimises the log loss of these images of a validation split; y: their labels (N,).

        `predict_proba` then says what it means; which label is best does not change.
        """
        self._compared()
        place = self.targets(y)
        logits = self.logits(X)
        check_rows(place, len(logits), "fit_temperature")
        self.temperature_ = temperature(logits, place)
        return self

    def fit_rejection(self, X: Any, unknown: Any = None, *, kept: float = KEPT) -> dict[str, float]:
        """Set the threshold of "none of these" on the best logit of an image, from images of a validation split.

        X: images that have one of the labels.  unknown: images that have none. With them the threshold is that of the
        best balanced accuracy; without, the one that keeps the share `kept` of X.

        Returns `{"threshold", "kept"}` (share of X that passes) and with `unknown` `{"auroc", "fpr95", "refused"}`:
        FPR95 is the share of unknown images that pass a threshold which keeps 95 % of X.
        """
        known_N = self.logits(X).max(axis=1)
        unknown_U = None if unknown is None else self.logits(unknown).max(axis=1)
        if unknown_U is None:
            self.rejection_ = below(keep_threshold(known_N, kept), known_N)
        else:
            self.rejection_ = separating_threshold(known_N, unknown_U)
        found = {"threshold": self.rejection_, "kept": float((known_N >= self.rejection_).mean())}
        if unknown_U is not None:
            found |= {
                "auroc": area_under_curve(known_N, unknown_U),
                "fpr95": false_positive_rate(known_N, unknown_U),
                "refused": float((unknown_U < self.rejection_).mean()),
            }
        return found

    def fit_thresholds(self, X: Any, Y: ArrayLike) -> ZeroShotClassifier:
        """Set each label's threshold to that of its best F1 on images of a validation split; Y: (N, K), true or not."""
        self.thresholds_ = label_thresholds(self.logits(X), Y)
        return self

    def lint(self) -> list[str]:
        """What deserves a second look in labels, prompts and text tower, one line each.

        See `lint_labels`, and `label_order_difference` for the tower, here of the first `CANARIES` labels by name.
        """
        names = self.classes_.tolist()
        lines = lint_labels(names, self.weights_, model=self._model, prompts=self.prompts())
        difference = label_order_difference(self._model, names[:CANARIES])
        if difference > ORDER_MATTERS:
            lines.append(
                f"a label's weight changes by {difference:.2g} with the labels around it: the text tower sees the "
                "padding of its batch, and its results depend on the order of the labels"
            )
        return lines

    # ---- using it

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
            arrays = [torch.as_tensor(row) for row in X]
            shapes = list(dict.fromkeys(tuple(array.shape) for array in arrays))
            if len(shapes) > 1:
                raise UserError(
                    f"pixels: arrays of different shapes, {shapes[0]} and {shapes[1]}; make them with "
                    "model.preprocess(image)"
                )
            X = torch.stack(arrays)
        if not isinstance(X, (np.ndarray, torch.Tensor)):
            source = [X] if isinstance(X, Image.Image) else X
            found = embed(self._model, source, batch_size=self.batch_size, text=False, dtype=self.dtype)
            if found.failures:
                key, reason = next(iter(found.failures.items()))
                more = f" and {len(found.failures) - 1} more" if len(found.failures) > 1 else ""
                raise UserError(f"{key}: {reason}{more}; leave it out")
            return found.image
        rows = torch.as_tensor(X)
        if rows.ndim == 2:
            width = self.weights_.shape[0] if self.model is None else self.model.dim
            if rows.shape[1] != width:
                raise UserError(f"features have width {rows.shape[1]}, the model's embeddings {width}")
            if not torch.isfinite(rows).all():
                row = int((~torch.isfinite(rows).all(dim=1)).int().argmax())
                raise UserError(f"features: row {row} is not finite; leave it out")
            return normalise(rows.detach().float().cpu().numpy())
        if rows.ndim != 4 or rows.shape[1] != 3:
            raise UserError(f"shape {tuple(rows.shape)} is neither pixels (n, 3, h, w) nor features (n, dim)")
        with inference(self._model, self.dtype):
            blocks = [
                self._model.encode_image(part.to(self._model.device)).float().cpu().numpy()
                for part in rows.split(self.batch_size)
            ]
        return np.concatenate(blocks)

    def logits(self, X: Any) -> NDArray[np.float32]:
        """Cosine similarity times the model's logit scale (N, K), whatever the temperature."""
        logits: NDArray[np.float32] = np.float32(self.scale) * (self.features(X) @ self.weights_)
        return logits

    def decision_function(self, X: Any) -> NDArray[np.float32]:
        """`logits` divided by the temperature (N, K)."""
        divided: NDArray[np.float32] = self.logits(X) / np.float32(self.temperature_)
        return divided

    def predict_proba(self, X: Any, *, level: int = 0) -> NDArray[np.float32]:
        """Softmax over the labels (N, K): how the labels compare, not whether any of them fits.

        level: of the hierarchy that `parents` makes: 1 gives the sums over the labels below each parent (N, M), in the
        order of `level_names(1)`. Raises `UserError` for one label alone.
        """
        self._compared()
        chances: NDArray[np.float32] = softmax(self.decision_function(X), axis=1)
        if not level:
            return chances
        summed: NDArray[np.float32] = self._hierarchy.probabilities(chances, level)
        return summed

    def predict(self, X: Any, *, level: int = 0) -> NDArray[np.str_]:
        """The best label of each image, (N,), or the most probable name of a level of the hierarchy.

        Raises `UserError` for one label alone, unless a threshold says whether it fits.
        """
        if self.rejection_ is None:
            self._compared()
        if level:
            return np.asarray(self.level_names(level))[self.predict_proba(X, level=level).argmax(axis=1)]
        return self.classes_[self.decision_function(X).argmax(axis=1)]

    def level_names(self, level: int) -> list[str]:
        """The names that `predict(…, level=level)` chooses among."""
        return self._hierarchy.names(level)

    def fits(self, X: Any) -> NDArray[np.bool_]:
        """Whether any of the labels fits each image (N,), by the threshold of `fit_rejection`."""
        if self.rejection_ is None:
            raise UserError("there is no threshold for 'none of these'; set one with fit_rejection(images)")
        passed: NDArray[np.bool_] = self.logits(X).max(axis=1) >= self.rejection_
        return passed

    def predict_labels(self, X: Any) -> NDArray[np.bool_]:
        """Which labels each image has (N, K), none to all: those whose logit reaches the label's threshold.

        Without `fit_thresholds`, a model with a logit bias (trained with a sigmoid loss) puts it at a probability of
        one half. A softmax model has no such place: raises `UserError`.
        """
        passed: NDArray[np.bool_] = self.logits(X) >= self.label_thresholds()
        return passed

    def label_thresholds(self) -> NDArray[np.float64]:
        """The threshold of each label's logit (K,): see `predict_labels`."""
        if self.thresholds_ is not None:
            return self.thresholds_
        if self.bias is None:
            raise UserError(
                "there are no thresholds for several labels an image; set them with fit_thresholds(images, Y)"
            )
        return np.full(self.weights_.shape[1], -self.bias)

    def score(self, X: Any, y: ArrayLike) -> float:
        """Share of the images whose best label is `y`. Raises `UserError` as `targets` does, and for another length."""
        self._compared()
        place = self.targets(y)
        best = self.decision_function(X).argmax(axis=1)
        check_rows(place, len(best), "score")
        return float((best == place).mean())

    # ---- keeping it

    def save(self, path: str | Path, *, model_path: str | None = None) -> None:
        """Write one file that `contrastive.load_classifier` opens without the text tower: see `save_classifier`."""
        from contrastive.evaluation.classifier_file import save_classifier

        save_classifier(self, path, model_path=model_path)

    @property
    def scale(self) -> float:
        """The logit scale: the model's, or what the file says."""
        if self.model is None:
            return float(self._kept["scale"])
        return float(self.model.logit_scale.detach().exp())

    @property
    def bias(self) -> float | None:
        """The logit bias of a model that was trained with a sigmoid loss, else None."""
        if self.model is None:
            kept: float | None = self._kept["bias"]
            return kept
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else float(bias.detach())

    _kept: dict[str, Any] = {"scale": 1.0, "bias": None}  # of a file that was opened without its model

    @property
    def _model(self) -> Model:
        if self.model is None:
            raise UserError("the classifier was opened without its model; open it with load_classifier(path, model)")
        return self.model

    @property
    def _hierarchy(self) -> Hierarchy:
        return Hierarchy(check_labels(self.labels), self.parents or {})

    def targets(self, y: ArrayLike) -> NDArray[np.int64]:
        """Labels (N,) as places in `classes_`. Raises `UserError` for other labels, a missing one, or another type."""
        labels = label_array(y, "classifier")
        stripped = np.char.strip(labels.astype(str)) if labels.dtype.kind in "UO" else labels  # as `classes_` are
        return label_places(stripped, self.classes_, "classifier")

    def _compared(self) -> None:
        check_several(
            self.classes_.tolist(),
            "add a label to compare with, such as 'something else', or ask whether it fits: fit_rejection and fits, or "
            "fit_thresholds and predict_labels",
        )
