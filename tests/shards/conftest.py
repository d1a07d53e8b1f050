import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.shards import Record, ShardIndex, open_index, write_shards

VAL = Path(__file__).parents[2] / "data" / "pictograms" / "val.parquet"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def encoded(number: int = 0, size: tuple[int, int] = (20, 16), format: str = "PNG", **options: object) -> bytes:
    """An image of noise that differs by number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def records(count: int, size: tuple[int, int] = (20, 16)) -> list[Record]:
    return [
        Record(f"sample-{i:03d}", encoded(i, size), (f"caption {i}", f"variant {i}"), meta={"number": i})
        for i in range(count)
    ]


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., ShardIndex]:
    """Write records as shards of four samples and open them."""

    def make(items: list[Record], name: str = "shards") -> ShardIndex:
        write_shards(items, tmp_path / name, samples_per_shard=4)
        return open_index(tmp_path / name)

    return make


def lengths(captions: list[str]) -> np.ndarray:
    """A stand-in for a tokenizer that tells captions apart: length, and sum of the characters."""
    return np.array([[len(caption), sum(map(ord, caption))] for caption in captions])
