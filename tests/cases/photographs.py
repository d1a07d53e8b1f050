"""Pictures for tests of preprocessing: two photographs, upright and lying, and smaller parts of them."""

from functools import cache

from PIL import Image
from sklearn.datasets import load_sample_images


@cache
def photographs() -> dict[str, Image.Image]:
    china, flower = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    return {
        "lying": china,
        "upright": flower.transpose(Image.Transpose.ROTATE_90),
        "long": china.crop((0, 100, 640, 217)),
        "tiny": flower.resize((23, 15)),
    }
