"""Large batches in small memory: the gradient of a whole batch, with the activations of one chunk of it at a time.

GradCache (Gao et al. 2021, arXiv:2101.06983): the loss needs every pair's embeddings, but not every pair's
activations. Pass 1 embeds all chunks and forgets the activations; the loss gives the gradient of each embedding; pass 2
runs each chunk again and sends its embeddings' gradients down the towers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from contrastive.errors import UserError
from contrastive.training.randomness import random_state, restore_random_state
from contrastive.training.sharding import without_averaging

Output = dict[str, Any]  # the model's "image" and "text" (n, D), "scale" and "bias" 0-d; the bias may be None


def cached_backward(
    model: nn.Module,
    pixels: Tensor,
    tokens: Tensor,
    loss: Callable[[Output], dict[str, Tensor]],
    *,
    chunk: int,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    enter: Callable[[str], None] = lambda phase: None,
) -> dict[str, Tensor]:
    """Forward, loss and backward of one batch, of which `chunk` rows at a time go through `model`.

    The gradients are those of ``backward(loss(model(pixels, tokens))["loss"])``, to rounding; with dropout, those of
    the same chunks embedded one after another. A batch of K chunks costs 2K - 1 forwards, one call of the loss, and
    under DDP one averaging of the gradients; a batch of one chunk is the plain step. Random states end where one run
    through the chunks leaves them.

    Args:
        model: the two-tower model or DDP around it, fit for it by `check_chunkable`. Chunks go to its device one by
            one. Under DDP every rank must have the same number of chunks.
        loss: from the model's output, with the embeddings of all rows, to a dict with the 0-d ``"loss"``.
        backward: starts the loss's backward; ``accelerator.backward`` where a scaler takes part.
        enter: is called with "forward" or "backward" when that begins; `loss` can tell by itself.

    Returns:
        what `loss` returned.
    """
    device = next(model.parameters()).device

    def forward(rows: slice) -> Output:
        enter("forward")
        output: Output = model(pixels[rows].to(device), tokens[rows].to(device))
        return output

    *replayed, last = [slice(start, start + chunk) for start in range(0, len(tokens), chunk)]
    if not replayed:
        metrics = loss(forward(last))
        enter("backward")
        backward(metrics["loss"])
        return metrics

    # Only the very last backward may average gradients over ranks: DDP adds what no_sync kept back to it.
    no_sync = without_averaging(model)
    states, embedded = [], []
    with no_sync():
        for rows in replayed:
            states.append(random_state())
            with torch.no_grad():
                embedded.append(forward(rows))
        kept = forward(last)  # with its graph, which saves the second forward of this chunk
        leaves = _leaves([*embedded, kept])
        metrics = loss(leaves)
        enter("backward")
        backward(metrics["loss"])
        after = random_state()
        _push(kept, leaves, last)
        del kept  # the graph is spent; the next chunk's takes its memory
    for rows, state in zip(replayed, states, strict=True):
        final = rows is replayed[-1]
        with nullcontext() if final else no_sync():
            restore_random_state(state)  # the dropout masks of pass 1
            again = forward(rows)
            enter("backward")
            _push(again, leaves, rows, shared=final)
            del again  # the graph is spent
    restore_random_state(after)
    return metrics


def _leaves(chunks: list[Output]) -> Output:
    """The embeddings of all rows, the scale and the bias, cut off from the towers to collect their gradients."""
    last = chunks[-1]
    whole = last | {key: torch.cat([chunk[key] for chunk in chunks]) for key in ("image", "text")}
    # a frozen tower, or a scale that is not learned, gets no gradient here either
    return {
        key: None if value is None else value.detach().requires_grad_(last[key].requires_grad)
        for key, value in whole.items()
    }


def _push(chunk: Output, leaves: Output, rows: slice, *, shared: bool = False) -> None:
    """Send the gradients that the loss left at `rows` through the graph of `chunk`; `shared`: of scale and bias too."""
    gradients = {key: leaves[key].grad for key in ("image", "text")}
    gradients = {key: gradient[rows] for key, gradient in gradients.items() if gradient is not None}
    if shared:
        # what has none is left out: to autograd None, as the gradient of a 0-d tensor, means 1
        both = [key for key in ("scale", "bias") if leaves[key] is not None and leaves[key].grad is not None]
        gradients |= {key: leaves[key].grad for key in both}
    if gradients:
        torch.autograd.backward([chunk[key] for key in gradients], list(gradients.values()))


def check_chunkable(model: nn.Module, chunk: int) -> None:
    """Refuse a model, in the mode in which it will train, that would see a chunk where it should see the batch.

    Raises:
        UserError: a module takes its statistics from all rows of its input, as batch normalisation does.
    """
    for name, part in model.named_modules():
        if _mixes_rows(part):
            raise UserError(
                f"train.chunk: {chunk} does not go with {name} ({type(part).__name__}), which takes its statistics "
                "from all rows of a batch; set train.chunk to null, choose a tower with layer or group normalisation, "
                "or lock the tower"
            )


def _mixes_rows(part: nn.Module) -> bool:
    keeps_variance = getattr(part, "running_var", None) is not None
    if isinstance(part, _BatchNorm):
        return part.training or not keeps_variance
    # timm's EvoNorm-B and InplaceAbn are no _BatchNorm; the momentum tells them from statistics that are frozen
    return part.training and keeps_variance and hasattr(part, "momentum")
