"""Prompt templates: what stands around a label when a text tower reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from contrastive.errors import UserError

NONE = ("{}",)
# A few plain wordings for any kind of picture. Averaging the embeddings of several prompts is from Radford et
# al. 2021 (CLIP), section 3.1.4; the wording is this project's.
SHORT = (
    "{}",
    "a picture of {}",
    "a photo of a {}.",
    "a drawing of a {}.",
    "an icon of a {}.",
    "a close view of a {}.",
)
BUILT_IN = {"none": NONE, "short": SHORT}


def read_templates(spec: str | Path | Sequence[str] | None) -> tuple[str, ...]:
    """Templates from a built-in name (`none`, `short`), a list, or a text file with one template a line.

    None means `none`: the bare label. Raises `UserError` for an unknown name or file, and for a template
    without `{}`. In a file, empty lines and lines that start with `#` are skipped.
    """
    if spec is None:
        return NONE
    if isinstance(spec, (str, Path)):
        if str(spec) in BUILT_IN:
            return BUILT_IN[str(spec)]
        if isinstance(spec, str) and "{}" in spec:
            return (spec,)
        path = Path(spec)
        if not path.is_file():
            raise UserError(f"templates: '{spec}' is neither a file nor one of {', '.join(BUILT_IN)}")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"templates: {path} is not UTF-8; save it as UTF-8") from None
        templates = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
        where = f"templates in {path}"
    else:
        templates, where = tuple(spec), "templates"
    if not templates:
        raise UserError(f"{where}: there is none; use none or short, or give one with {{}} where the label goes")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"{where}: '{template}' has no {{}} to put the label in")
    return templates
