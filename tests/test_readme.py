"""Every command and the Python of the README run, in a folder laid out as the README supposes, on tiny data."""

import re
import shlex
import shutil
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from contrastive.cli import main
from tests.tiny import write_corpus, write_recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """The lines of the README's shell blocks that call `contrastive`, in order, comments cut."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [line.split(" #")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line.startswith("contrastive ") or " -m contrastive " in line]


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory) -> Path:
    """A trained run, photographs, a table of pairs and a small part of Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("readme")
    corpus = write_corpus(folder / "corpus")
    recipe = write_recipe(corpus, folder / "tiny.yaml")
    assert main(["train", str(recipe), f"run.dir={folder}/runs/pictograms"]) == 0
    (folder / "runs" / "mine").mkdir()
    shutil.copy(folder / "runs" / "pictograms" / "config.yaml", folder / "runs" / "mine" / "config.yaml")
    shutil.copytree(corpus / "images", folder / "photos", ignore=shutil.ignore_patterns("*.txt"))
    shutil.copy(corpus / "images" / "000.png", folder / "photo.png")
    (folder / "labels.txt").write_text("red square\nblue square\n")
    fashion = folder / "data" / "fashion-mnist"
    fashion.mkdir(parents=True)
    for split in ("train", "test"):
        table = parquet.read_table(ROOT / "data" / "fashion-mnist" / f"{split}.parquet")
        parquet.write_table(table.slice(0, 300), fashion / f"{split}.parquet")
    pairs = parquet.read_table(ROOT / "data" / "pictograms" / "val.parquet")
    for number, name in enumerate(("my-pairs", "my-held-out")):
        parquet.write_table(pairs.slice(20 * number, 20), folder / f"{name}.parquet")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    return folder


def test_the_readme_names_every_command_that_it_promises():
    used = {line.split()[1] for line in commands() if line.startswith("contrastive ")}
    assert used >= {"shard", "recipes", "train", "classify", "evaluate", "probe"}


def test_every_command_of_the_readme_runs(laid_out, monkeypatch, capsys):
    monkeypatch.chdir(laid_out)
    for line in commands():
        words = shlex.split(line.split("-m contrastive ")[-1] if "-m contrastive" in line else line)
        words = words[1:] if words[0] == "contrastive" else words
        if words[0] == "train":  # what it would train is seen elsewhere: here, that it is a recipe
            words.append("--print-config")
        if words[0] == "find":  # it would measure for minutes
            words = ["train", *words[2:], "--print-config"]
        assert main(words) == 0, (line, capsys.readouterr().err)


@pytest.mark.parametrize("source", blocks("python"))
def test_the_python_of_the_readme_runs(laid_out, monkeypatch, source):
    monkeypatch.chdir(laid_out)
    assert len([line for line in source.splitlines() if line.strip()]) <= 10  # "ten lines"
    exec(compile(source, "README.md", "exec"), {})
