"""What a loss sends, computes and holds on one process in one step: the table of docs/losses.md as functions.

Legend: n rows of this process, W processes, B = W n, d dimensions of the embedding, T of a teacher's; 4 bytes a number.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of contrastive/losses: `AUTO_TILE_ELSEWHERE`, `KEEP_ALL_AT_MOST`, `KEEP_SOME` (tiled.py), `GATHER_AT_MOST`
# (exchange.py). Written again, since this file imports no torch; a test holds them together.
AUTO_TILE = 4096
KEEP_ALL_AT_MOST = 256 << 20
KEEP_SOME = 112 << 20
GATHER_AT_MOST = 1 << 30
PASSES = 6  # of a loss over the memory of a tile, each of which reads and writes it
IDS = 16  # bytes: a row's id and whether it is valid, int64 both
STATISTICS = 16  # bytes a row of the global batch, at most: two float32 sums over ranks


@dataclass(frozen=True)
class LossTerm:
    """One loss of a recipe.

    kind: as in a recipe. tile: side, "auto", or None for whole matrices. exchange: "auto", "gather" or "ring".
    sweeps: over the tiles: 1 for sums of terms of one logit each (siglip, margin's sum), else 2.
    fixed: width T of features without a gradient that travel with the captions (a teacher's; adaptive margins), or 0.
    """

    kind: str
    tile: int | str | None = "auto"
    exchange: str = "auto"
    sweeps: int = 2
    fixed: int = 0

    @property
    def plain(self) -> bool:
        """Whole matrices; a loss of the user's own is taken for one."""
        return self.tile is None or self.kind == "custom"


def rings(term: LossTerm, n: int, world: int, d: int) -> bool:
    """Whether captions travel in a ring rather than being gathered."""
    if world == 1 or term.plain or term.kind == "cyclip":
        return False
    return term.exchange == "ring" or (term.exchange == "auto" and 4 * world * n * d > GATHER_AT_MOST)


def traffic(term: LossTerm, n: int, world: int, d: int) -> float:
    """Bytes that a process receives in a step, as NCCL's collectives move them (tests/losses/test_traffic.py).

    What is of the order of B is counted at most: 8 bytes each for id and `valid`, 16 for statistics.
    """
    if world == 1:
        return 0.0
    small = IDS * (world - 1) * n
    if term.kind == "cyclip":
        return small + 96 * d**2 * (world - 1) / world  # three d x d matrices in float64, forward and backward
    small += STATISTICS * (world - 1) * n + (20 * (world - 1) * n if term.kind == "sogclr" else 0)
    if term.plain:
        return small + (world - 1) * n * (16 * d + 8 * term.fixed)
    if rings(term, n, world, d):
        captions = 3 * world - 2 if term.sweeps == 2 else 2 * world - 1
        return small + 4 * captions * n * d + 4 * term.sweeps * (world - 1) * n * term.fixed
    return small + 4 * (world - 1) * n * (2 * d + term.fixed)


def kept_share(term: LossTerm, n: int, world: int) -> float:
    """The share of the tiles that is kept from the first sweep to the second rather than computed again."""
    if term.sweeps != 2 or term.tile != "auto":
        return 0.0
    size = 4 * n * n * world * (2 if term.fixed else 1)
    return 1.0 if size <= KEEP_ALL_AT_MOST else KEEP_SOME / size


def flops(term: LossTerm, n: int, world: int, d: int) -> float:
    """Operations of the matrix products, forward and backward."""
    pairs = float(n) * n * world
    if term.kind == "cyclip":
        return 18.0 * n * d**2  # three products forward, six backward
    if term.plain:
        # both directions on each process: where there is one process, the other direction is a transpose
        return (6 if world == 1 or term.kind == "siglip" else 12) * pairs * d + 4 * pairs * term.fixed
    again = term.sweeps - 1 - kept_share(term, n, world) if term.sweeps == 2 else 0.0
    return (6 + 2 * again) * pairs * d + (2 + 2 * again) * pairs * term.fixed


def moved(term: LossTerm, n: int, world: int, d: int) -> float:
    """Bytes of memory read and written beside the products."""
    pairs = float(n) * n * world
    if term.kind == "cyclip":
        return 8.0 * 12 * d**2
    return 2 * 4 * PASSES * pairs * (2 if term.plain else 1)


def memory(term: LossTerm, n: int, world: int, d: int, samples: int | None = None) -> float:
    """Bytes held beside the features and their gradient.

    samples: the size of the data set, for a loss that keeps something for each sample.
    """
    b = n * world
    state = 8.0 * (samples or 0) if term.kind == "sogclr" else 0.0
    if term.kind == "cyclip":
        return 72.0 * d**2 + 40.0 * n * d
    if term.plain:
        return state + 24.0 * n * b + 16.0 * b * d
    side = AUTO_TILE if term.tile == "auto" else int(term.tile or 0)
    tiles = 2.0 * 4 * min(side, n) * min(side, b) * (2 if term.fixed else 1)
    kept = kept_share(term, n, world) * 4 * n * b * (2 if term.fixed else 1)
    if rings(term, n, world, d):
        others = 16.0 * n * d + (4.0 * n * (d + 4 * term.fixed) if term.fixed else 0)
    else:
        others = 4.0 * b * (2 * d + term.fixed) if world > 1 else 4.0 * n * d
    return state + tiles + kept + others
