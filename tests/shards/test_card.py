"""The data card against what the tests put in."""

import io
import json
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contrastive.cli import main
from contrastive.shards import Record, ShardIndex
from contrastive.shards.card import data_card, format_card, script
from contrastive.shards.contact_sheet import write_contact_sheet
from tests.faults.shards.tars import image, pairs, write_tar

from .conftest import encoded, records

Shards = Callable[..., ShardIndex]


def test_counts_lengths_and_repetitions(shards: Shards) -> None:
    captions = ("one", "one", "two words", "three of them", "four words, a mark")
    index = shards([Record(str(i), encoded(i // 2), (caption,)) for i, caption in enumerate(captions)])
    card = data_card(index, context=4)
    assert (card["pairs"], card["rejected_share"]) == (5, 0)
    assert card["captions"]["words"]["most"] == 5  # the comma is one
    assert card["captions"]["repeated_share"] == pytest.approx(1 / 5)
    assert card["images"]["repeated_share"] == pytest.approx(2 / 5)
    assert card["captions"]["truncated_share"] == pytest.approx(2 / 5)  # with start and end: 5 and 7 tokens
    assert card["captions"]["tokens_counted"] is False


def test_tokens_are_counted_by_a_tokenizer_where_one_is_given(shards: Shards) -> None:
    card = data_card(shards(records(4)), context=10, count_tokens=lambda captions: [11, 10, 11, 3])
    assert card["captions"]["truncated_share"] == 0.5
    assert card["captions"]["tokens_counted"] is True


def test_entropies_are_those_of_the_words(shards: Shards) -> None:
    captions = ("a b", "a c", "a b", "a c")
    card = data_card(shards([Record(str(i), encoded(i), (c,)) for i, c in enumerate(captions)]), context=77)
    assert card["modalities"]["distribution"]["entropy of words, bits"] == pytest.approx(1.5)
    assert card["modalities"]["structure"]["entropy of a word after the one before it, bits"] == pytest.approx(1.0)


def test_relevance_is_one_for_captions_that_name_the_image_and_a_half_for_captions_at_random(shards: Shards) -> None:
    rng = np.random.default_rng(0)
    kinds = rng.integers(4, size=240)

    def picture(kind: int) -> bytes:
        buffer = io.BytesIO()
        noise = rng.integers(8, size=(16, 16, 3)) + 60 * kind
        Image.fromarray(noise.astype(np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    def relevance(captions: np.ndarray, name: str) -> float:
        items = [Record(str(i), picture(int(kinds[i])), (f"kind {captions[i]}",)) for i in range(len(kinds))]
        axes = data_card(shards(items, name), context=77)["modalities"]["relevance"]
        return float(next(iter(axes.values())))

    assert relevance(kinds, "named") > 0.99
    assert relevance(rng.permutation(kinds), "random") == pytest.approx(0.5, abs=0.15)


def test_relevance_is_not_told_where_no_caption_repeats(shards: Shards) -> None:
    card = data_card(shards(records(6)), context=77)
    assert list(card["modalities"]["relevance"].values()) == [None]
    assert "unknown" in format_card(card, "x")


@pytest.mark.parametrize(
    ("text", "name"), [("a cat", "latin"), ("кот", "cyrillic"), ("猫です", "hiragana"), ("猫", "cjk"), ("12!", "none")]
)
def test_scripts(text: str, name: str) -> None:
    assert script(text) == name


def test_images_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [*pairs(2), ("bad.png", image()[:45]), ("bad.txt", b"cut off")])
    assert main(["check", str(tmp_path), "--json", str(tmp_path / "card.json")]) == 0
    card = json.loads((tmp_path / "card.json").read_text())
    assert sum(card["images"]["unreadable"].values()) == 1
    assert math.isclose(card["modalities"]["noise"]["rejected or unreadable"], 1 / 3)


def test_a_page_takes_nothing_from_the_shards_for_markup(tmp_path: Path, shards: Shards) -> None:
    evil = "<script>alert(1)</script> & <b>"
    index = shards([Record("k", encoded(), (evil,)), *records(2)])
    page = write_contact_sheet(tmp_path / "p.html", index, data_card(index, context=77), evil).read_text()
    assert "<script" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;" in page


def test_check_prints_the_card_and_writes_the_page(
    tmp_path: Path, shards: Shards, capsys: pytest.CaptureFixture[str]
) -> None:
    index = shards(records(5))
    assert main(["check", str(tmp_path / "shards"), "--html", str(tmp_path / "page.html"), "--full"]) == 0
    said = capsys.readouterr()
    assert said.err == "all bytes of 2 shards are those that were indexed (sha256)\n"
    shown = said.out
    assert index.fingerprint in shown and "5 in 2 shards" in shown
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img ") >= 5
    assert f"<dd>{index.fingerprint}</dd>" in page


def test_a_page_for_a_folder_that_is_not_there_is_one_line_and_makes_none(
    tmp_path: Path, shards: Shards, capsys: pytest.CaptureFixture[str]
) -> None:
    shards(records(5))
    assert main(["check", str(tmp_path / "shards"), "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_check_says_why_members_with_a_dot_in_their_name_are_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "x.tar", [*pairs(3), ("a.b.mp3", b"x")])
    assert main(["check", str(tmp_path)]) == 0
    assert "1 .b.mp3 (a key ends at the first dot of its name)" in " ".join(capsys.readouterr().out.split())


def test_a_shard_that_changes_while_it_is_looked_at_is_one_line_and_exit_code_2(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = shards(records(5))
    monkeypatch.setattr("contrastive.shards.open_index", lambda *_, **__: index)
    index.shards[0].write_bytes(b"another")
    assert main(["check", str(tmp_path / "shards")]) == 2
    assert capsys.readouterr().err.endswith("shard changed since indexing; run the check again\n")


def test_check_of_a_damaged_shard_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tar(tmp_path / "x.tar", pairs(5))
    path.write_bytes(path.read_bytes()[:5000])
    assert main(["check", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    write_tar(tmp_path / "y.tar", pairs(3, first=10))
    assert main(["check", str(tmp_path), "--skip-damaged"]) == 0
    assert "shard left out x.tar: the file is cut off" in " ".join(capsys.readouterr().out.split())


def test_an_image_that_is_too_large_is_called_so(shards: Shards) -> None:
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)  # no pixels follow
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    huge = b"\x89PNG\r\n\x1a\n" + b"".join(body)
    index = shards([Record("a", encoded(), ("one",)), Record("b", huge, ("two",))])
    assert "too many pixels" in format_card(data_card(index, context=77), "x")
