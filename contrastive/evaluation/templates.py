"""Prompt templates: what stands around a label when a text tower reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from contrastive.errors import UserError

NONE = ("{}",)
# A few plain wordings for any kind of picture. Averaging the embeddings of several prompts is from Radford et
# al. 2021 (CLIP), section 3.1.4; the wording is this project's.
GENERAL = (
    "{}",
    "a picture of {}",
    "a photo of a {}.",
    "a drawing of a {}.",
    "an icon of a {}.",
    "a close view of a {}.",
)
# The two ensembles that CLIP's authors give for ImageNet (github.com/openai/CLIP, notebooks/Prompt_Engineering_for_
# ImageNet.ipynb, MIT licence): what published zero-shot figures stand on. Wording and order are theirs.
OPENAI_80 = tuple(
    line.strip()
    for line in """
    a bad photo of a {}.
    a photo of many {}.
    a sculpture of a {}.
    a photo of the hard to see {}.
    a low resolution photo of the {}.
    a rendering of a {}.
    graffiti of a {}.
    a bad photo of the {}.
    a cropped photo of the {}.
    a tattoo of a {}.
    the embroidered {}.
    a photo of a hard to see {}.
    a bright photo of a {}.
    a photo of a clean {}.
    a photo of a dirty {}.
    a dark photo of the {}.
    a drawing of a {}.
    a photo of my {}.
    the plastic {}.
    a photo of the cool {}.
    a close-up photo of a {}.
    a black and white photo of the {}.
    a painting of the {}.
    a painting of a {}.
    a pixelated photo of the {}.
    a sculpture of the {}.
    a bright photo of the {}.
    a cropped photo of a {}.
    a plastic {}.
    a photo of the dirty {}.
    a jpeg corrupted photo of a {}.
    a blurry photo of the {}.
    a photo of the {}.
    a good photo of the {}.
    a rendering of the {}.
    a {} in a video game.
    a photo of one {}.
    a doodle of a {}.
    a close-up photo of the {}.
    a photo of a {}.
    the origami {}.
    the {} in a video game.
    a sketch of a {}.
    a doodle of the {}.
    a origami {}.
    a low resolution photo of a {}.
    the toy {}.
    a rendition of the {}.
    a photo of the clean {}.
    a photo of a large {}.
    a rendition of a {}.
    a photo of a nice {}.
    a photo of a weird {}.
    a blurry photo of a {}.
    a cartoon {}.
    art of a {}.
    a sketch of the {}.
    a embroidered {}.
    a pixelated photo of a {}.
    itap of the {}.
    a jpeg corrupted photo of the {}.
    a good photo of a {}.
    a plushie {}.
    a photo of the nice {}.
    a photo of the small {}.
    a photo of the weird {}.
    the cartoon {}.
    art of the {}.
    a drawing of the {}.
    a photo of the large {}.
    a black and white photo of a {}.
    the plushie {}.
    a dark photo of a {}.
    itap of a {}.
    graffiti of the {}.
    a toy {}.
    itap of my {}.
    a photo of a cool {}.
    a photo of a small {}.
    a tattoo of the {}.
    """.strip().splitlines()
)
OPENAI_7 = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
BUILT_IN = {"none": NONE, "short": GENERAL, "general": GENERAL, "openai7": OPENAI_7, "openai80": OPENAI_80}


def read_templates(spec: str | Path | Sequence[str] | None) -> tuple[str, ...]:
    """Templates from a built-in name, a list, or a text file with one template a line.

    Names: `none` (the bare label, also what None means), `general` (six for any kind of picture; `short` is the same),
    `openai7` and `openai80` (CLIP's for ImageNet). Raises `UserError` for an unknown name or file, and for a template
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
        raise UserError(f"{where}: there is none; use none or general, or give one with {{}} where the label goes")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"{where}: '{template}' has no {{}} to put the label in")
    return templates
