"""Existing tar shards as a source."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from contrastive.shards.index import ShardIndex
from contrastive.shards.record import NumberedSource, Record, Rejected, SkippedRow
from contrastive.shards.scan import ignored_reason


class ShardSource(NumberedSource):
    """The pairs of existing tar shards, in order."""

    kind = "shards"

    def __init__(self, index: ShardIndex) -> None:
        self.index, self.columns = index, []

    @property
    def rejected(self) -> Mapping[str, int]:
        if self.limit is not None:
            return self.left_out
        ignored = {ignored_reason(kind): count for kind, count in self.index.manifest["ignored"].items()}
        return Counter(self.index.rejected) + Counter(ignored) + Counter(self.left_out)

    def rejections(self) -> Iterator[SkippedRow]:
        for one in self.index.manifest["rejected"] if self.limit is None else ():
            yield SkippedRow(one["key"], one["reason"], place=one["shard"])

    @property
    def notes(self) -> list[str]:
        return self.index.notes

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "fingerprint": self.index.fingerprint, "limit": self.limit}

    def _record(self, i: int) -> Record:
        try:
            return self.index.record(i)
        except Rejected as rejected:
            return Record(self.index.key(i), None, fault=rejected.reason, detail=rejected.detail)

    def _count(self) -> int:
        return len(self.index)
