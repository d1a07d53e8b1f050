"""How well is the order shuffled? Windows of K shards beside webdataset's buffer. No image is read.

    python benchmarks/shuffle.py

Two layouts: the shards of data/pictograms (its samples a shard, in the order of the files), and 1,000 shards of 1,000.
For each order, over pairs of successive epochs e and e + 1:

rank correlation: Spearman's, of a sample's place in epoch e with its place in e + 1. 0: nothing is left of it.
against the files: the same, of a sample's place in an epoch with its place in the shards.
neighbours: the mean distance in epoch e + 1 between samples that stood side by side in epoch e, as a share of the
    distance of two random places, (N + 1) / 3. 1: as far apart as in a perfect shuffle.
file neighbours: the same for samples that lie side by side in a shard. This is what a window or a buffer costs: they
    come back together, if not in the same order.

webdataset shuffles the list of shards (`shardshuffle`), then passes samples through a buffer of `bufsize` that starts
to give at `initial`; open_clip trains with 5,000 and 1,000. One worker, as with one stream of shards.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import webdataset as wds
from scipy.stats import spearmanr

from contrastive.shards.order import Order

HERE = Path(__file__).resolve().parent
EPOCHS = 4
SHARD_SAMPLES = 1000
PICTOGRAMS = HERE.parent / "data" / "pictograms" / "train.parquet"


def ours(starts: np.ndarray, window: int | None) -> Callable[[int], np.ndarray]:
    order, size = Order(starts, seed=0, window=window), int(starts[-1])
    return lambda epoch: order.at(epoch * size, (epoch + 1) * size)[1]


def webdataset(starts: np.ndarray, bufsize: int, initial: int) -> Callable[[int], np.ndarray]:
    def epoch_of(epoch: int) -> np.ndarray:
        random_shards = random.Random(epoch)
        shards = list(range(len(starts) - 1))
        random_shards.shuffle(shards)

        def samples() -> Iterator[int]:
            for shard in shards:
                yield from range(starts[shard], starts[shard + 1])

        if not bufsize:
            return np.fromiter(samples(), np.int64)
        shuffle = wds.shuffle(bufsize, initial=initial, rng=random.Random(1000 + epoch))
        return np.fromiter(shuffle(samples()), np.int64)

    return epoch_of


def measure(order: Callable[[int], np.ndarray], starts: np.ndarray) -> dict[str, float]:
    size = int(starts[-1])
    begun = time.perf_counter()
    epochs = [order(epoch) for epoch in range(EPOCHS)]
    seconds = (time.perf_counter() - begun) / EPOCHS
    places = []
    for samples in epochs:
        assert np.array_equal(np.sort(samples), np.arange(size))
        place = np.empty(size, np.int64)
        place[samples] = np.arange(size)
        places.append(place)
    random_distance = (size + 1) / 3
    inside = np.setdiff1d(np.arange(size - 1), starts[1:-1] - 1)  # a sample and the next one of the same shard
    pairs = list(zip(epochs, places[1:], strict=False))
    return {
        "rank_correlation": float(np.mean([spearmanr(a, b)[0] for a, b in zip(places, places[1:], strict=False)])),
        "against_the_files": float(np.mean([spearmanr(place, np.arange(size))[0] for place in places])),
        "neighbours": float(np.mean([np.abs(np.diff(after[before])).mean() for before, after in pairs]))
        / random_distance,
        "file_neighbours": float(np.mean([np.abs(place[inside + 1] - place[inside]).mean() for place in places]))
        / random_distance,
        "seconds_an_epoch": seconds,
    }


def main() -> None:
    import pyarrow.parquet

    pictograms = pyarrow.parquet.ParquetFile(PICTOGRAMS).metadata.num_rows
    layouts = {
        "pictograms": np.append(np.arange(0, pictograms, SHARD_SAMPLES), pictograms),
        "1,000 shards": np.arange(0, 1_000_001, SHARD_SAMPLES),
    }
    orders: dict[str, Callable[[np.ndarray], Callable[[int], np.ndarray]]] = {
        "window 1": lambda starts: ours(starts, 1),
        "window 4": lambda starts: ours(starts, 4),
        "window 16": lambda starts: ours(starts, 16),
        "window 32 (default)": lambda starts: ours(starts, 32),
        "all shards": lambda starts: ours(starts, None),
        "webdataset, no buffer": lambda starts: webdataset(starts, 0, 0),
        "webdataset, 5000/1000": lambda starts: webdataset(starts, 5000, 1000),
    }
    results: dict[str, dict[str, dict[str, float]]] = {}
    for layout, starts in layouts.items():
        print(f"\n{layout}: {starts[-1]:,} samples in {len(starts) - 1} shards, {EPOCHS} epochs")
        print(f"{'':24s}{'rank corr.':>12s}{'with files':>12s}{'neighbours':>12s}{'file neigh.':>12s}{'s/epoch':>9s}")
        results[layout] = {}
        for name, order in orders.items():
            row = results[layout][name] = measure(order(starts), starts)
            print(
                f"{name:24s}{row['rank_correlation']:12.4f}{row['against_the_files']:12.4f}{row['neighbours']:12.3f}"
                f"{row['file_neighbours']:12.4f}{row['seconds_an_epoch']:9.2f}",
                flush=True,
            )
    out = HERE / "results" / "shuffle.json"
    out.write_text(json.dumps({"epochs": EPOCHS, "webdataset": wds.__version__, "layouts": results}, indent=1) + "\n")
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
