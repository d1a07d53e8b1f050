"""How a rank gets at the captions of the others: all at once, or one block at a time that travels in a ring.

A tiled loss goes over the captions once or twice (`read`, then `write`), and in the second round adds to each block the
gradient that this rank owes to it. Only caption features travel; images stay where they are.

Legend: n rows of this rank, W ranks, B = W * n, D feature width, F width of fixed features that travel along.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from contrastive.losses.gather import GlobalBatch, all_gather, reduce_scatter
from contrastive.losses.waiting import exchanging

# Above this many bytes of gathered features "auto" turns to the ring, which holds W times less and sends half as much
# again.
GATHER_AT_MOST = 1 << 30


@dataclass
class Block:
    """Captions of some rows of the global batch, from row `first` on."""

    first: int
    text_mD: Tensor
    fixed_mF: Tensor | None
    grad_mD: Tensor | None = None


class Gathered:
    """All captions as one block; on one process they are its own."""

    def __init__(self, batch: GlobalBatch, fixed_nF: Tensor | None) -> None:
        self.batch = batch
        self.block = Block(0, batch.text_nD, fixed_nF)
        if batch.world > 1:
            self.block.text_mD = all_gather(batch.text_nD, batch.group)
            self.block.fixed_mF = None if fixed_nF is None else all_gather(fixed_nF, batch.group)

    def read(self) -> Iterator[Block]:
        yield self.block

    def write(self) -> Iterator[Block]:
        self.block.grad_mD = torch.zeros_like(self.block.text_mD)
        yield self.block

    def gradient(self) -> Tensor:
        """`(n, D)`: the sum over ranks of what `write` collected for this rank's captions."""
        assert self.block.grad_mD is not None
        if self.batch.world == 1:
            return self.block.grad_mD
        return reduce_scatter(self.block.grad_mD, self.batch.group)


class Ring:
    """One block that travels from rank to rank: after step k, rank r holds the captions of rank r + k.

    Memory: this rank's captions, the block at hand and the one that is arriving, whatever the number of ranks.
    """

    def __init__(self, batch: GlobalBatch, fixed_nF: Tensor | None) -> None:
        self.batch, self.width = batch, batch.text_nD.shape[1]
        self.travelling = batch.text_nD if fixed_nF is None else torch.cat([batch.text_nD, fixed_nF], dim=1)
        self.travelling = self.travelling.contiguous()
        self.grad_nD: Tensor | None = None

    def read(self) -> Iterator[Block]:
        return self._blocks(with_gradient=False)

    def write(self) -> Iterator[Block]:
        return self._blocks(with_gradient=True)

    def _blocks(self, *, with_gradient: bool) -> Iterator[Block]:
        world, n = self.batch.world, self.travelling.shape[0]
        here, grad_nD = self.travelling, torch.zeros_like(self.batch.text_nD) if with_gradient else None
        for step in range(world):
            arriving: Tensor | None = None
            requests: list[dist.Work] = []
            if step + 1 < world:  # the next block comes in while this one is worked on
                arriving, requests = self._pass_on(here)
            text_mD, fixed_mF = here[:, : self.width], here[:, self.width :] if here.shape[1] > self.width else None
            yield Block((self.batch.rank + step) % world * n, text_mD, fixed_mF, grad_nD)
            if grad_nD is not None:  # leaves when it is complete, W - 1 times with its block and once to go home
                grad_nD, waiting = self._pass_on(grad_nD)
                requests += waiting
            with exchanging():  # what the work on the block did not cover
                for request in requests:
                    request.wait()
            here = here if arriving is None else arriving
        self.grad_nD = grad_nD

    def _pass_on(self, block: Tensor) -> tuple[Tensor, list[dist.Work]]:
        """Start sending `block` to the rank before this one, and receiving that of the rank behind it."""
        group, world, rank = self.batch.group, self.batch.world, self.batch.rank
        before, behind = (rank - 1) % world, (rank + 1) % world
        if group is not None:
            before, behind = dist.get_global_rank(group, before), dist.get_global_rank(group, behind)
        arriving = torch.empty_like(block)
        send = dist.P2POp(dist.isend, block, before, group)
        receive = dist.P2POp(dist.irecv, arriving, behind, group)
        return arriving, dist.batch_isend_irecv([send, receive])

    def gradient(self) -> Tensor:
        """`(n, D)`: the sum over ranks of what `write` collected for this rank's captions."""
        assert self.grad_nD is not None
        return self.grad_nD


def open_exchange(batch: GlobalBatch, fixed_nF: Tensor | None, exchange: str) -> Gathered | Ring:
    """The exchange of that name; "auto" gathers what is not too large (see `GATHER_AT_MOST`)."""
    gathered_bytes = batch.size * batch.text_nD.shape[1] * batch.text_nD.element_size()
    if batch.world > 1 and (exchange == "ring" or (exchange == "auto" and gathered_bytes > GATHER_AT_MOST)):
        return Ring(batch, fixed_nF)
    return Gathered(batch, fixed_nF)
