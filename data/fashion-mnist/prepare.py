"""Make data/fashion-mnist/shards/{train,test} from the Parquet files here, with captions made of labels.

    python data/fashion-mnist/prepare.py

Evaluation reads the Parquet files as they are; shards are for those who want to train on these pairs.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from contrastive.shards import Record, open_source, write_shards

HERE = Path(__file__).resolve().parent


def captioned(table: Path) -> Iterator[Record]:
    """The records of a table, each with a caption made of its label."""
    for record in open_source(table):
        article = "an" if str(record.label)[0] in "aeiou" else "a"
        yield dataclasses.replace(record, captions=(f"a photo of {article} {record.label}",))


def main() -> None:
    for split in ("train", "test"):
        table, shards = HERE / f"{split}.parquet", HERE / "shards" / split
        manifest = shards / "manifest.json"
        if manifest.exists() and manifest.stat().st_mtime >= table.stat().st_mtime:
            print(f"{shards}: up to date")
            continue
        written = write_shards(captioned(table), shards, overwrite=True)
        print(f"{shards}: {written.pairs:,} pairs in {len(written.shards)} shards")


if __name__ == "__main__":
    main()
