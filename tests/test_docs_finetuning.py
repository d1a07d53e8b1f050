"""The recipes and commands of docs/finetuning.md are ones that can be given."""

import re
import shlex
from pathlib import Path

import pytest

from contrastive.cli import main
from contrastive.config import load_config

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "finetuning.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_every_block_of_the_page_is_part_of_a_recipe(block, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"data: {{train: a}}\ntrain: {{steps: 9}}\n{block}")
    assert load_config(tmp_path / "mine.yaml").model.kind == "folder"


def test_every_command_of_the_page_runs(tmp_path, monkeypatch, capsys):
    from contrastive.models import (
        CorpusTokenizer,
        TimmImageTower,
        TransformerTextTower,
        TwoTower,
        save_model,
        train_tokenizer,
    )
    from tests.tiny import write_corpus

    tokenizer = CorpusTokenizer(train_tokenizer(["red square"] * 3, vocab_size=300), context=8)
    image = TimmImageTower("resnet18", 16, 32, kwargs={"channels": (8, 8, 16, 16), "layers": (1, 1, 1, 1)})
    text = TransformerTextTower(tokenizer.vocab_size, 16, 8, width=16, depth=0, pad_id=tokenizer.pad_id)
    model = TwoTower(image, text, tokenizer, 16)
    for name in ("pictograms", "fashion-wise"):
        save_model(model, tmp_path / "runs" / name / "model")
    shards = write_corpus(tmp_path / "corpus") / "shards"
    (tmp_path / "data" / "fashion-mnist").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(re.findall(r"```\n(contrastive.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ").splitlines()
    assert len(lines) == 2
    for line in lines:
        words = [str(shards) if word.startswith("data/") else word for word in shlex.split(line)[1:]]
        assert main(words) == 0, (line, capsys.readouterr().err)
