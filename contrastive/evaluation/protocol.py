"""What evaluation asks of a model. Any object with these will do; nothing here imports the models room.

Legend: N images or texts, H = W = `image_size`, L tokens, F features before, D after the projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor


class Model(Protocol):
    """A two-tower model (`contrastive.load` opens one)."""

    @property
    def dim(self) -> int: ...
    @property
    def image_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def logit_scale(self) -> Any: ...  # the logarithm of the scale
    # The two that encode also take what the two that follow give, floats (N, F) or (N, E), and project them.
    def encode_image(self, pixels: Tensor) -> Tensor: ...  # uint8 (N, 3, H, W) -> (N, D), normalised
    def encode_text(self, tokens: Tensor) -> Tensor: ...  # int64 (N, L) -> (N, D), normalised
    def image_features(self, pixels: Tensor) -> Tensor: ...  # uint8 (N, 3, H, W) -> (N, F)
    def text_features(self, tokens: Tensor) -> Tensor: ...  # int64 (N, L) -> (N, E)
    def preprocess(self, image: Image.Image) -> Tensor: ...  # -> uint8 (3, H, W)
    def tokenize(self, texts: Sequence[str]) -> Tensor: ...  # -> int64 (N, L)
    def modules(self) -> Any: ...
    def named_modules(self) -> Any: ...
    def named_parameters(self) -> Any: ...
    def named_buffers(self) -> Any: ...


@contextmanager
def inference(model: Model, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Evaluation mode and no gradients inside; each module's own mode is restored afterwards.

    dtype: compute in this precision where autocast allows it (bfloat16 is twice as fast on many CPUs, and
    moves embeddings by about 1 %); None computes as the weights are.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with (
            torch.inference_mode(),
            torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None),
        ):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
