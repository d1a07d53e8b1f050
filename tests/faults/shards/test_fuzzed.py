"""What fuzzing found worth keeping (`benchmarks/fuzz_index.py`): every input is indexed or refused, soon."""

import time
from pathlib import Path

import pytest

from contrastive.shards.scan import scan_shard
from contrastive.shards.tar import DamagedShard

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())


def test_there_is_a_corpus() -> None:
    assert len(CORPUS) >= 20


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name[:12])
def test_any_bytes_are_indexed_or_refused(path: Path) -> None:
    started = time.monotonic()
    try:
        scan = scan_shard(path)
    except DamagedShard as fault:
        assert "at byte" in str(fault)
    else:
        length = path.stat().st_size
        for row in scan.rows:
            assert all(0 <= at and at + size <= length for at, size in zip(row.offsets, row.sizes, strict=True))
    assert time.monotonic() - started < 30
