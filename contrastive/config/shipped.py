"""The recipes that come along."""

from __future__ import annotations

from pathlib import Path


def find_recipes() -> dict[str, Path]:
    """Name to file, the name being the path below the recipes' folder without `.yaml`."""
    package = Path(__file__).resolve().parents[1]
    # A wheel carries the recipes inside the package; in a checkout they stand beside it.
    folder = package / "_recipes" if (package / "_recipes").is_dir() else package.parent / "recipes"
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    return {name: path for name, path in names.items() if not name.startswith("launch/")}  # those are for schedulers
