"""Keys that occur in several shards."""

from collections import Counter

from contrastive.shards.scan import Scan


def unique_keys(shards: list[str], scans: list[Scan]) -> tuple[list[dict[str, str]], int]:
    """Make the keys of pairs unique in all shards. Returns what is left out of each shard, and how many keys changed.

    shards: their names. scans: one a shard, whose rows are changed.
    Of pairs with one key, image and caption in several shards the first stays. Pairs with one key and other content
    get the name of their shard before it, but for the first: two runs of img2dataset count from 0.
    """
    rejected = []
    renamed = 0
    seen: dict[str, tuple[int, int]] = {}
    names = _unique_names([shard.removesuffix(".tar") for shard in shards])
    for shard, name, scan in zip(shards, names, scans, strict=True):
        kept, repeated = [], []
        for row in scan.rows:
            content = (row.caption_id, row.image_id)
            if seen.get(row.key, content) != content:
                renamed += 1
                row = row._replace(key=f"{name}/{row.key}")
            if row.key in seen:
                repeated.append((row.key, "duplicate key"))
            else:
                seen[row.key] = content
                kept.append(row)
        rejected += [{"shard": shard, "key": key, "reason": why} for key, why in [*scan.rejected, *repeated]]
        scan.rows = kept
    return rejected, renamed


def _unique_names(names: list[str]) -> list[str]:
    """The names, with a number after each that occurred before: shards of several folders may share theirs."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return found
