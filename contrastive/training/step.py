"""One training step: both towers forward, the loss across all processes, backward, clip, optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from contrastive.training.caching import Output, cached_backward, check_chunkable
from contrastive.training.clock import Clock
from contrastive.training.hold import Hold
from contrastive.training.optimizer import set_learning_rate
from contrastive.training.sharding import average_scalars, clip_gradients, is_sharded

LossFunction = Callable[..., dict[str, Tensor]]


class TrainStep:
    """``step(batch, lr_factor) -> metrics``; metrics are 0-d tensors on the device, to be read when they are wanted.

    A step waits for the device once, to see whether the gradient is finite; a tiled softmax loss once more, to see
    whether its sums are.

    Args:
        model: the two-tower model as ``accelerator.prepare`` returned it. It is called as a whole: going through a
            tower of the unwrapped model would leave that tower's gradients unaveraged over processes.
        loss: follows the loss contract; its value is such that averaged gradients are those of the global loss.
        clip: largest gradient norm, or None.
        chunk: rows of a batch that go through the towers at once, see `cached_backward`; None for all.
        hold: of towers whose time has not come; None for none.
        clock: is told which phase of the step begins.
        before_update: called between backward and optimizer, by whom weights must not change earlier.

    A step whose gradient is not finite on some rank changes no weight on any; its "skipped" is 1.

    Raises:
        UserError: the model does not allow chunks, see `check_chunkable`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        loss: LossFunction,
        optimizer: Optimizer,
        *,
        clip: float | None,
        chunk: int | None = None,
        hold: Hold | None = None,
        clock: Clock | None = None,
        before_update: Callable[[], None] = lambda: None,
    ) -> None:
        self.accelerator, self.model, self.loss, self.optimizer, self.clip = (
            accelerator,
            model,
            loss,
            optimizer,
            clip,
        )
        self.chunk, self.hold, self.clock = chunk, hold, clock or Clock(accelerator.device)
        self.before_update = before_update
        self.two_tower: Any = accelerator.unwrap_model(model)
        if chunk is not None:
            check_chunkable(self.two_tower.train(), chunk)

    def __call__(self, batch: Any, lr_factor: float) -> dict[str, Tensor]:
        device, enter = self.accelerator.device, self.clock.enter
        set_learning_rate(self.optimizer, lr_factor)
        valid = None if bool(batch.valid.all()) and self.accelerator.num_processes == 1 else batch.valid.to(device)
        rest = {"ids": batch.ids.to(device), "valid": valid}
        rest |= {name: getattr(batch, name).to(device) for name in getattr(self.loss, "needs", ())}

        def loss(out: Output) -> dict[str, Tensor]:
            enter("loss")
            return self.loss(out["image"], out["text"], out["scale"], out["bias"], **rest)

        if self.chunk is None:
            pixels, tokens = batch.pixels.to(device), batch.tokens.to(device)
            enter("forward")
            metrics = loss(self.model(pixels, tokens))
            enter("backward")
            self.accelerator.backward(metrics["loss"])
        else:
            metrics = cached_backward(
                self.model, batch.pixels, batch.tokens, loss,
                chunk=self.chunk, backward=self.accelerator.backward, enter=enter,
            )  # fmt: skip
        enter("optimizer")
        if self.hold is not None:
            self.hold.drop_gradients()
        # the averaged gradients are the same on every rank, and so is their norm: what follows is decided alike
        if is_sharded(self.model):
            average_scalars(self.model)
            norm: Tensor | None = clip_gradients(self.model.parameters(), self.clip or math.inf)
        else:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip or math.inf)
        if norm is not None:
            metrics["gradient_norm"] = norm
        bad = norm is not None and not bool(norm.isfinite())
        self.before_update()
        # a gradient scaler skips by itself, and has to see the overflow to lower its scale
        if not bad or self.accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        metrics["skipped"] = torch.tensor(float(bad))
        self.two_tower.clamp_scale()
        enter("other")
        metrics["scale"] = self.two_tower.logit_scale.exp()
        return {key: value.detach() for key, value in metrics.items() if torch.is_tensor(value)}
