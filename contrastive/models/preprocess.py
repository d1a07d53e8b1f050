"""From a PIL image to the uint8 square that a tower takes; normalisation happens on the device."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def preprocess_image(image: Image.Image, size: int) -> Tensor:
    """Resize the shorter side to `size` (bicubic, antialiased), crop the centre; uint8 ``(3, size, size)``.

    The same steps as CLIP's evaluation transform, so features of released weights agree with open_clip's.
    """
    image = image.convert("RGB")
    width, height = image.size
    if (width, height) != (size, size):
        short = min(width, height)
        scaled = (max(size, size * width // short), max(size, size * height // short))
        image = image.resize(scaled, Image.Resampling.BICUBIC)
        left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())
