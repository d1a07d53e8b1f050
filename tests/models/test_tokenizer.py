"""Tokenizers: ids, padding, truncation, saving."""

import pickle

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.errors import UserError
from contrastive.models import CorpusTokenizer, OpenClipTokenizer, train_tokenizer

CORPUS = ["Open book", "open door", "a book of doors", "red apple"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> CorpusTokenizer:
    return CorpusTokenizer(train_tokenizer(CORPUS, vocab_size=330), context=6)


def test_training_is_reproducible():
    assert train_tokenizer(CORPUS, 330).to_str() == train_tokenizer(CORPUS, 330).to_str()


def test_case_is_ignored_unless_kept(tokenizer):
    assert torch.equal(tokenizer(["OPEN Book"]), tokenizer(["open book"]))
    kept = CorpusTokenizer(train_tokenizer(CORPUS, 330, lowercase=False))
    assert not torch.equal(kept(["Open book"]), kept(["open book"]))


def test_a_long_caption_keeps_its_end_token(tokenizer):
    end = tokenizer(["open book"])[0, -1]
    cut = tokenizer(["open book " * 20])
    assert cut.shape == (1, 6) and cut[0, -1] == end


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=6))
def test_any_text_becomes_ids_within_the_vocabulary(tokenizer, texts):
    ids = tokenizer(texts)
    assert ids.dtype == torch.int64 and ids.shape[0] == len(texts) and 1 <= ids.shape[1] <= 6
    assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()


def test_open_clips_ids_are_open_clips_cut_short():
    captions = ["a dog", "an open book on the table"]
    ours = OpenClipTokenizer()(captions)
    full = open_clip.SimpleTokenizer()(captions)
    assert torch.equal(ours, full[:, : ours.shape[1]]) and not full[:, ours.shape[1] :].any()


def test_open_clips_ids_are_cut_where_open_clip_cuts_them():
    captions = ["an open book on the table", "a dog", "book " * 20]
    ours = OpenClipTokenizer(context=6)(captions)
    assert torch.equal(ours, open_clip.SimpleTokenizer(context_length=6)(captions))


OURS, THEIRS = OpenClipTokenizer(), open_clip.SimpleTokenizer()
WRITTEN = st.lists(
    st.sampled_from(
        ["Dog", "dogs'", "it's", "IT'S", "&amp;", "&", "amp;", "lt;", "<end_of_text>", "<START_OF_TEXT>", "3.14", "!?",
         "...", "\t", "\r\n", "\x1b[31m", "\x00", "â€™", "ﬁ", "İ", "é", "日本", "🙂", "don't_stop", "\u2028", "a" * 40]
    )
    | st.text(max_size=8),
    max_size=8,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.builds(lambda parts, between: between.join(parts), WRITTEN, st.sampled_from(["", " "])), max_size=4))
def test_any_text_has_open_clips_ids(texts):
    for _ in range(2):  # the second time the words are remembered
        ids, full = OURS(texts), THEIRS(texts)
        assert torch.equal(ids, full[:, : ids.shape[1]]) and not full[:, ids.shape[1] :].any()


def test_tokenizers_survive_pickling(tokenizer):
    for each in (tokenizer, OpenClipTokenizer()):
        assert torch.equal(pickle.loads(pickle.dumps(each))(["red apple"]), each(["red apple"]))


def test_a_missing_file_names_the_remedy(tmp_path):
    with pytest.raises(UserError, match="contrastive tokenizer"):
        CorpusTokenizer(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="not a tokenizers file"):
        CorpusTokenizer(tmp_path / "broken.json")
