"""A two-tower model that needs no training: images and texts are placed by their colour."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from contrastive.shards import resize_square

COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
NAMES = list(COLOURS)


class ColourModel(nn.Module):
    """Embeddings: mean colour, minus grey, normalised. Features before that: a 4 x 4 thumbnail.

    `widths` keeps the width of every batch of tokens, `modes` whether `encode_image` was in training mode.
    """

    dim, image_size, device = 3, 8, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        self.dropout = nn.Dropout(0.5)
        self.widths: list[int] = []
        self.modes: list[bool] = []

    def preprocess(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(resize_square(image, self.image_size))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        rows = [[NAMES.index(w) + 1 if w in NAMES else 0 for w in text.lower().split()] for text in texts]
        width = max(map(len, rows))
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])

    def encode_image(self, pixels: Tensor) -> Tensor:
        self.modes.append(self.dropout.training)
        if pixels.ndim == 2:  # features: a thumbnail has the mean of its image
            return F.normalize((pixels.reshape(-1, 3, 16) - 0.5).mean(dim=2), dim=-1)
        return F.normalize(self.dropout(pixels.float() / 255 - 0.5).mean(dim=(2, 3)), dim=-1)

    def image_features(self, pixels: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(pixels.float() / 255, 4).flatten(1)

    def text_features(self, tokens: Tensor) -> Tensor:
        words = F.one_hot(tokens, 16).float().sum(dim=1)
        words[:, 0] = 0  # padding, and words that are no colour: a row does not depend on its batch
        return words / words.sum(dim=1, keepdim=True).clamp(min=1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        if not tokens.is_floating_point():
            self.widths.append(tokens.shape[1])
            tokens = self.text_features(tokens)
        table = torch.tensor(list(COLOURS.values())) / 255 - 0.5
        return F.normalize(tokens[:, 1:5] @ table + 1e-4, dim=-1)


def square(colour: str, shade: int = 0) -> Image.Image:
    """A 12 x 12 image in a colour, made a little darker by `shade`."""
    red, green, blue = (max(0, value - shade) for value in COLOURS[colour])
    return Image.new("RGB", (12, 12), (red, green, blue))
