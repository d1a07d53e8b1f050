"""The same picture in the training and in the test set: by how it looks, and by where the model places it.

Shapes: N test images, M training images, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

TILE = 2048  # rows and columns of similarities held at a time: 16 MB


def difference_hashes(images: Sequence[Image.Image]) -> NDArray[np.uint64]:
    """The difference hash (dHash) of each image, 256 bits: uint64 (N, 4).

    The image becomes 17 × 16 grey pixels, and each bit says whether a pixel is brighter than its right neighbour by
    more than 2 of 255, so that noise in flat areas flips none. The hash survives resizing and recompression: a few
    bits change. The usual 64 bits are too few for small pictures of single objects: of 5,000 test images of
    Fashion-MNIST, 325 have the 64-bit hash of a training image, and not one is a copy.
    """
    small = [np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BOX), np.int16) for image in images]
    pixels = np.stack(small)
    bits = (pixels[:, :, :-1] > pixels[:, :, 1:] + 2).reshape(len(images), 256)
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64)


@dataclass(frozen=True)
class Nearest:
    """Of each test row: the training row that is nearest, int64 (N,), and how near, float32 (N,)."""

    row: NDArray[np.int64]
    value: NDArray[np.float32]


def nearest_look(test_N4: ArrayLike, train_M4: ArrayLike) -> Nearest:
    """The training hash with the fewest differing bits, of 256, from each test hash; of equal ones the first."""
    found = _nearest(_signs(test_N4), _signs(train_M4))
    return Nearest(found.row, (256 - found.value) / np.float32(2))


def nearest_embedding(test_ND: NDArray[np.float32], train_MD: NDArray[np.float32]) -> Nearest:
    """The training row with the largest cosine with each test row; rows need not be normalised."""
    return _nearest(_unit(test_ND), _unit(train_MD))


def _nearest(test_ND: NDArray[np.float32], train_MD: NDArray[np.float32]) -> Nearest:
    rows, values = np.zeros(len(test_ND), np.int64), np.full(len(test_ND), -np.inf, np.float32)
    for at, left in _blocks(test_ND):
        for start, right in _blocks(train_MD):
            product = left @ right.T
            best = product.argmax(axis=1)
            value = product[np.arange(len(left)), best]
            better = value > values[at : at + len(left)]
            rows[at : at + len(left)][better] = start + best[better]
            values[at : at + len(left)][better] = value[better]
    return Nearest(rows, values)


def _blocks(rows: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    return ((start, rows[start : start + TILE]) for start in range(0, len(rows), TILE))


def _signs(hashes: ArrayLike) -> NDArray[np.float32]:
    """Bits as -1 and 1, (N, 256): a product of two rows is 256 minus twice the number of differing bits."""
    columns = np.ascontiguousarray(np.asarray(hashes, np.uint64).astype(">u8")).view(np.uint8)
    return np.unpackbits(columns, axis=1).astype(np.float32) * 2 - 1


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
