"""Where the bytes of a shard lie."""

from pathlib import Path


def local_path(shard: str | Path) -> Path:
    """A local file that holds the bytes of `shard`, a path (or a URL, which is copied to a cache first)."""
    return Path(shard)
