"""The metadata of Hugging Face's imagefolder layout: metadata.csv, .jsonl or .parquet, with a column file_name."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from contrastive.errors import UserError
from contrastive.shards.listing import TABLES, Listing, unread_reason
from contrastive.shards.record import Segment


def metadata_tables(found: Listing) -> list[Path]:
    """The metadata tables of a folder of images; [] where it has none.

    Raises UserError: tables of several kinds, or caption files in the same folder.
    """
    tables = [table for table in found.tables if table.stem.lower() == "metadata"]
    if len({TABLES[table.suffix[1:].lower()] for table in tables}) > 1:
        raise UserError(f"{tables[0].parent}: holds {tables[0].name} and {tables[-1].name}; give one of them by name")
    stems = {(image.parent, image.stem.casefold()) for image in found.images} if tables else set()
    if any((text.parent, text.stem.casefold()) in stems for text in found.texts):
        raise UserError(
            f"{tables[0]}: the folder holds .txt captions too; give the table by name, or move it out of the folder"
        )
    return tables


def count_unnamed(source: Any, found: Listing) -> Counter[str]:
    """Counts of the images and files below a folder that its metadata does not name, by reason."""
    named = set()
    for number, table in enumerate(source.files):
        for _, row in source._rows(Segment(number, 0, sys.maxsize), [source.image_column]):
            value = row.get(source.image_column)
            if isinstance(value, str):
                named.add(os.path.normpath(os.path.join(table.parent, value.strip())))
    unnamed = sum(os.path.normpath(image) not in named for image in found.images)
    counts = Counter({f"image that {source.files[0].name} does not name": unnamed})
    others = [table for table in found.tables if table not in source.files]
    return +counts + Counter(map(unread_reason, [*found.others, *others]))
