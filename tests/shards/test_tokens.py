"""The cache of tokens against the tokenizers themselves."""

from typing import Any

import pytest
import torch

from contrastive.models import CorpusTokenizer, OpenClipTokenizer, train_tokenizer
from contrastive.shards import TokenCache

CAPTIONS = ["a cat", "a dog on a mat, asleep", "", "cat " * 200, "a cat", "Ünïcödé ☃", "a"]
TOKENIZERS = {
    "trained": lambda: CorpusTokenizer(train_tokenizer(CAPTIONS, 300), context=16),
    "open_clip": lambda: OpenClipTokenizer(context=20),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("captions", [CAPTIONS, CAPTIONS[:2], [""], ["", ""], CAPTIONS[::-1]])
def test_tokens_are_those_of_the_tokenizer_however_often_asked(name: str, captions: list[str]) -> None:
    tokenizer = TOKENIZERS[name]()
    cache = TokenCache(tokenizer, tokenizer.pad_id)
    for batch in (captions, CAPTIONS, captions):
        torch.testing.assert_close(cache(batch), tokenizer(batch), rtol=0, atol=0)


def ends_in_pad(texts: list[str]) -> torch.Tensor:
    """As CLIP's tokenizer in transformers: the end of a text and the padding are one token."""
    width = max(map(len, texts)) + 1
    return torch.tensor([[ord(c) for c in text] + [9] * (width - len(text)) for text in texts])


def fixed_width(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[ord(c) for c in text] + [0] * (12 - len(text)) for text in texts])


@pytest.mark.parametrize(("tokenize", "pad", "width"), [(ends_in_pad, 9, None), (fixed_width, 0, 12)])
def test_tokenizers_of_other_habits(tokenize: Any, pad: int, width: int | None) -> None:
    cache = TokenCache(tokenize, pad, width=width)
    for batch in (["abc", "d"], ["d"], ["efghij", "abc"], ["abc"]):
        torch.testing.assert_close(cache(batch), tokenize(batch), rtol=0, atol=0)


def test_only_new_captions_are_tokenized_and_all_by_one_call() -> None:
    calls: list[list[str]] = []

    def tokenize(texts: list[str]) -> torch.Tensor:
        calls.append(texts)
        return ends_in_pad(texts)

    cache = TokenCache(tokenize, 9)
    calls.clear()
    for batch in (["x", "y", "x"], ["y", "z"], ["z", "x"]):
        cache(batch)
    assert calls == [["x", "y"], ["z"]]


def test_it_remembers_no_more_than_it_may() -> None:
    cache = TokenCache(ends_in_pad, 9, captions=3)
    for text in "abcdef":
        cache([text])
    assert len(cache._known) == 3
    torch.testing.assert_close(cache(["a", "f", "bb", "g", "h"]), ends_in_pad(["a", "f", "bb", "g", "h"]))
