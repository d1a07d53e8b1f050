"""The RGB form of an image of any mode."""

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
