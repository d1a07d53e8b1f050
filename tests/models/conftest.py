"""A two-tower model small enough for a unit test."""

import pytest
import torch

from contrastive.models import (
    CorpusTokenizer,
    TimmImageTower,
    TransformerTextTower,
    TwoTower,
    train_tokenizer,
)

CORPUS = ["open book", "red apple", "woman feeding baby", "flag of Mexico"] * 3


@pytest.fixture
def make_model():
    def make(**options) -> TwoTower:
        torch.manual_seed(0)
        tokenizer = CorpusTokenizer(train_tokenizer(CORPUS, vocab_size=330), context=8)
        image = TimmImageTower("resnet18", 16, 32, kwargs={"channels": (8, 8, 16, 16), "layers": (1, 1, 1, 1)})
        text = TransformerTextTower(tokenizer.vocab_size, 16, 8, width=16, depth=1, heads=2, pad_id=tokenizer.pad_id)
        return TwoTower(image, text, tokenizer, 16, **options)

    return make


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
