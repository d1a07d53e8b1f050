"""Records in memory as a source, and shards made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from contrastive.shards.index import PathLike
from contrastive.shards.making import make_shards
from contrastive.shards.record import NumberedSource, Record, Source
from contrastive.shards.write import Manifest


class MemorySource(NumberedSource):
    """Records that are in memory."""

    kind = "records"

    def __init__(self, records: Iterable[Record]) -> None:
        self.records, self.columns, self.files = list(records), [], []

    def identity(self) -> dict[str, Any]:
        digest = hashlib.blake2b(digest_size=16)
        for record in self.records:
            digest.update(repr(record).encode("utf-8", "surrogatepass"))
        return {"kind": self.kind, "digest": digest.hexdigest(), "limit": self.limit}

    def _record(self, i: int) -> Record:
        return self.records[i]

    def _count(self) -> int:
        return len(self.records)


def write_shards(
    records: Iterable[Record], dest: PathLike, *, samples_per_shard: int = 1000, overwrite: bool = False
) -> Manifest:
    """Make shards of the records of a source, or of any others, which are held in memory. See `make_shards`."""
    source = records if isinstance(records, Source) else MemorySource(records)
    return make_shards(source, dest, samples_per_shard=samples_per_shard, overwrite=overwrite)
