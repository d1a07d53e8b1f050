"""Captions to token ids: one trained on the corpus, open_clip's, or a local folder's.

A tokenizer here is a callable ``list[str] -> int64 (n, length)`` with ``context``, ``pad_id`` and ``vocab_size``.
``length`` is the longest caption of the call, never above ``context``: whether a text tower can take the short form
is the tower's business (see ``TextTower.cuts_text``). A tokenizer is picklable, since loader workers hold a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from contrastive.errors import UserError

PAD, END = "[PAD]", "[END]"


class Tokenizer(Protocol):
    """What a text tower and the loader need of a tokenizer."""

    context: int
    pad_id: int
    vocab_size: int

    def __call__(self, texts: Sequence[str]) -> Tensor: ...

    def shortened(self, context: int) -> Tokenizer:
        """The same with another `context`: a caption that is cut still ends with its closing token."""
        ...

    def save(self, folder: Path) -> dict[str, Any]:
        """Write what is needed into `folder`; return the arguments that rebuild it from there."""
        ...


def train_tokenizer(captions: Iterable[str], vocab_size: int = 8000, lowercase: bool = True) -> FastTokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) fitted to a corpus of captions.

    A vocabulary of the corpus's own size matters for small models: CLIP's 49,408 rows of width 256 are 12.6 M
    parameters, ten times the image tower that goes with them. Every caption ends with ``[END]``.
    """
    tokenizer = FastTokenizer(models.BPE())
    steps: list[normalizers.Normalizer] = [normalizers.NFKC()]
    if lowercase:
        steps.append(normalizers.Lowercase())
    tokenizer.normalizer = normalizers.Sequence(steps)
    # Bytes as the alphabet: no caption has an unknown character, and the same corpus gives the same file (an
    # alphabet that is collected from the corpus comes in the order of a hash map, another one in every process).
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
    return tokenizer


class CorpusTokenizer:
    """A ``tokenizers`` file: one trained by `train_tokenizer`, or the ``tokenizer.json`` of a Hugging Face folder.

    Raises:
        UserError: there is no such file, or it is not a tokenizer.
    """

    def __init__(self, tokenizer: FastTokenizer | str | Path, context: int = 32) -> None:
        if not isinstance(tokenizer, FastTokenizer):
            path = Path(tokenizer)
            if path.is_dir():
                path = path / "tokenizer.json"
            if not path.is_file():
                raise UserError(f"tokenizer: {path} does not exist; train one with `contrastive tokenizer`")
            try:
                tokenizer = FastTokenizer.from_file(str(path))
            except Exception as error:  # the binding raises bare Exception
                raise UserError(f"tokenizer: {path} is not a tokenizers file ({error})") from None
        self.context = context
        pad = [tokenizer.token_to_id(name) for name in (PAD, "<pad>", "<|endoftext|>")]
        self.pad_id: int = next((token for token in pad if token is not None), 0)
        self.vocab_size: int = tokenizer.get_vocab_size()
        # Truncation keeps the closing token, because the post-processor's tokens are counted in.
        tokenizer.enable_truncation(context)
        tokenizer.enable_padding(pad_id=self.pad_id, pad_token=tokenizer.id_to_token(self.pad_id))
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids of `texts`, int64 ``(n, length)``, padded with ``pad_id`` to the longest."""
        if not texts:
            return torch.zeros(0, 1, dtype=torch.int64)
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        return torch.tensor(ids, dtype=torch.int64).reshape(len(ids), -1)

    def shortened(self, context: int) -> CorpusTokenizer:
        return CorpusTokenizer(FastTokenizer.from_str(self._tokenizer.to_str()), context)

    def save(self, folder: Path) -> dict[str, Any]:
        self._tokenizer.save(str(folder / "tokenizer.json"))
        return {"kind": "corpus", "context": self.context}


class OpenClipTokenizer:
    """open_clip's byte-pair tokenizer (or the one that a model's configuration names).

    Ids are cut behind the last end-of-text token of the call, so a batch of short captions is narrow.
    """

    pad_id = 0

    def __init__(self, name: str | None = None, context: int = 77) -> None:
        import open_clip

        self.name, self.context = name, context
        if name is None:
            self._tokenizer: Any = open_clip.SimpleTokenizer(context_length=context)
        else:
            try:
                self._tokenizer = open_clip.get_tokenizer(name, context_length=context)
            except Exception as error:  # a hub that cannot be reached raises many types
                raise UserError(f"model {name}: its tokenizer is not on this machine ({error})") from None
        self.vocab_size = int(getattr(self._tokenizer, "vocab_size", 0)) or 49408
        self._words = _Words(self._tokenizer) if _Words.suit(self._tokenizer) else None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids of `texts`, int64 ``(n, length)``, zero-padded to the longest."""
        if self._words is not None:
            return self._words(texts, self.context)
        tokens: Tensor = self._tokenizer(list(texts), context_length=self.context).long()
        used = (tokens != self.pad_id).any(dim=0).nonzero()
        return tokens[:, : int(used[-1]) + 1 if len(used) else 1]

    def shortened(self, context: int) -> OpenClipTokenizer:
        return OpenClipTokenizer(self.name, context)

    def save(self, folder: Path) -> dict[str, Any]:
        return {"kind": "open_clip", "name": self.name, "context": self.context}


class _Words:
    """open_clip's `SimpleTokenizer` with a memory of words: the same ids in a quarter of the time.

    Half of its time goes to mending text that was decoded wrongly, which plain ASCII cannot be, and most of the rest to
    words that it met before.
    """

    REMEMBERED = 1 << 18  # words; letters of all languages, so there is no end of them

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: dict[str, list[int]] = {}

    @staticmethod
    def suit(tokenizer: Any) -> bool:
        """Whether `tokenizer` cleans and cuts text as this class does."""
        import open_clip
        from open_clip.tokenizer import get_clean_fn

        plain = type(tokenizer) is open_clip.SimpleTokenizer and tokenizer.reduction_fn is None
        return plain and tokenizer.clean_fn is get_clean_fn("lower")

    def __call__(self, texts: Sequence[str], context: int) -> Tensor:
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        rows = [[start, *self._encode(text)[: context - 2], end] for text in texts]
        width = max(map(len, rows), default=1)
        return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64).view(len(rows), width)

    def _encode(self, text: str) -> list[int]:
        if not (text.isascii() and text.isprintable()) or "&" in text:  # & may begin an entity of HTML
            found: list[int] = self.tokenizer.encode(text)
            return found
        return [number for word in self.tokenizer.pat.findall(text.lower()) for number in self._word(word)]

    def _word(self, word: str) -> list[int]:
        known = self.ids.get(word)
        if known is None:
            if len(self.ids) >= self.REMEMBERED:
                self.ids.clear()
            known = self.ids[word] = self.tokenizer.encode(word)
        return known


def load_tokenizer(saved: dict[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer that `save` described with `saved`, its files in `folder`."""
    options = {key: value for key, value in saved.items() if key != "kind"}
    if saved["kind"] == "corpus":
        return CorpusTokenizer(folder / "tokenizer.json", **options)
    return OpenClipTokenizer(**options)
