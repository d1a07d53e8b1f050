"""Towers, the two-tower model, tokenizers, and the folder that a model is saved to."""

from contrastive.models.adapters import add_adapters
from contrastive.models.folder import (
    AssumedPreprocessingWarning,
    RandomWeightsWarning,
    describe,
    fingerprint,
    load,
    reinitialised,
    save_model,
)
from contrastive.models.image_towers import TimmImageTower
from contrastive.models.interpolate import interpolate
from contrastive.models.open_clip_towers import open_clip_model
from contrastive.models.text_towers import HuggingFaceTextTower, TransformerTextTower
from contrastive.models.tokenizer import CorpusTokenizer, OpenClipTokenizer, Tokenizer, train_tokenizer
from contrastive.models.two_tower import TwoTower
from contrastive.preprocessing import Preprocessing

__all__ = [
    "AssumedPreprocessingWarning",
    "CorpusTokenizer",
    "HuggingFaceTextTower",
    "OpenClipTokenizer",
    "Preprocessing",
    "RandomWeightsWarning",
    "TimmImageTower",
    "Tokenizer",
    "TransformerTextTower",
    "TwoTower",
    "add_adapters",
    "describe",
    "fingerprint",
    "interpolate",
    "load",
    "open_clip_model",
    "reinitialised",
    "save_model",
    "train_tokenizer",
]
