"""The reasons why rows are skipped, as sentences with a remedy."""

from __future__ import annotations

from collections.abc import Mapping

from contrastive.shards.filters import Filters
from contrastive.shards.folder import ImageFolder
from contrastive.shards.json_sets import captions_files
from contrastive.shards.left_out import left_out_line
from contrastive.shards.record import SkippedRow, Source

# Reason: what such rows do, and the remedy.
REMEDIES: dict[str, tuple[str, str]] = {
    "path outside the table's folder": ("name a file outside the table's folder", "--allow-outside reads them"),
    "no such file": (
        "name a file that does not exist",
        "paths are relative to the table's folder: move the table, or put the files there",
    ),
    "file cannot be opened": ("name a file that cannot be opened", "change its permissions"),
    "a folder, not a file": ("name a folder, not a file", "give the paths of image files"),
    "URL, not a file (download the images with img2dataset)": (
        "hold a URL, not a file",
        "download the images with img2dataset, and make shards of its folder",
    ),
    "a list of images, not one": ("hold a list of images, not one", "write a row for each image"),
    "image is neither bytes nor a path": (
        "hold no image but another value",
        "name the column of the image with --image",
    ),
    "caption is a list written as text that cannot be read": (
        "have a list as caption that cannot be read",
        'write it as JSON, like ["a cat", "a dog"]',
    ),
    "path outside the folder of images": ("name a file outside the folder of images", "--allow-outside reads them"),
    "not a regular file": ("name something that is not a regular file", "give the paths of image files"),
    "image too large": ("have an image file that is too large", "shrink the files first"),
    "unknown image format": (
        "hold no image in a known format",
        "give JPEG, PNG, WebP, GIF, BMP or TIFF files, and check with --image that the column is the right one",
    ),
    "text too long": ("have captions that are too long", "name the column of a shorter text with --caption"),
    "caption not UTF-8": ("have a caption that is not UTF-8", "save the captions as UTF-8"),
    "caption of several images": (
        "share a caption file with other images of the same name",
        "rename the images, and give each a .txt file of its own name",
    ),
    "caption in several files": ("have several caption files", "keep one .txt file for each image"),
    "key too long": ("have a key that is too long", "drop or rename the column 'key' to have the rows numbered"),
    "score too low": ("score below --clip-score", "lower its minimum, or take another model"),
    "too many pixels": ("have an image with too many pixels", "shrink the images first"),
    "truncated or damaged": ("have a truncated or damaged image", "copy or download the images again"),
    "animated": ("have an animated image", "save one frame of each"),
}
_LIMITS = {
    "image too small": "are below --min-size {min_size}",
    "image too elongated": "are above --max-aspect {max_aspect:g}",
    "caption too short": "have captions below --min-caption {min_caption}",
    "caption too long": "have captions above --max-caption {max_caption}",
}


def hint(reason: str) -> str:
    """The remedy for rows that were skipped while others were not; "" where the reason says enough."""
    return REMEDIES[reason][1] if reason.startswith("path outside ") else ""


def nothing_to_write(
    skipped: Mapping[str, int], examples: Mapping[str, SkippedRow], source: Source, filters: Filters
) -> str:
    """The error for a source without any pair: causes with an example and a remedy each, the commonest first.

    Args:
        skipped: counts of the rows by reason.
        examples: one row of each reason.
        source: the source of the rows; columns and what it left out itself are named.
        filters: the limits to name.
    """
    total = sum(skipped.values())
    causes = []
    for reason, count in sorted(skipped.items(), key=lambda one: (-one[1], one[0])):
        what, remedy = _sentence(reason, source, filters)
        who = (
            f"{count:,} of {total:,} rows" if count < total else f"all {total:,} rows" if total > 1 else "the only row"
        )
        what = _of_one(what) if count == 1 else what
        causes.append(f"{who} {what}{_example(examples.get(reason))}{remedy and '; '}{remedy}")
    if line := left_out_line(source.rejected):
        causes.append(line)
    return f"nothing to write: {'; '.join(causes) or _no_rows(source)}"


def _of_one(what: str) -> str:
    """A sentence about rows, about one row: "name a file" becomes "names a file"."""
    verb, _, rest = what.partition(" ")
    one = {"have": "has", "are": "is", "were": "was"}.get(verb, f"{verb}s")
    return f"{one} {rest}"


def _sentence(reason: str, source: Source, filters: Filters) -> tuple[str, str]:
    if reason in _LIMITS:
        return _LIMITS[reason].format(**vars(filters)), "change this limit"
    if reason == "no caption":
        return _no_caption(source)
    if reason == "no such file" and source.kind == "json":
        return REMEDIES[reason][0], "name the folder of the images with --images"
    if reason == "no image":
        column = getattr(source, "image_column", None)
        what = f"have no image in column '{column}'" if column else "have no image"
        return what, f"name another column with --image; columns: {', '.join(source.columns)}" if column else ""
    return REMEDIES.get(reason, (f"were skipped, reason: {reason}", ""))


def _no_caption(source: Source) -> tuple[str, str]:
    if source.columns:
        columns = f"columns: {', '.join(source.columns)}"
        column = getattr(source, "caption_column", None)
        if column:
            return f"have no caption in column '{column}'", f"name another column with --caption; {columns}"
        return "have no caption, as no column looks like one", f"name the column with --caption; {columns}"
    if isinstance(source, ImageFolder) and (sets := captions_files(source.root)):
        named = " or ".join(f"contrastive shard {file} DEST" for file in sets)
        return f"have no caption of their own, but {sets[0].name} holds captions", f"give it by name: {named}"
    if getattr(source, "labelled", False):
        return (
            "have a class folder and no caption",
            "shards need captions; `contrastive probe` and `contrastive evaluate` read a folder of classes as it is",
        )
    if source.kind == "images":
        return "have no caption", "write the caption of cat.jpg into cat.txt in the same folder"
    return "have no caption", ""


def _example(row: SkippedRow | None) -> str:
    shown = [part for part in (row.detail or row.key, row.place) if part] if row else []
    return f" (such as {', '.join(shown)})" if shown else ""


def _no_rows(source: Source) -> str:
    return f"{source.files[0] if len(source.files) == 1 else 'the source'} has no rows"
