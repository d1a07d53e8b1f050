"""Keys that are unique in the shards, where the keys of the source are not.

A key that occurs in several files gets the name of its file before it: "a-00000/000000012". Keys that differ only in
characters which a shard's key cannot hold ("a.b" and "a_b") get a hash after them: "a_b-5f1c0d3e". A key that occurs
twice in one file is the user's mistake. The name of a row depends on the keys of the whole source, and on nothing
else.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from contrastive.shards.record import IMAGE_EXTENSIONS
from contrastive.wording import counted

# A lone surrogate of JSON has no bytes; \udc80 to \udcff stand for bytes of a file name that are not UTF-8.
_UNSAFE = re.compile("[.\\\\\x00-\x1f\x7f\ud800-\udc7f\udd00-\udfff]")
PREFIX, MARK = 1, 2  # bits: the file's name before the key, a hash after it


def safe_key(key: str) -> str:
    """The key as a shard can hold it: without a dot, which would end it, and without a way out of the folder."""
    stem, dot, extension = key.rpartition(".")
    key = stem if dot and extension.lower() in IMAGE_EXTENSIONS else key
    return _UNSAFE.sub("_", key).strip("/") or "_"


def text_id(text: str, use: str = "") -> int:
    """A 64-bit signed hash of a text, another one for each `use`."""
    data = text.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(data, digest_size=8, person=use.encode()).digest()
    return int.from_bytes(digest, "little", signed=True)


def plain_id(key: str) -> int:
    """A hash of the key as the source gives it. Its lowest bit is 1 where a shard's key must be another."""
    return text_id(key, "plain") & ~1 | (safe_key(key) != key)


def changed_key(key: str, change: int, prefix: str) -> str:
    """The key of a row in the shards. change: bits of `key_changes`. prefix: the name of its file."""
    name = safe_key(key)
    if change & MARK:
        name += f"-{text_id(key) % 2**32:08x}"
    return f"{prefix}/{name}" if change & PREFIX else name


def has_repeats(ids: np.ndarray) -> bool:
    """Whether a number occurs twice in int64 (n,)."""
    return len(np.unique(ids)) < len(ids)


def repeats(ids: np.ndarray) -> Iterator[tuple[int, int]]:
    """Neighbours among the rows of int64 (n,) with the same number."""
    order = np.argsort(ids, kind="stable")
    for at in np.flatnonzero(ids[order][1:] == ids[order][:-1]):
        yield int(order[at]), int(order[at + 1])


def key_changes(safe: np.ndarray, plain: np.ndarray, file: np.ndarray) -> tuple[np.ndarray, tuple[int, int] | None]:
    """The changes that make keys unique, and two rows of one file that have the same key.

    Args:
        safe: int64 (n,), hashes of the keys as `safe_key` gives them.
        plain: int64 (n,), `plain_id` of the keys as the source gives them.
        file: int64 (n,), numbers of the files.

    Returns:
        uint8 (n,), bits PREFIX and MARK; and the first two rows of one file with the same key, or None.
    """
    changes = np.zeros(len(safe), np.uint8)
    _, group, size = np.unique(safe, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(size[group] > 1)  # only these need a look: most sources have none
    if not len(rows):
        return changes, None
    rows = rows[np.lexsort((rows, file[rows], plain[rows], safe[rows]))]
    same_safe = safe[rows][1:] == safe[rows][:-1]
    same_plain = same_safe & (plain[rows][1:] == plain[rows][:-1])
    clashes = np.flatnonzero(same_plain & (file[rows][1:] == file[rows][:-1]))
    if len(clashes):
        at = clashes[np.argmin(rows[clashes + 1])]
        return changes, (int(rows[at]), int(rows[at + 1]))
    several_files = np.append(same_plain, False) | np.insert(same_plain, 0, False)
    changes[rows[several_files]] |= PREFIX
    spelled = same_safe & ~same_plain  # two spellings meet, or, by chance, the hashes of two keys
    groups = np.unique(safe[rows][1:][spelled])
    marked = np.isin(safe[rows], groups) & (plain[rows] & 1 == 1)
    changes[rows[marked]] |= MARK
    return changes, None


def file_prefixes(files: Sequence[Path]) -> list[str]:
    """A name for each file that no other has: its stem, with as many folders before it as are needed."""
    stems = [(*file.absolute().parts[1:-1], file.name.partition(".")[0]) for file in files]
    depths = [1] * len(files)
    names = [_joined(stem, 1) for stem in stems]
    for _ in range(max(map(len, stems), default=0)):
        counts = Counter(names)
        if max(counts.values(), default=1) == 1:
            return names
        for number, (stem, name) in enumerate(zip(stems, names, strict=True)):
            if counts[name] > 1 and depths[number] < len(stem):
                depths[number] += 1
        names = [_joined(stem, depth) for stem, depth in zip(stems, depths, strict=True)]
    return [f"{name}-{number}" for number, name in enumerate(names)]  # one file that is named twice


def _joined(stem: tuple[str, ...], depth: int) -> str:
    return safe_key("/".join(stem[-depth:]))


def renamed_note(counts: Mapping[str, int], examples: Mapping[str, str]) -> list[str]:
    """Lines for the user about the keys that were changed. counts, examples: by "prefix" and "mark"."""
    texts = {
        "prefix": ("occur", "in several files: the file's name was put before"),
        "mark": ("differ", "only in characters that a shard's key cannot hold: a hash was put after"),
    }
    return [
        f"{counted(count, 'key')} {verb}{'s' * (count == 1)} {text} {'it' if count == 1 else 'them'}, "
        f"as in {examples[kind]}"
        for kind, (verb, text) in texts.items()
        if (count := counts.get(kind, 0))
    ]
