"""Pretrain image-text towers on sharded pairs, classify by label text, probe new data sets.

The public names are found when they are first used, so that `import contrastive` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contrastive import config as config
    from contrastive import evaluation as evaluation
    from contrastive import losses as losses
    from contrastive import models as models
    from contrastive import shards as shards
    from contrastive.errors import UserError as UserError
    from contrastive.evaluation import LinearProbe as LinearProbe
    from contrastive.evaluation import ZeroShotClassifier as ZeroShotClassifier
    from contrastive.evaluation import embed as embed
    from contrastive.evaluation import load_classifier as load_classifier
    from contrastive.models import interpolate as interpolate
    from contrastive.models import load as load

_HOME = {
    "LinearProbe": "evaluation",
    "UserError": "errors",
    "ZeroShotClassifier": "evaluation",
    "embed": "evaluation",
    "interpolate": "models",
    "load": "models",
    "load_classifier": "evaluation",
}
_ROOMS = ("config", "evaluation", "losses", "models", "shards")

__all__ = ["LinearProbe", "UserError", "ZeroShotClassifier", "embed", "interpolate", "load", "load_classifier"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("contrastive")
    elif name in _HOME:
        value = getattr(import_module(f"contrastive.{_HOME[name]}"), name)
    elif name in _ROOMS:
        value = import_module(f"contrastive.{name}")
    else:
        raise AttributeError(f"module 'contrastive' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_ROOMS, "__version__"})
