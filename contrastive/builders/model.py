"""From a recipe's ``model`` to the two-tower model with its starting weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as FastTokenizer
from torch import nn

from contrastive.builders.stages import changes_size, prepare_towers
from contrastive.config import (
    Config,
    FolderModelConfig,
    HuggingFaceTextConfig,
    HuggingFaceTokenizerConfig,
    OpenClipModelConfig,
    OpenClipTokenizerConfig,
    PairModelConfig,
    TowerConfig,
    TrainedTokenizerConfig,
)
from contrastive.errors import UserError
from contrastive.models import (
    CorpusTokenizer,
    HuggingFaceTextTower,
    OpenClipTokenizer,
    Preprocessing,
    TimmImageTower,
    Tokenizer,
    TransformerTextTower,
    TwoTower,
    add_adapters,
    load,
    open_clip_model,
)


def build_tokenizer(config: PairModelConfig, trained: str) -> Tokenizer:
    """The tokenizer of a pair; `trained` is the text of a trained one, for recipes that name none."""
    choice = config.tokenizer
    match choice:
        case OpenClipTokenizerConfig():
            return OpenClipTokenizer(context=choice.context)
        case HuggingFaceTokenizerConfig():
            return CorpusTokenizer(resolve_path(choice.path), context=choice.context)
        case TrainedTokenizerConfig():
            source = FastTokenizer.from_str(trained) if choice.path is None else choice.path
            return CorpusTokenizer(source, context=choice.context)


def wants_training(config: Config) -> TrainedTokenizerConfig | None:
    """The tokenizer block of a recipe whose tokenizer is to be trained on the run's own captions, else None."""
    if isinstance(config.model, PairModelConfig) and isinstance(config.model.tokenizer, TrainedTokenizerConfig):
        return config.model.tokenizer if config.model.tokenizer.path is None else None
    return None


def build_model(config: Config, trained_tokenizer: str = "") -> TwoTower:
    """The two-tower model of a recipe with its starting weights, on the CPU; see `build_tokenizer`."""
    torch.manual_seed(config.run.seed)
    model = _build_towers(config, trained_tokenizer)
    height, width = model.input_size
    if height != width and config.data.cache != "features":
        raise UserError(
            f"model: {model.name} takes images of {height} x {width} px, and training makes square crops; choose a "
            "model of square images, or lock both towers and use data.cache features"
        )
    for tower, choice in towers_of(config).items():
        if choice.lora is not None:
            options = choice.lora.model_dump(exclude={"targets"})
            targets = None if choice.lora.targets == "auto" else choice.lora.targets
            add_adapters(model, tower, **options, targets=targets)
    if config.train.gradient_checkpointing:
        model.checkpoint_gradients()
    if config.train.channels_last:
        model.use_channels_last()
    prepare_towers(config, model)
    return model


def towers_of(config: Config) -> dict[str, TowerConfig]:
    return {"image": config.model.image, "text": config.model.text}


def _build_towers(config: Config, trained_tokenizer: str) -> TwoTower:
    model_config = config.model
    if isinstance(model_config, FolderModelConfig):
        return _open_start(model_config, name=Path(config.run.dir).name)
    common: dict[str, Any] = {
        "scale_init": model_config.logit_scale.init,
        "scale_max": model_config.logit_scale.max,
        "scale_learned": model_config.logit_scale.learned,
        "bias": model_config.logit_bias,
        "lock_image": model_config.image.locked,
        "lock_text": model_config.text.locked,
    }
    if isinstance(model_config, OpenClipModelConfig):
        return open_clip_model(model_config.name, pretrained=model_config.pretrained, **common)
    image = model_config.image
    tokenizer = build_tokenizer(model_config, trained_tokenizer)
    return TwoTower(
        TimmImageTower(
            image.name,
            dim=model_config.dim,
            image_size=image.size,
            kwargs=image.kwargs,
            weights=None if image.weights is None else resolve_path(image.weights),
            mean=image.mean,
            std=image.std,
            any_size=changes_size(config),
        ),
        _build_text_tower(model_config, tokenizer),
        tokenizer,
        model_config.dim,
        name=Path(config.run.dir).name,
        preprocessing=Preprocessing(
            image.mean, image.std, (image.size, image.size), image.resize_mode, image.interpolation, image.fill_color
        ),
        **common,
    )


def _open_start(config: FolderModelConfig, name: str) -> TwoTower:
    """The saved model that a recipe starts from; `name` is what its fine-tuned self is called."""
    if not Path(resolve_path(config.path)).is_dir():
        raise UserError(f"model.path: {config.path} does not exist; name a run folder or a model folder")
    model = load(resolve_path(config.path), device="cpu")
    if model.open_clip_config is None:  # there it is the architecture's
        model.name = name
    scale = config.logit_scale
    model.scale_max = scale.max or model.scale_max
    if scale.init is not None:
        model.logit_scale.data.fill_(math.log(scale.init))
    model.logit_scale.requires_grad_(scale.learned)
    if config.logit_bias is not None:
        model.logit_bias = nn.Parameter(torch.tensor(config.logit_bias))
    for tower in ("image", "text"):
        if getattr(config, tower).locked:
            model.lock(tower)
    return model


def _build_text_tower(config: PairModelConfig, tokenizer: Tokenizer) -> Any:
    text = config.text
    if isinstance(text, HuggingFaceTextConfig):
        return HuggingFaceTextTower(resolve_path(text.path), config.dim, pool=text.pool, pad_id=tokenizer.pad_id)
    return TransformerTextTower(
        tokenizer.vocab_size,
        config.dim,
        tokenizer.context,
        width=text.width,
        depth=text.depth,
        heads=text.heads,
        pool=text.pool,
        causal=text.causal,
        dropout=text.dropout,
        pad_id=tokenizer.pad_id,
    )


def resolve_path(path: str) -> str:
    """`path`, where ``package:NAME/FILE`` means a file inside an installed Python package."""
    if not path.startswith("package:"):
        return path
    from importlib.util import find_spec

    package, _, inside = path.removeprefix("package:").partition("/")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{path}: the package {package} is not installed; see the header of the recipe")
    return str(Path(next(iter(spec.submodule_search_locations))) / inside)
