"""A zero-shot classifier as one file, `classifier.safetensors`: no pickle, and no text tower to open it.

The file holds the tensors `weights` (D, K) and, once fitted, `thresholds` (K,); its header has, as JSON, the labels,
the templates, the temperature, the threshold of "none of these", the logit scale, and the hash and the preprocessing of
the model.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from contrastive.errors import UserError
from contrastive.evaluation.belonging import check_belongs, identity_of
from contrastive.evaluation.labels import check_labels
from contrastive.evaluation.prompts import read_class_prompts
from contrastive.evaluation.protocol import Model
from contrastive.evaluation.templates import read_templates
from contrastive.evaluation.zeroshot import ZeroShotClassifier
from contrastive.shards.decode import DECODER_VERSION, check_decoder

FORMAT = "contrastive.ZeroShotClassifier/1"


def save_classifier(classifier: ZeroShotClassifier, path: str | Path, *, model_path: str | None = None) -> None:
    """Write `classifier` to `path`; `model_path` says where its model lies, for whoever opens the file."""
    own = read_class_prompts(classifier.templates)
    header = {
        "format": FORMAT,
        "labels": check_labels(classifier.labels),
        "templates": own if own is not None else list(read_templates(classifier.templates)),  # type: ignore[arg-type]
        "aliases": None if classifier.aliases is None else {k: list(v) for k, v in classifier.aliases.items()},
        "parents": None if classifier.parents is None else dict(classifier.parents),
        "invert": classifier.inverted,
        "temperature": classifier.temperature_,
        "rejection": classifier.rejection_,
        "decoder": DECODER_VERSION,
        "scale": classifier.scale,
        "bias": classifier.bias,
        **(classifier._kept["identity"] if classifier.model is None else identity_of(classifier.model)),
        "model": model_path if model_path is not None else classifier._kept.get("model"),
    }
    tensors = {"weights": np.ascontiguousarray(classifier.weights_)}
    if classifier.thresholds_ is not None:
        tensors["thresholds"] = np.ascontiguousarray(classifier.thresholds_)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path), metadata={"classifier": json.dumps(header)})


def load_classifier(path: str | Path, model: Model | str | Path | None = None) -> ZeroShotClassifier:
    """Open a file that `ZeroShotClassifier.save` wrote.

    Args:
        model: the model that embeds images, or where it is. Its hash and its preprocessing must be the file's. Without
            one the classifier takes ready embeddings alone, and no tower is opened.

    Raises:
        UserError: no such file, not a classifier, or the file of another model: both hashes are named, or what differs
            in the preprocessing.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"classifier: {path}: no such file")
    try:
        with safe_open(str(path), framework="numpy") as file:
            header = json.loads((file.metadata() or {})["classifier"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        weights = tensors["weights"]
        kept = {name: header[name] for name in ("scale", "bias", "model")}
        kept["identity"] = {"fingerprint": header["fingerprint"], "preprocessing": header.get("preprocessing")}
        labels, templates = header["labels"], header["templates"]
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(
            f"classifier: {path} is not a classifier file; write one with `contrastive classify --save`"
        ) from error
    if header.get("format") != FORMAT:
        raise UserError(f"classifier: {path} has the format {header.get('format')}, this version reads {FORMAT}")
    if isinstance(model, (str, Path)):
        from contrastive.models import load

        model = load(model, text=False)
    if model is not None:
        remedy = "open it with its own model, or build it again"
        check_belongs(f"classifier: {path}", kept["identity"], model, remedy=remedy)
    classifier = ZeroShotClassifier(
        model, labels, templates, aliases=header.get("aliases"), parents=header.get("parents")
    )
    classifier._weights, classifier._kept = weights, kept
    classifier.temperature_, classifier.rejection_ = header["temperature"], header["rejection"]
    classifier.inverted = bool(header.get("invert", False))
    classifier.thresholds_ = tensors.get("thresholds")
    plain = classifier.temperature_ == 1 and classifier.rejection_ is None and classifier.thresholds_ is None
    if not plain:  # fitted to pictures; the weights are of texts alone
        check_decoder(f"classifier: {path}", header.get("decoder"))
    return classifier
