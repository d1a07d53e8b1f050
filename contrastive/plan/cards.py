"""GPUs by name: what their makers' data sheets promise. Dense products; a "with sparsity" figure is halved.

Sources, all by NVIDIA: "H100 Tensor Core GPU" (SXM), "H200 Tensor Core GPU" (SXM), "A100 Tensor Core GPU" (SXM),
"L40S", "Tesla V100" (SXM2), "DGX B200" (a machine of eight, divided by eight), and "Ada GPU Architecture" (white paper,
appendix: GeForce RTX 4090, 16-bit products that are summed up in float32).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from contrastive.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """One device.

    peak: dense TFLOP/s of matrix products by precision, "bf16", "fp16", "tf32", "fp32"; what it cannot do is missing.
    memory: GiB. (A card sold with 80 GB shows 79.6 to 80 GiB: makers count memory in powers of two.)
    bandwidth: of its memory, GB/s.
    link: to the other cards of its machine, GB/s in one direction: NVLink, or PCIe where there is none.
    """

    name: str
    peak: Mapping[str, float]
    memory: float
    bandwidth: float
    link: float


def _card(name: str, half: float, tf32: float, fp32: float, memory: float, bandwidth: float, link: float) -> Card:
    return Card(name, {"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32}, memory, bandwidth, link)


CARDS = {
    card.name: card
    for card in (
        _card("h100", 989.5, 494.7, 67.0, 80, 3350, 450),
        _card("h200", 989.5, 494.7, 67.0, 141, 4800, 450),
        _card("b200", 2250.0, 1125.0, 75.0, 180, 8000, 900),
        _card("a100-80", 312.0, 156.0, 19.5, 80, 2039, 300),
        _card("a100-40", 312.0, 156.0, 19.5, 40, 1555, 300),
        _card("l40s", 362.0, 183.0, 91.6, 48, 864, 32),
        _card("rtx4090", 165.2, 82.6, 82.6, 24, 1008, 32),
        Card("v100", {"fp16": 125.0, "fp32": 15.7}, 32, 900, 150),  # no bf16, no TF32
    )
}
HERE = "here"  # not a card: the machine that the plan is made on


def find_card(name: str) -> Card:
    """The card of that name, in any case.

    Raises UserError for a name that is not in the table.
    """
    card = CARDS.get(name.lower())
    if card is None:
        close = difflib.get_close_matches(name.lower(), CARDS, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise UserError(f"--gpu {name}: unknown; {hint}known: {', '.join([*CARDS, HERE])}")
    return card
