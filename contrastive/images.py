"""What every room means by an RGB image and by its square: models prepare with it, the loader evaluates with it."""

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """As RGB; transparency is laid over white, 16-bit grey is scaled."""
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I;16"):  # 16-bit grey: PIL's own conversion to RGB clips instead of scaling
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def square(image: Image.Image, size: int) -> Image.Image:
    """The evaluation transform of CLIP as an RGB image of size × size.

    The shorter side becomes `size` (bicubic, antialiased), and the centre is cut out: the same pixels as
    torchvision's Resize and CenterCrop, without resizing what is cut off.
    """
    short = min(image.size)
    resized = [int(size * side / short) for side in image.size]  # torchvision truncates, then rounds
    starts = [round((side - size) / 2) for side in resized]
    scales = [before / after for before, after in zip(image.size, resized, strict=True)]
    left, top = (start * scale for start, scale in zip(starts, scales, strict=True))
    right, bottom = ((start + size) * scale for start, scale in zip(starts, scales, strict=True))
    box = (left, top, min(right, image.width), min(bottom, image.height))
    return to_rgb(image).resize((size, size), Image.Resampling.BICUBIC, box=box)
