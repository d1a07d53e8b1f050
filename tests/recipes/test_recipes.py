"""Every recipe that comes along can be read, and says how to run it."""

from pathlib import Path

import pytest

from contrastive.config import dump_yaml, load_config
from contrastive.config.shipped import find_recipes

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "launch")  # read by other programs


def test_there_are_recipes_and_all_of_them_are_shipped():
    assert RECIPES
    assert sorted(find_recipes().values()) == RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_recipe_reads_and_resolves(path, tmp_path):
    config = load_config(path)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(dump_yaml(config))
    assert load_config(resolved) == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_header_says_how_to_run_it(path):
    header = path.read_text().partition("\nrun:")[0]
    assert all(line.startswith("#") or not line for line in header.splitlines())
    assert f"contrastive train {path.relative_to(FOLDER.parent).as_posix()}" in header
