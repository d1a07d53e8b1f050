"""``contrastive tokenizer``: from a corpus to a file that a recipe can name."""

from contrastive.cli import main
from contrastive.models import CorpusTokenizer
from tests.tiny import write_corpus


def test_a_tokenizer_is_trained_and_described(tmp_path, capsys):
    corpus = write_corpus(tmp_path)
    assert main(["tokenizer", str(corpus / "shards"), str(tmp_path / "new" / "t.json"), "--vocab-size", "300"]) == 0
    printed = capsys.readouterr().out
    tokenizer = CorpusTokenizer(tmp_path / "new" / "t.json")
    assert f"{tokenizer.vocab_size} tokens from 40 captions" in printed and "the longest has" in printed
    assert tokenizer(["red square 1"]).shape[0] == 1


def test_a_folder_without_captions_is_one_line(tmp_path, capsys):
    corpus = write_corpus(tmp_path)
    for file in (corpus / "images").glob("*.txt"):
        file.unlink()
    assert main(["tokenizer", str(corpus / "images"), str(tmp_path / "t.json")]) == 2
    assert "no captions" in capsys.readouterr().err
