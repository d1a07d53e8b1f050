"""Make data/pictograms/shards/{train,val} from the Parquet files in this folder.

python data/pictograms/prepare.py
"""

from pathlib import Path

from contrastive.shards import open_source, write_shards

HERE = Path(__file__).resolve().parent


def main() -> None:
    for split in ("train", "val"):
        table, shards = HERE / f"{split}.parquet", HERE / "shards" / split
        manifest = shards / "manifest.json"
        if manifest.exists() and manifest.stat().st_mtime >= table.stat().st_mtime:
            print(f"{shards}: up to date")
            continue
        written = write_shards(open_source(table), shards, overwrite=True)
        print(f"{shards}: {written.pairs:,} pairs in {len(written.shards)} shards")


if __name__ == "__main__":
    main()
