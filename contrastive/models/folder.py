"""Saving and opening a model: a folder that one sends to a colleague, with no pickle in it.

``model/`` holds ``config.json`` (how to build the towers), ``model.safetensors`` and the tokenizer's file.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from contrastive.errors import UserError
from contrastive.models.adapters import plain_state
from contrastive.models.image_towers import TimmImageTower
from contrastive.models.open_clip_towers import open_clip_model
from contrastive.models.text_towers import HuggingFaceTextTower, TransformerTextTower
from contrastive.models.tokenizer import load_tokenizer
from contrastive.models.two_tower import TwoTower
from contrastive.preprocessing import Preprocessing, differences

FORMAT = 2  # has a preprocessing other than `implied_preprocessing`, which is the one of format 1; else the same
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # the first that is there
IMAGE_TOWERS = {"timm": TimmImageTower}
TEXT_TOWERS = {"transformer": TransformerTextTower, "huggingface": HuggingFaceTextTower}


class RandomWeightsWarning(UserWarning):
    """A model was opened without trained weights."""


class AssumedPreprocessingWarning(UserWarning):
    """A model folder does not record how pictures become pixels."""


class NoTextTower(nn.Module):
    """In place of the text tower of a model that was opened without it."""

    cuts_text = True

    def __init__(self, description: dict[str, Any]) -> None:
        super().__init__()
        self._description = description

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        raise UserError("the model was opened without its text tower; open it with contrastive.load(path)")

    project = features

    def projection_parameters(self) -> list[nn.Parameter]:
        return []

    def checkpoint_gradients(self) -> None:
        pass

    def description(self) -> dict[str, Any]:
        return self._description


def describe(model: TwoTower, *, recorded: bool = True) -> dict[str, Any]:
    """The description from which `model` is built again, without weights and tokenizer.

    It is equal for two models that can share weights. It holds the preprocessing only where that is not
    `implied_preprocessing`, so that models from before it was recorded keep their fingerprints.

    recorded: False leaves the preprocessing out.
    """
    recorded = recorded and model.preprocessing != implied_preprocessing(model)
    description: dict[str, Any] = {
        "format": FORMAT if recorded else 1,
        "name": model.name,
        "dim": model.dim,
        "scale_max": model.scale_max,
        "bias": model.logit_bias is not None,
    }
    if model.open_clip_config is not None:
        description["open_clip"] = model.open_clip_config
    else:
        description["image"] = model.image.description()
        description["text"] = model.text.description()
    if recorded:
        description["preprocessing"] = model.preprocessing.to_dict()
    as_json: dict[str, Any] = json.loads(json.dumps(description))  # tuples become lists, as in a file
    return as_json


def implied_preprocessing(model: TwoTower) -> Preprocessing:
    """The preprocessing of a description that has none: CLIP's transform.

    The description of a timm tower has its mean and std. An open_clip model has open_clip's defaults.
    """
    if model.open_clip_config is not None:
        return Preprocessing(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, model.input_size)
    return Preprocessing(model.image.mean, model.image.std, model.input_size)


def _whole_description(model: TwoTower, tokenizer: dict[str, Any]) -> dict[str, Any]:
    return {**describe(model), "preprocessing": model.preprocessing.to_dict(), "tokenizer": tokenizer}


def save_model(model: TwoTower, folder: str | Path) -> Path:
    """Write `model`, its adapters merged, to `folder`, which `contrastive.load` opens; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = _whole_description(model, model.tokenizer.save(folder))
    state = {key: value.detach().cpu().contiguous() for key, value in plain_state(model).items()}
    save_file(state, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    (folder / "model.safetensors.tmp").replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    return folder


def build_described(description: dict[str, Any], folder: Path, *, text_tower: bool = True) -> TwoTower:
    """The model of a saved description, with random weights; its tokenizer comes from `folder`.

    text_tower: False puts a `NoTextTower` in its place.
    """
    saved = description.get("preprocessing")
    try:
        preprocessing = None if saved is None else Preprocessing.from_dict(saved)
    except UserError as error:
        raise UserError(f"{folder}: config.json: {error}") from None
    bias = 0.0 if description.get("bias") else None
    if "open_clip" in description:
        model = open_clip_model(
            description["name"],
            config=description["open_clip"],
            bias=bias,
            scale_max=description["scale_max"],
        )
        if not text_tower:  # open_clip builds both; what it built is let go
            model.text = NoTextTower({"kind": "open_clip"})
        if preprocessing is not None:
            model.preprocessing = preprocessing
        return model
    image = dict(description["image"])
    _check_stated_once(image, preprocessing, folder)
    text = dict(description["text"])
    image_tower = IMAGE_TOWERS[image.pop("kind")](**image)
    text_half: Any = TEXT_TOWERS[text.pop("kind")](**text) if text_tower else NoTextTower(description["text"])
    return TwoTower(
        image_tower,
        text_half,
        load_tokenizer(description["tokenizer"], folder),
        description["dim"],
        scale_max=description["scale_max"],
        bias=bias,
        name=description["name"],
        preprocessing=preprocessing,
    )


def _check_stated_once(image: dict[str, Any], preprocessing: Preprocessing | None, folder: Path) -> None:
    """Raise UserError for a tower's mean or std, which `config.json` has in two places, that were changed in one."""
    for name in ("mean", "std"):
        if preprocessing is not None and name in image and list(getattr(preprocessing, name)) != list(image[name]):
            raise UserError(
                f"{folder}: config.json: image.{name} {image[name]} and preprocessing.{name} "
                f"{list(getattr(preprocessing, name))} differ; make them equal"
            )


def _open_folder(folder: Path, text: bool) -> TwoTower:
    try:
        description = json.loads((folder / "config.json").read_text())
        assert description["format"] <= FORMAT
    except (json.JSONDecodeError, KeyError, AssertionError):
        raise UserError(f"{folder}: config.json was not written by this version of contrastive") from None
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder}: model.safetensors is missing; save the model again")
    model = build_described(description, folder, text_tower=text)
    try:
        if text:
            model.load_state_dict(load_file(weights))
        else:
            with safe_open(weights, framework="pt") as file:
                names = [name for name in file.keys() if not name.startswith("text.")]  # noqa: SIM118
                model.load_state_dict({name: file.get_tensor(name) for name in names})
                model.whole_fingerprint = _both_fingerprints(model, sorted(file.keys()), file.get_tensor)
    except Exception as error:  # safetensors raises its own types for a cut-off file
        reason = str(error).splitlines()[0]
        raise UserError(f"{weights}: the weights do not fit or are damaged ({reason})") from None
    if "preprocessing" not in description and model.open_clip_config is not None:
        warnings.warn(_assumed(model, folder), AssumedPreprocessingWarning, stacklevel=3)
    return model


def _open_clip_folder(folder: Path) -> TwoTower:
    """The model that open_clip saved, with the preprocessing of its file."""
    weights = next((folder / name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise UserError(f"{folder}: no weights beside {OPEN_CLIP_CONFIG}; put {' or '.join(OPEN_CLIP_WEIGHTS)} there")
    return open_clip_model(str(folder / OPEN_CLIP_CONFIG), pretrained=str(weights))


def _assumed(model: TwoTower, folder: Path) -> str:
    """The warning about an open_clip model without saved mean and std; it names the values of open_clip's tags."""
    tags = open_clip.list_pretrained_tags_by_model(model.name)
    size = {"size": model.input_size}
    known = {Preprocessing.of_open_clip({**open_clip.get_pretrained_cfg(model.name, tag), **size}) for tag in tags}
    others = [differences(model.preprocessing, other)[1] for other in known - {model.preprocessing}]
    hint = f" (open_clip's weights of {model.name} have {' or '.join(sorted(others))})" if others else ""
    return (
        f"{folder}: its mean, std and resize mode were not saved; assumed are {model.preprocessing}{hint}. "
        'Put the right ones into config.json as "preprocessing", or export the model again'
    )


def load(path_or_name: str | Path, *, device: str | torch.device | None = None, text: bool = True) -> TwoTower:
    """Open a model, in evaluation mode.

    Args:
        path_or_name: a run folder (its ``model/`` is taken), a model folder, a folder that open_clip
            saved (``open_clip_config.json`` and weights), an open_clip model name, or
            ``NAME:WEIGHTS`` for an open_clip weight tag or checkpoint file. A bare open_clip name has **random
            weights**, and says so with a `RandomWeightsWarning`: nothing is fetched unless it is asked for.
        device: where to put it; the accelerator if there is one, else the CPU.
        text: False leaves the text tower of a model folder out, as a saved classifier needs none: only images can be
            embedded then. The fingerprint stays that of the whole model.

    A folder of an open_clip model from before mean and std were saved opens with open_clip's defaults and an
    `AssumedPreprocessingWarning`.

    Raises:
        UserError: nothing by that name, or a damaged folder.
    """
    path = Path(path_or_name)
    name = str(path_or_name)
    if path.is_dir() and (path / OPEN_CLIP_CONFIG).is_file():
        model = _open_clip_folder(path)
    elif path.is_dir():
        folder = path / "model" if (path / "model" / "config.json").is_file() else path
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{path}: no model here (neither config.json nor model/config.json); has the run saved one?"
            )
        model = _open_folder(folder, text)
    elif path.exists():
        raise UserError(f"{path} is a file; name the run folder or the model folder")
    else:
        name, _, weights = name.partition(":")
        if "/" in name or "\\" in name:
            raise UserError(f"{path}: no such run or model folder")
        model = open_clip_model(name, pretrained=weights or None)
        if not weights:
            warnings.warn(
                f"{name} has RANDOM WEIGHTS: its predictions mean nothing. Name weights as {name}:TAG_OR_FILE, "
                "or open a trained run folder.",
                RandomWeightsWarning,
                stacklevel=2,
            )
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval()


def reinitialised(model: TwoTower, seed: int = 0) -> TwoTower:
    """The same architecture with fresh random weights: the control beside every probe."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = model.tokenizer.save(Path(folder))
            fresh = build_described(_whole_description(model, tokenizer), Path(folder))
    fresh.tokenizer = model.tokenizer
    return fresh.to(model.device).eval()


def fingerprint(model: TwoTower, *, recorded: bool = True) -> str:
    """Hash of the weights and the description: two models with the same one give the same embeddings.

    recorded: False gives the hash of the same model before the preprocessing was recorded.
    """
    if model.whole_fingerprint is not None:
        return model.whole_fingerprint[recorded]
    state = plain_state(model)
    return _digest(describe(model, recorded=recorded), sorted(state), state.__getitem__)


def _both_fingerprints(model: TwoTower, names: list[str], tensor: Callable[[str], torch.Tensor]) -> dict[bool, str]:
    """`fingerprint` by its `recorded`; the weights are read once where both are the same."""
    now, before = (describe(model, recorded=recorded) for recorded in (True, False))
    found = _digest(now, names, tensor)
    return {True: found, False: found if before == now else _digest(before, names, tensor)}


def _digest(description: dict[str, Any], names: list[str], tensor: Callable[[str], torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in names:
        digest.update(name.encode())
        digest.update(tensor(name).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
