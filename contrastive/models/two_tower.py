"""The two-tower model. Legend: N pairs, H = W = ``image_size``, L tokens, F features before, D after the projection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from contrastive.errors import UserError
from contrastive.models.image_towers import ImageTower
from contrastive.models.layers import layers_of
from contrastive.models.pixels import check_features, check_normalised, check_shape
from contrastive.models.stages import PATCH_DROPOUTS
from contrastive.models.text_towers import TextTower
from contrastive.models.tokenizer import Tokenizer
from contrastive.preprocessing import Preprocessing


class TwoTower(nn.Module):
    """An image and a text tower that share a joint space, as in CLIP (Radford et al. 2021, arXiv:2103.00020).

    ``forward`` goes through both towers, so that a wrapper which averages gradients (DDP) sees every parameter;
    ``encode_image`` and ``encode_text`` are for using the model.

    Args:
        image, text, tokenizer: the towers and the tokenizer that belongs to the text tower.
        scale_init, scale_max: the logit scale (1 / temperature) and its cap; CLIP's are 1 / 0.07 and 100.
        scale_learned: False keeps the scale where it starts.
        bias: start of the logit bias that sigmoid losses use; None for a model without one.
        lock_image, lock_text: keep a tower's trunk as it is (no gradient, evaluation mode); its projection learns.
        preprocessing: from a picture to the pixels of the image tower; None for CLIP's transform with the mean, std
            and size of the tower.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        image: ImageTower,
        text: TextTower,
        tokenizer: Tokenizer,
        dim: int,
        *,
        scale_init: float = 1 / 0.07,
        scale_max: float = 100.0,
        scale_learned: bool = True,
        bias: float | None = None,
        lock_image: bool = False,
        lock_text: bool = False,
        name: str = "two-tower",
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        assert isinstance(image, nn.Module) and isinstance(text, nn.Module)
        self.image: Any = image
        self.text: Any = text
        self.tokenizer, self.dim, self.name, self.scale_max = tokenizer, dim, name, scale_max
        self.image_size: int = image.image_size
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale_init)), requires_grad=scale_learned)
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        for constant in ("pixel_mean", "pixel_std"):
            self.register_buffer(constant, torch.zeros(1, 3, 1, 1), persistent=False)
        self.channels_last = False
        self.open_clip_config: dict[str, Any] | None = None  # set for a model of open_clip: what rebuilds it
        # for a model opened without its text tower: `fingerprint` of the whole model, by its `recorded`
        self.whole_fingerprint: dict[bool, str] | None = None
        self.preprocessing = preprocessing or Preprocessing(image.mean, image.std, self.input_size)
        self.adapters: dict[str, dict[str, Any]] = {}  # by tower, what `add_adapters` gave it
        self.locked: tuple[str, ...] = ()
        self.held: tuple[str, ...] = ()  # locked for the time being, see `hold`
        for tower in [tower for tower, lock in (("image", lock_image), ("text", lock_text)) if lock]:
            self.lock(tower)

    # ---- using the model

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width that the image tower is built for, pixels."""
        height, width = getattr(self.image, "full_size", (self.image_size, self.image_size))
        return int(height), int(width)

    @property
    def preprocessing(self) -> Preprocessing:
        """From a picture to the pixels of the image tower. It is saved with the model and part of its fingerprint.

        Raises (when set):
            UserError: its size is not that of the tower, or the model was opened without its text tower.
        """
        return self._preprocessing

    @preprocessing.setter
    def preprocessing(self, value: Preprocessing) -> None:
        if value.size != self.input_size:
            raise UserError(
                f"preprocessing.size {list(value.size)}: the image tower of {self.name} takes {list(self.input_size)}; "
                "use that"
            )
        if self.whole_fingerprint is not None:
            raise UserError(f"preprocessing: {self.name} was opened without its text tower; open the whole model first")
        self._preprocessing = value
        if (tuple(self.image.mean), tuple(self.image.std)) != (value.mean, value.std):
            self.image.mean, self.image.std = (
                value.mean,
                value.std,
            )  # equal integers stay integers: their JSON is hashed
        # 255 belongs to the constants: uint8 pixels become normalised floats in one fused pass.
        self.pixel_mean.copy_(torch.tensor(value.mean).view(1, 3, 1, 1) * 255)
        self.pixel_std.copy_(torch.tensor(value.std).view(1, 3, 1, 1) * 255)

    def preprocess(self, image: Image.Image) -> Tensor:
        """A PIL image as uint8 ``(3, H, W)``: see `contrastive.preprocessing.Preprocessing`."""
        return torch.from_numpy(self.preprocessing.apply(image))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64 ``(N, L)``; L is the longest caption where the tower allows it, else the context."""
        tokens = self.tokenizer(texts)
        missing = 0 if self.text.cuts_text else self.tokenizer.context - tokens.shape[1]
        return F.pad(tokens, (0, missing), value=self.tokenizer.pad_id) if missing else tokens

    def encode_image(self, pixels: Tensor) -> Tensor:
        """L2-normalised embeddings ``(N, D)``, float32, of `pixels` ``(N, 3, H, W)``: uint8, or normalised floats.

        In evaluation mode H and W are those of `preprocessing`. Raises UserError for another shape, and for floats
        that are clearly not normalised; see `contrastive.models.pixels`.
        """
        return F.normalize(self.image.project(self.image_features(pixels)).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """L2-normalised embeddings ``(N, D)``, float32, of token ids ``(N, L)``."""
        return F.normalize(self.text.project(self.text_features(tokens)).float(), dim=-1)

    def encode_prompts(self, tokens: Tensor) -> Tensor:
        """`encode_text` for use, in evaluation mode, of many texts ``(N, L)`` in one call.

        Where `shares_prefixes`, beginnings that texts share are computed once, in bounded memory, and the result
        equals that of `encode_text` to 1e-5 in float32. Elsewhere it is `encode_text`: give it small batches.
        """
        features = self.text.prompt_features(tokens) if self.shares_prefixes else self.text_features(tokens)
        return F.normalize(self.text.project(features).float(), dim=-1)

    @property
    def shares_prefixes(self) -> bool:
        """Whether `encode_prompts` computes shared beginnings once; best then with all texts in one call."""
        # what shares them reads weights and calls no layer, so that it would pass adapters by
        return bool(getattr(self.text, "shares_prefixes", False)) and "text" not in self.adapters

    def image_features(self, pixels: Tensor) -> Tensor:
        """Features before the projection ``(N, F)``, what a linear probe reads.

        What is given as ``(N, F)`` is taken for such features: so a locked trunk need not run twice on an image.
        Raises UserError as `encode_image` does.
        """
        if pixels.ndim == 2:
            check_features(pixels, self.image.width)
            return pixels
        check_shape(pixels, None if self.training else self.preprocessing.size)
        if pixels.dtype == torch.uint8:
            pixels = (pixels.float() - self.pixel_mean) / self.pixel_std
        elif not self.training and (pixels.device.type == "cpu" or not torch.is_grad_enabled()):
            check_normalised(pixels, self.preprocessing)  # reads values, so that a GPU would have to be waited for
        if pixels.dtype == torch.float64 and self.logit_scale.dtype == torch.float32:  # numpy's floats
            pixels = pixels.float()
        if self.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.image.features(pixels)
        return features

    def text_features(self, tokens: Tensor) -> Tensor:
        """Features of captions before the projection ``(N, E)``; floats ``(N, E)`` are taken for such features."""
        if tokens.is_floating_point():
            return tokens
        features: Tensor = self.text.features(tokens)
        return features

    # ---- training it

    def forward(self, pixels: Tensor, tokens: Tensor) -> dict[str, Tensor | None]:
        """Both embeddings ``(N, D)``, the logit scale (not its logarithm) and the bias, as the losses take them."""
        return {
            "image": self.encode_image(pixels),
            "text": self.encode_text(tokens),
            "scale": self.logit_scale.exp(),
            "bias": self.logit_bias,
        }

    def clamp_scale(self) -> None:
        """Keep the scale under its cap and above 1; called after every optimizer step, as CLIP does."""
        with torch.no_grad():
            self.logit_scale.clamp_(0.0, math.log(self.scale_max))

    def lock(self, tower: str) -> None:
        """Keep the trunk of "image" or "text" as it is, for good; its projection goes on learning."""
        self.locked = (*self.locked, tower)
        for parameter in self.trunk_parameters(tower):
            parameter.requires_grad_(False)

    def hold(self, towers: Sequence[str]) -> None:
        """Put the trunks of `towers`, and of no others but the locked ones, in evaluation mode until the next call.

        That keeps their batch statistics; whoever calls it keeps their weights, see `training.hold`.
        """
        self.held = tuple(towers)
        self.train(self.training)

    def trunk_parameters(self, tower: str) -> list[nn.Parameter]:
        """The parameters of a tower in front of its projection."""
        half: Any = getattr(self, tower)
        projection = {id(parameter) for parameter in half.projection_parameters()}
        return [parameter for parameter in half.parameters() if id(parameter) not in projection]

    def layers(self, tower: str) -> dict[str, int]:
        """The layer of each parameter of a tower, by its name in this model; see `layers_of`."""
        return {f"{tower}.{name}": layer for name, layer in layers_of(getattr(self, tower)).items()}

    def train(self, mode: bool = True) -> TwoTower:
        super().train(mode)
        for tower in {*self.locked, *self.held}:  # dropout and batch statistics stay off
            getattr(self, tower).eval()
        for tower in self.adapters.keys() - set(self.held):  # but for the dropout of what learns there
            for part in getattr(self, tower).modules():
                if hasattr(part, "lora_dropout"):
                    part.lora_dropout.train(mode)
        return self

    def set_patch_dropout(self, rate: float) -> None:
        """Leave this share of an image's patches out in training, from now on; see `stages.add_patch_dropout`."""
        for part in self.image.modules():
            if isinstance(part, PATCH_DROPOUTS):
                part.prob = rate

    def checkpoint_gradients(self) -> None:
        """Recompute activations in backward instead of storing them."""
        self.image.checkpoint_gradients()
        self.text.checkpoint_gradients()

    def use_channels_last(self) -> None:
        """Convolutions in channels-last layout; results agree to rounding."""
        self.channels_last = True
        self.image.to(memory_format=torch.channels_last)
