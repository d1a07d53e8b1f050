"""The loss on a batch that is always the same, so that curves of different batch sizes can be compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contrastive.losses.gather import same_ids

ROWS = 64  # that go through the towers at once


class ProbeBatch:
    """``probe(two_tower) -> {"probe/loss", "probe/accuracy"}`` of one fixed batch of pairs.

    A training loss grows with the batch it is taken over (ln B for features that know nothing) and with augmentation;
    this one is taken over the same pairs in every run, without augmentation.

    Args:
        batch: see `contrastive.shards.batch.Batch`; rows that are not valid are left out.
    """

    def __init__(self, batch: Any) -> None:
        self.pixels, self.tokens = batch.pixels[batch.valid], batch.tokens[batch.valid]
        self.ids = batch.ids[batch.valid]

    def __call__(self, two_tower: nn.Module) -> dict[str, float]:
        """Neither random states nor statistics of batches move; the model is in training mode afterwards."""
        device = next(two_tower.parameters()).device
        chunks = []
        two_tower.eval()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            for pixels, tokens in zip(self.pixels.split(ROWS), self.tokens.split(ROWS), strict=True):
                # as a whole: called tower by tower it would not run in the precision of the run
                chunks.append(two_tower(pixels.to(device), tokens.to(device)))
            image, text = (torch.cat([chunk[key] for chunk in chunks]).float() for key in ("image", "text"))
            loss, accuracy = _infonce(chunks[0]["scale"].float() * image @ text.T, self.ids.to(device))
        two_tower.train()
        return {"probe/loss": float(loss), "probe/accuracy": float(accuracy)}


def _infonce(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of both directions: the loss, and the share of rows whose partner is ahead. A row's equals are left out.

    The loss is `contrastive.losses.infonce` with ``same_caption="ignore"``, which would be over all ranks.
    """
    same = same_ids(ids, ids).fill_diagonal_(False)
    logits = logits.masked_fill(same, -torch.inf)
    own = torch.arange(len(ids), device=ids.device)
    both = [logits, logits.T]
    loss = torch.stack([F.cross_entropy(side, own) for side in both]).mean()
    return loss, torch.stack([(side.argmax(dim=1) == own).float().mean() for side in both]).mean()
