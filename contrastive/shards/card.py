"""The data card: what a set of shards is like, in numbers that can be measured.

Its last part follows the six dimensions in which modalities differ (Liang, Zadeh and Morency 2022, "Foundations and
Trends in Multimodal Machine Learning", section 2.1), each reduced to a number or two for images and for captions.
"""

import functools
import hashlib
import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from contrastive.shards.decode import decode_image, image_size
from contrastive.shards.index import ShardIndex
from contrastive.shards.record import Rejected, image_extension
from contrastive.shards.scan import ignored_reason

LOOK_AT = 20_000  # pairs whose bytes are looked at; of a larger set, evenly spread ones
DECODE = 2_000  # of which are decoded, to small thumbnails
THUMBNAIL = 8
CountTokens = Callable[[list[str]], Sequence[int]]


def data_card(index: ShardIndex, *, context: int, count_tokens: CountTokens | None = None) -> dict[str, Any]:
    """What there is to say about a set, as JSON; shares are of 1.

    context: tokens that a text tower takes. count_tokens: how many a caption has, with its marks of start and end;
        None: estimated as words and punctuation marks, plus two.
    """
    looked_at = np.unique(np.linspace(0, len(index) - 1, min(len(index), LOOK_AT)).astype(int)).tolist()
    captions = [index.caption(i) for i in looked_at]
    images = _images(index, looked_at)
    words = [_words(caption) for caption in captions]
    tokens = [len(w) + 2 for w in words] if count_tokens is None else list(count_tokens(captions))
    found = len(index) + sum(index.rejected.values())
    same_image = images["hashes"]
    ids = index.ids[looked_at]
    both = np.stack([ids, same_image], axis=1)
    return {
        "pairs": len(index),
        "shards": len(index.shards),
        "bytes": sum(shard["bytes"] for shard in index.manifest["shards"]),
        "fingerprint": index.fingerprint,
        "rejected": index.rejected,
        "rejected_share": sum(index.rejected.values()) / found,
        "damaged_shards": index.manifest["damaged"],
        "ignored_members": index.manifest["ignored"],
        "looked_at": len(looked_at),
        "images": {
            "formats": dict(Counter(images["formats"]).most_common()),
            "width": _quantiles(images["widths"]),
            "height": _quantiles(images["heights"]),
            "bytes": _quantiles(index.sizes[:, 0]),
            "unreadable": dict(images["unreadable"]),
            "repeated": index.repeated_images,
            "repeated_share": index.repeated_images / len(index),
        },
        "captions": {
            "words": _quantiles([len(w) for w in words]),
            "characters": _quantiles([len(caption) for caption in captions]),
            "tokens": _quantiles(tokens),
            "tokens_counted": count_tokens is not None,
            "context": context,
            "truncated_share": float(np.mean(np.asarray(tokens) > context)),
            "repeated_share": 1 - len(np.unique(index.ids)) / len(index),
            "scripts": dict(Counter(map(script, captions)).most_common()),
        },
        "modalities": {
            "element": {
                "pixels an image, median": float(np.median(images["pixels"])) if images["pixels"] else 0.0,
                "words a caption, median": float(np.median([len(w) for w in words])),
                "different words": len({word for w in words for word in w}),
            },
            "distribution": {
                "entropy of words, bits": _entropy(Counter(word for w in words for word in w)),
                "entropy of grey values in 64 steps, bits": _entropy(images["greys"]),
            },
            "structure": {
                "correlation of neighbouring pixels": images["neighbours"],
                "entropy of a word after the one before it, bits": _conditional_entropy(words),
            },
            "information": {
                "bits a pixel, as stored": images["bits_a_pixel"],
                "bits a character, deflated": 8 * len(zlib.compress("\n".join(captions).encode(), 9))
                / max(1, sum(map(len, captions))),
            },
            "noise": {
                "rejected or unreadable": sum(index.rejected.values()) / found
                + sum(images["unreadable"].values()) / len(looked_at),
                "pairs that repeat both halves": 1 - len(np.unique(both, axis=0)) / len(looked_at),
            },
            "relevance": {"images of one caption are closer than others, AUC": _relevance(images, ids)},
        },
    }  # fmt: skip


def format_card(card: dict[str, Any], name: str) -> str:
    """The card as text for a terminal."""
    rows = card_rows(card)
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join([name, *(f"  {label:<{width}}{text}" for label, text in rows)])


def card_rows(card: dict[str, Any]) -> list[tuple[str, str]]:
    """The card as labels and what they say; a label that starts with spaces belongs to the one above."""
    images, captions = card["images"], card["captions"]
    how = "" if captions["tokens_counted"] else ", estimated from words"
    rows = [
        ("pairs", f"{card['pairs']:,} in {card['shards']:,} shards, {card['bytes'] / 1e6:,.1f} MB"),
        ("fingerprint", card["fingerprint"]),
        ("rejected", _counts(card["rejected"]) + (f" ({card['rejected_share']:.2%})" if card["rejected"] else "")),
    ]
    rows += [("shard left out", f"{shard}: {what}") for shard, what in card["damaged_shards"].items()]
    if card["ignored_members"]:
        ignored = _counts({ignored_reason(kind): count for kind, count in card["ignored_members"].items()})
        dotted = any("." in kind for kind in card["ignored_members"])
        rows.append(("ignored", ignored + (" (a key ends at the first dot of its name)" if dotted else "")))
    if card["looked_at"] < card["pairs"]:
        rows.append(("looked at", f"{card['looked_at']:,} pairs, evenly spread; the rows below describe these"))
    rows += [
        ("images", _counts(images["formats"])),
        ("  width", _span(images["width"], "px")),
        ("  height", _span(images["height"], "px")),
        ("  size", _span(images["bytes"], "bytes")),
        ("  repeated", f"{images['repeated']:,} ({images['repeated_share']:.1%}) are the image of an earlier pair"),
        ("  unreadable", _counts(images["unreadable"])),
        ("captions", _counts(captions["scripts"])),
        ("  words", _span(captions["words"])),
        ("  characters", _span(captions["characters"])),
        (f"  tokens{how}", _span(captions["tokens"])),
        ("  truncated", f"{captions['truncated_share']:.2%} have more than {captions['context']} tokens"),
        ("  repeated", f"{captions['repeated_share']:.1%} are the caption of an earlier pair"),
        ("modalities", "(Liang, Zadeh and Morency 2022)"),
    ]
    for axis, numbers in card["modalities"].items():
        shown = "; ".join(f"{what} {'unknown' if v is None else f'{v:,.4g}'}" for what, v in numbers.items())
        rows.append((f"  {axis}", shown))
    return rows


def script(text: str) -> str:
    """The writing system of most letters ("latin", "cyrillic", "cjk", …), by their names in Unicode; "none" of none."""
    found = Counter(name for name in map(_script_of, text) if name)
    return found.most_common(1)[0][0] if found else "none"


@functools.lru_cache(maxsize=1 << 16)
def _script_of(character: str) -> str:
    if not character.isalpha():
        return ""
    return unicodedata.name(character, "unknown").split()[0].split("-")[0].lower()


def _images(index: ShardIndex, numbers: list[int]) -> dict[str, Any]:
    """What the images are like: all by their headers, some by their pixels."""
    formats, widths, heights, hashes, pixels = [], [], [], [], []
    unreadable: Counter[str] = Counter()
    thumbnails, owners, neighbours, greys = [], [], [], Counter[int]()
    bits = 0
    decoded = set(np.linspace(0, len(numbers) - 1, min(len(numbers), DECODE)).astype(int).tolist())
    for place, i in enumerate(numbers):
        data = index.image(i)
        hashes.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True))
        formats.append(image_extension(data) or "unknown")
        try:
            width, height = image_size(data)
            widths.append(width)
            heights.append(height)
            pixels.append(width * height)
            bits += 8 * len(data)
            if place in decoded:
                grey = np.asarray(decode_image(data).convert("L"), np.float64)
                small = Image.fromarray(grey.astype(np.uint8)).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
                thumbnails.append(np.asarray(small, np.float64).ravel())
                owners.append(place)
                greys.update(dict(enumerate(np.bincount(grey.astype(int).ravel() // 4, minlength=64).tolist())))
                if grey.shape[1] > 1 and grey.std() > 0:
                    left, right = grey[:, :-1].ravel(), grey[:, 1:].ravel()
                    if left.std() > 0 and right.std() > 0:
                        neighbours.append(float(np.corrcoef(left, right)[0, 1]))
        except Rejected as fault:
            unreadable[fault.reason] += 1
        except Exception:  # Pillow's plugins raise of many kinds
            unreadable["not an image"] += 1
    return {
        "formats": formats, "widths": widths, "heights": heights, "pixels": pixels, "unreadable": unreadable,
        "hashes": np.array(hashes, np.int64), "greys": greys, "thumbnails": np.array(thumbnails), "owners": owners,
        "neighbours": float(np.mean(neighbours)) if neighbours else None,
        "bits_a_pixel": bits / max(1, sum(pixels)),
    }  # fmt: skip


def _relevance(images: dict[str, Any], ids: np.ndarray) -> float | None:
    """How often two images of one caption are closer, as thumbnails, than two of different ones; 0.5: as if by chance.

    None with fewer than 50 pairs of images that share a caption: then it cannot be told without a model.
    """
    if len(images["owners"]) < 2:
        return None
    own = ids[images["owners"]]
    order = np.argsort(own, kind="stable")
    same = order[:-1][own[order][1:] == own[order][:-1]], order[1:][own[order][1:] == own[order][:-1]]
    if len(same[0]) < 50:
        return None
    rng = np.random.default_rng(0)
    first, second = rng.integers(len(own), size=(2, 20_000))
    other = own[first] != own[second]
    if not other.any():
        return None
    thumbnails = images["thumbnails"]

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray(np.square(thumbnails[a] - thumbnails[b]).sum(axis=1))

    close, far = distances(*same), np.sort(distances(first[other], second[other]))
    below, upto = np.searchsorted(far, close, "left"), np.searchsorted(far, close, "right")
    return float(1 - ((below + upto) / 2).mean() / len(far))


def _words(caption: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", caption.casefold())


def _quantiles(values: Iterable[float]) -> dict[str, float]:
    array = np.asarray(list(values) if not isinstance(values, np.ndarray) else values)
    if not len(array):
        return {}
    low, middle, high = np.quantile(array, [0.05, 0.5, 0.95]).tolist()
    return {"least": float(array.min()), "5%": low, "median": middle, "95%": high, "most": float(array.max())}


def _entropy(counts: Counter[Any]) -> float:
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values() if n) if total else 0.0


def _conditional_entropy(sentences: list[list[str]]) -> float:
    """Bits of a word given the one before it, over neighbours inside captions."""
    pairs = Counter(pair for words in sentences for pair in pairwise(words))
    firsts: Counter[str] = Counter()
    for (first, _), count in pairs.items():
        firsts[first] += count
    return max(0.0, _entropy(pairs) - _entropy(firsts))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none"


def _span(quantiles: dict[str, float], unit: str = "") -> str:
    if not quantiles:
        return "none"
    if quantiles["least"] == quantiles["most"]:
        return f"all {quantiles['most']:,.0f} {unit}".rstrip()
    return (
        f"median {quantiles['median']:,.0f}, 90% from {quantiles['5%']:,.0f} to {quantiles['95%']:,.0f}, "
        f"all from {quantiles['least']:,.0f} to {quantiles['most']:,.0f} {unit}"
    ).rstrip()
