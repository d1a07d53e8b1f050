"""Fuzzing of the shard parser and indexer: any bytes are indexed or refused, without a crash, a hang or much memory.

    python benchmarks/fuzz_index.py                 ten minutes; 256 MiB of memory and 5 s an input are the limits
    python benchmarks/fuzz_index.py --minutes 1 --corpus tests/faults/shards/corpus

Needs atheris (the extra `dev`). It starts from a few small tars and from what is in the corpus folder, to which it adds
the smallest inputs that reached new code; `tests/faults/shards/test_fuzzed.py` replays that folder. An input that
breaks a rule is written to crash-*, timeout-* or oom-* in the current folder, and the exit code is not 0.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

LIMITS = ["-rss_limit_mb=256", "-malloc_limit_mb=256", "-timeout=5", "-max_len=20480"]
KEPT = 120  # of what it found, the smallest inputs
CORPUS = Path(__file__).resolve().parent.parent / "tests" / "faults" / "shards" / "corpus"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_args()
    if arguments.child:
        fuzz(rest)
        return
    with tempfile.TemporaryDirectory() as found, tempfile.TemporaryDirectory() as start:
        for name, data in starts().items():
            Path(start, name).write_bytes(data)
        seconds = round(60 * arguments.minutes)
        command = [sys.executable, __file__, "--child", *LIMITS, f"-max_total_time={seconds}", "-print_final_stats=1"]
        arguments.corpus.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([*command, found, start, str(arguments.corpus)])
        for path in sorted(Path(found).iterdir(), key=lambda path: path.stat().st_size)[:KEPT]:
            shutil.copy(path, arguments.corpus)
    sys.exit(done.returncode)


def fuzz(options: list[str]) -> None:
    """Feed the indexer until the time is over."""
    import atheris

    import contrastive

    # The room's front door imports torch, whose memory would hide the parser's.
    room = types.ModuleType("contrastive.shards")
    room.__path__ = [str(Path(contrastive.__path__[0]) / "shards")]
    sys.modules["contrastive.shards"] = room
    with atheris.instrument_imports(include=["contrastive.shards.tar", "contrastive.shards.scan"]):
        from contrastive.shards.scan import scan_shard
        from contrastive.shards.tar import DamagedShard
    path = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)) / "x.tar"

    def one(data: bytes) -> None:
        path.write_bytes(with_checksums(data))
        try:
            scan = scan_shard(path)
        except DamagedShard:
            return
        for row in scan.rows:  # what an index is made of lies inside of the file
            assert all(0 <= at and at + size <= len(data) for at, size in zip(row.offsets, row.sizes, strict=True))

    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def with_checksums(data: bytes) -> bytes:
    """The bytes with a good checksum in every block that claims to be a header, else none gets past the first test.

    A header whose first byte is 255 keeps its checksum, so that bad ones are tried too.
    """
    blocks = bytearray(data)
    for at in range(0, len(blocks) - 511, 512):
        header = blocks[at : at + 512]
        if header[257:262] == b"ustar" and header[0] != 255:
            header[148:156] = b" " * 8
            blocks[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    return bytes(blocks)


def starts() -> dict[str, bytes]:
    """Small tars of every kind that the parser knows."""
    png = b"\x89PNG\r\n\x1a\n" + bytes(20)
    pair = {"a.png": png, "a.txt": b"a caption", "a.json": json.dumps({"captions": ["b"]}).encode()}
    found = {}
    for name, kind in (("ustar", tarfile.USTAR_FORMAT), ("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        long = {"n" * 120 + ".png": png, "n" * 120 + ".txt": b"long"} if name != "ustar" else {}
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
            folder = tarfile.TarInfo("sub")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for file, data in {**pair, **long, "b.cls": b"1"}.items():
                member = tarfile.TarInfo(file)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        found[name] = buffer.getvalue().rstrip(b"\0") + bytes(1536)
    return found


if __name__ == "__main__":
    main()
