"""Memory, seconds and traffic of a step, from what was counted on the model. Pure arithmetic: bytes, FLOPs, seconds.

Legend: n rows of one process, c rows of a chunk, W processes, P parameters, L of them learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from contrastive.plan import losses
from contrastive.plan.cards import GIB, Card
from contrastive.plan.losses import LossTerm


@dataclass(frozen=True)
class Linear:
    """A cost of n samples: ``once + each * n``."""

    each: float
    once: float = 0.0

    def at(self, n: float) -> float:
        return self.once + self.each * n


def through(n1: int, cost1: float, n2: int, cost2: float) -> Linear:
    """The line through the costs of two batches; what it gives for none is no less than 0."""
    each = (cost2 - cost1) / (n2 - n1)
    return Linear(each, max(0.0, cost1 - each * n1))


@dataclass(frozen=True)
class Tower:
    """What was counted on one tower, its projection among it.

    parameters, learned: numbers. forward, backward: FLOPs of matrix products and convolutions; a forward that is done
    again in backward (gradient checkpointing) belongs to backward. forward_bytes, backward_bytes: read and written by
    the other operations. saved: bytes held from forward to backward. peak: the most bytes that were alive at once.
    """

    name: str
    parameters: int
    learned: int
    forward: Linear
    backward: Linear
    forward_bytes: Linear
    backward_bytes: Linear
    saved: Linear
    peak: Linear


@dataclass(frozen=True)
class Network:
    """Both towers and what a sample of a batch takes: pixels as bytes, tokens as int64."""

    towers: tuple[Tower, ...]
    further: int  # learned parameters beside the towers: scale and bias
    buffers: int  # bytes
    dim: int
    input_bytes: int

    @property
    def parameters(self) -> int:
        return sum(tower.parameters for tower in self.towers) + self.further

    @property
    def learned(self) -> int:
        return sum(tower.learned for tower in self.towers) + self.further


@dataclass(frozen=True)
class Assumptions:
    """What nothing here can measure; each has an option on the command line.

    utilisation: share of the card's peak that products reach. memory_utilisation, link_utilisation: of its memory's and
    the links' bandwidth. overlap: share of the last backward behind which the gradients' all-reduce hides.
    per_node: cards of a machine. link: between them, network: of one card to other machines; GB/s, one direction.
    reserve: GiB for the CUDA context, libraries and fragmentation.
    """

    utilisation: float
    memory_utilisation: float
    link_utilisation: float
    overlap: float
    per_node: int
    link: float
    network: float
    reserve: float


# ---- GradCache


@dataclass(frozen=True)
class Passes:
    """How a batch goes through the towers: rows at once, rows forward in all, and calls of the model."""

    rows: int
    forward_rows: int
    calls: int
    backward_calls: int


def passes(n: int, chunk: int | None) -> Passes:
    """K chunks cost 2K - 1 forwards: the last one keeps its graph (contrastive/training/caching.py)."""
    if chunk is None or chunk >= n:
        return Passes(n, n, 1, 1)
    count = -(-n // chunk)
    last = n - (count - 1) * chunk
    return Passes(chunk, 2 * n - last, 2 * count - 1, count)


# ---- communication


def ring_all_reduce(size: float, world: int) -> float:
    """Bytes that each rank of a ring sends, and receives, to sum up `size` bytes: 2 (W - 1) / W times them."""
    return 2 * (world - 1) / world * size


def collective_bandwidth(world: int, assumed: Assumptions) -> float:
    """Bytes a second of a ring through all cards: within a machine that of a link; between machines all network
    adapters of a machine carry it together, if the links inside are no slower."""
    if world <= assumed.per_node:
        return assumed.link * 1e9
    return min(assumed.link, assumed.network * assumed.per_node) * 1e9


def neighbour_bandwidth(world: int, assumed: Assumptions) -> float:
    """Bytes a second from one card to the next: between machines one adapter carries it."""
    return (assumed.link if world <= assumed.per_node else min(assumed.link, assumed.network)) * 1e9


# ---- memory


@dataclass(frozen=True)
class Job:
    """What is to be run on each of `world` processes."""

    network: Network
    terms: tuple[LossTerm, ...]
    rows: int
    world: int
    chunk: int | None = None
    samples: int | None = None  # of the data set, if known


def memory_parts(job: Job, reserve: float) -> dict[str, float]:
    """Bytes of one device by part. Their sum is an upper bound: gradients grow while activations go."""
    network, rows = job.network, passes(job.rows, job.chunk).rows
    saved = [tower.saved for tower in network.towers]
    working = [max(0.0, tower.peak.at(rows) - tower.saved.at(rows)) for tower in network.towers]
    features = 4.0 * job.rows * network.dim
    return {
        "weights": 4.0 * network.parameters + network.buffers,
        "gradients": 4.0 * network.learned,
        "optimizer moments": 8.0 * network.learned,  # AdamW: two float32
        "16-bit copies of weights": sum(line.once for line in saved),
        "activations": sum(line.each * rows for line in saved),
        "working memory of a tower": max(working),
        "the batch": float(network.input_bytes * rows),
        "loss": sum(losses.memory(term, job.rows, job.world, network.dim, job.samples) for term in job.terms)
        + 6 * features,  # both towers' features, their gradients, and the loss's before it hands them on
        "reserve": reserve * GIB,
    }


def largest_chunk(job: Job, reserve: float, capacity: float) -> int | None:
    """The largest `train.chunk`, a power of two below the rows of a process, with which the job fits."""
    chunk = 1 << (job.rows - 1).bit_length() - 1 if job.rows > 1 else 0
    while chunk:
        smaller = Job(job.network, job.terms, job.rows, job.world, chunk, job.samples)
        if sum(memory_parts(smaller, reserve).values()) <= capacity:
            return chunk
        chunk //= 2
    return None


def fewest_devices(job: Job, reserve: float, capacity: float) -> int | None:
    """The fewest processes, a multiple of those planned that divides the batch, on which the job fits."""
    batch = job.rows * job.world
    for world in range(2 * job.world, batch + 1, job.world):
        if batch % world == 0:
            wider = Job(job.network, job.terms, batch // world, world, job.chunk, job.samples)
            if sum(memory_parts(wider, reserve).values()) <= capacity:
                return world
    return None


# ---- time


@dataclass(frozen=True)
class Step:
    """A step of one device: FLOPs, bytes and seconds by part; the parts follow one another."""

    tower_flops: float
    tower_bytes: float
    loss_flops: float
    loss_bytes: float
    optimizer_bytes: float
    gradient_traffic: float
    loss_traffic: float
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.seconds, key=lambda part: self.seconds[part])


def step(job: Job, card: Card, precision: str, assumed: Assumptions) -> Step:
    """A roofline: products at a share of the card's peak, the other operations at a share of its memory's bandwidth.

    Losses compute in float32 whatever `precision`, which is one that `card.peak` has.
    """
    network, world, way = job.network, job.world, passes(job.rows, job.chunk)
    forward = way.forward_rows / way.calls  # rows of a call, on average
    backward = job.rows / way.backward_calls

    def towers(ahead: str, back: str) -> tuple[float, float]:
        return (
            way.calls * sum(getattr(tower, ahead).at(forward) for tower in network.towers),
            way.backward_calls * sum(getattr(tower, back).at(backward) for tower in network.towers),
        )

    flops_forward, flops_backward = towers("forward", "backward")
    bytes_forward, bytes_backward = towers("forward_bytes", "backward_bytes")
    shape = (job.rows, world, network.dim)
    loss_flops = sum(losses.flops(term, *shape) for term in job.terms)
    loss_bytes = sum(losses.moved(term, *shape) for term in job.terms)
    # clipping reads the gradient twice and writes it once; AdamW reads weight, gradient, two moments and writes three
    optimizer_bytes = 40.0 * network.learned
    gradient_traffic = ring_all_reduce(4.0 * network.learned, world)
    of_terms = [losses.traffic(term, *shape) for term in job.terms]

    rate = 1e12 * assumed.utilisation
    bandwidth = 1e9 * card.bandwidth * assumed.memory_utilisation
    collective = collective_bandwidth(world, assumed) * assumed.link_utilisation
    neighbour = neighbour_bandwidth(world, assumed) * assumed.link_utilisation
    last_backward = (flops_backward / (card.peak[precision] * rate) + bytes_backward / bandwidth) / way.backward_calls
    ring = [losses.rings(term, *shape) for term in job.terms]
    seconds = {
        "towers, products": (flops_forward + flops_backward) / (card.peak[precision] * rate),
        "towers, memory": (bytes_forward + bytes_backward) / bandwidth,
        "loss, products": loss_flops / (card.peak["fp32"] * rate),
        "loss, memory": loss_bytes / bandwidth,
        "optimizer, memory": optimizer_bytes / bandwidth,
        "gradients, all-reduce": max(0.0, gradient_traffic / collective - assumed.overlap * last_backward),
        "loss, exchange": sum(
            size / (neighbour if in_ring else collective) for size, in_ring in zip(of_terms, ring, strict=True)
        ),
    }
    return Step(
        flops_forward + flops_backward, bytes_forward + bytes_backward, loss_flops, loss_bytes, optimizer_bytes,
        gradient_traffic, sum(of_terms), seconds,
    )  # fmt: skip


def flops_a_sample(towers: Sequence[Tower], rows: int) -> tuple[float, float]:
    """Forward, and forward and backward, of a batch of `rows`, without the forwards that GradCache adds."""
    forward = sum(tower.forward.at(rows) for tower in towers) / rows
    return forward, forward + sum(tower.backward.at(rows) for tower in towers) / rows
