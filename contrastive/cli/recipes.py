"""`contrastive recipes list|copy`: the recipes that come along."""

from __future__ import annotations

import argparse
import difflib
import textwrap
from pathlib import Path

from contrastive.errors import UserError

NAME = "recipes"
HELP = "list the recipes that come along, or copy one to start from"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="list|copy", required=True)
    actions.add_parser("list", help="names and what they are for")
    copy = actions.add_parser("copy", help="copy a recipe to edit it")
    copy.add_argument("name", metavar="NAME", help="as `contrastive recipes list` shows it")
    copy.add_argument("dest", metavar="DEST", nargs="?", default=".", help="file or folder (default: here)")


def run(args: argparse.Namespace) -> int:
    if args.action == "copy":
        print(copy_recipe(args.name, Path(args.dest)))
        return 0
    from contrastive.config.shipped import find_recipes

    recipes = find_recipes()
    width = max(map(len, recipes)) + 2
    for name, path in recipes.items():
        print(f"{name:<{width}}{_purpose(path)}")
    return 0


def copy_recipe(name: str, dest: Path) -> Path:
    """Copy the recipe `name` (or the last part of its name) to a file, or into a folder; the path written.

    Raises `UserError` for an unknown name and for a file that is already there.
    """
    from contrastive.config.shipped import find_recipes

    recipes = find_recipes()
    name = name.removesuffix(".yaml")
    matches = [full for full in recipes if name in (full, full.split("/")[-1])]
    if len(matches) != 1:
        close = matches or difflib.get_close_matches(name, [*recipes, *(n.split("/")[-1] for n in recipes)], n=1)
        hint = f"Did you mean '{close[0]}'?" if close else f"Recipes: {', '.join(recipes)}"
        raise UserError(f"recipe '{name}': {'several have that name' if matches else 'unknown'}. {hint}")
    source = recipes[matches[0]]
    if dest.is_dir():
        dest = dest / source.name
    if dest.exists():
        raise UserError(f"{dest} is already there; name another file")
    dest.parent.mkdir(parents=True, exist_ok=True)
    dest.write_bytes(source.read_bytes())
    return dest


def _purpose(path: Path) -> str:
    """The first sentence of the header comment."""
    paragraph = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            break
        paragraph.append(text)
    return textwrap.shorten(" ".join(paragraph).split(". ")[0].rstrip("."), 84, placeholder=" …")
