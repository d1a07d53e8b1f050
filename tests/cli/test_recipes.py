"""`contrastive recipes`."""

import pytest

from contrastive.cli import main
from contrastive.config.shipped import find_recipes


def test_list_names_every_recipe_and_its_purpose(capsys):
    assert main(["recipes", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(find_recipes())
    assert all(len(line.split()) > 2 for line in lines)


@pytest.mark.parametrize("name", ["pretrain/pictograms", "pictograms", "pretrain/pictograms.yaml"])
def test_copy_takes_the_full_or_the_last_name(name, tmp_path, capsys):
    assert main(["recipes", "copy", name, str(tmp_path)]) == 0
    copied = tmp_path / "pictograms.yaml"
    assert copied.read_bytes() == find_recipes()["pretrain/pictograms"].read_bytes()
    assert capsys.readouterr().out.strip() == str(copied)


def test_copy_goes_here_unless_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", "pictograms"]) == 0
    assert (tmp_path / "pictograms.yaml").exists()


def test_copy_makes_the_folder_of_a_new_name(tmp_path):
    assert main(["recipes", "copy", "pictograms", str(tmp_path / "new/mine.yaml")]) == 0
    assert (tmp_path / "new/mine.yaml").exists()


def test_copy_overwrites_nothing(tmp_path, capsys):
    mine = tmp_path / "pictograms.yaml"
    mine.write_text("precious")
    assert main(["recipes", "copy", "pictograms", str(tmp_path)]) == 2
    assert mine.read_text() == "precious"
    assert capsys.readouterr().err == f"error: {mine} is already there; name another file\n"


def test_an_unknown_recipe_suggests_the_nearest(capsys):
    assert main(["recipes", "copy", "pictogram"]) == 2
    assert capsys.readouterr().err == "error: recipe 'pictogram': unknown. Did you mean 'pictograms'?\n"
