"""Counting on a model that runs: parameters, FLOPs, bytes moved, bytes saved for backward, and the peak of live bytes.

A tower runs forward and backward on two batches; a line through both counts gives any batch. The tensors are torch's
fake ones where the tower allows it: they have shapes, types and storages, but no numbers, so that nothing is computed
and a large model takes seconds. Operations, and what autograd saves, are those of the CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from contrastive.plan.costs import Linear, Tower, through

# Samples. Fake ones cost nothing, and the peak of a small batch is that of the weights' gradients. Where real ones are
# needed they are few; batch normalisation wants more than one.
FAKE_BATCHES, REAL_BATCHES = (64, 128), (2, 4)
aten: Any = torch.ops.aten


@dataclass
class Counted:
    """Of one run: FLOPs of products and convolutions, bytes of the other operations, in bytes what is alive."""

    flops: float = 0.0
    moved: float = 0.0
    live: int = 0
    peak: int = 0


def _attention(query: Tensor, key: Tensor) -> float:
    """FLOPs of one of attention's two products; the mask is not made use of, as in torch's own counter."""
    return 2.0 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * query.shape[3]


# torch counts attention as CUDA runs it. The CPU's is the same algorithm: two products forward; five backward, since
# the scores are computed again.
_CPU_ATTENTION: dict[Any, Callable[..., float]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: 2 * _attention(q, k),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: 5 * _attention(q, k),
}


class Counter(TorchDispatchMode):
    """Sees every operation of forward and backward below autograd and autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counted()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        known = {id(x.untyped_storage()) for x in inputs}
        fresh = {id(s): s for s in (x.untyped_storage() for x in outputs) if id(s) not in known}
        for storage in fresh.values():
            self._born(storage)
        packet = func._overloadpacket
        if packet in _CPU_ATTENTION:
            self.counted.flops += _CPU_ATTENTION[packet](*args, **kwargs)
        elif packet in flop_registry:
            self.counted.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif fresh or func._schema.is_mutable:  # anything else is a view
            self.counted.moved += sum(map(_bytes, [*inputs, *outputs]))
        return out

    def _born(self, storage: Any) -> None:
        size, counted = storage.nbytes(), self.counted
        counted.live += size
        counted.peak = max(counted.peak, counted.live)

        def dies() -> None:
            counted.live -= size

        weakref.finalize(storage, dies)


def _bytes(x: Tensor) -> int:
    """Of memory: an expanded tensor has less than its shape says."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


@contextmanager
def cuda_precision() -> Iterator[None]:
    """Norms and softmax in float32 under autocast, as CUDA's autocast has them and the CPU's has not.

    A layer normalisation in front of each block then saves float32, which a count on the CPU would miss.
    """
    before = {name: getattr(F, name) for name in ("layer_norm", "group_norm", "softmax")}

    def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

        return call

    try:
        for name, function in before.items():
            setattr(F, name, in_float32(function))
        yield
    finally:
        for name, function in before.items():
            setattr(F, name, function)


@dataclass(frozen=True)
class Run:
    """The counts of one batch forward and backward; see `Tower`."""

    forward: float
    backward: float
    forward_bytes: float
    backward_bytes: float
    saved: float
    peak: float


def count(run: Callable[[], Tensor], module: nn.Module, precision: str, *, like_cuda: bool) -> Run:
    """Call `run` and its backward, and count. Gradients are dropped as they arrive, so they count as working memory.

    Args:
        module: whose parameters and buffers are not counted as saved.
        precision: "fp32", or that of an autocast.
        like_cuda: see `cuda_precision`.
    """
    counter = Counter()
    own = {id(x.untyped_storage()) for x in [*module.parameters(), *module.buffers()]}
    saved: dict[int, Any] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if id(storage) not in own:
            saved[id(storage)] = storage  # held, so that no other gets its number
        return x

    # around backward too: gradient checkpointing runs the forward again there
    cuda = cuda_precision() if like_cuda and precision != "fp32" else nullcontext()
    with counter, cuda, _dropped_gradients(module), _no_fast_path():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), _autocast(precision):
            out = run()
        size = sum(storage.nbytes() for storage in saved.values())
        saved.clear()
        found = counter.counted
        flops, moved = found.flops, found.moved
        if out.requires_grad:
            out.backward(torch.ones_like(out))
    return Run(flops, found.flops - flops, moved, found.moved - moved, size, found.peak)


def tower(
    name: str,
    module: nn.Module,
    encode: Callable[[Tensor], Tensor],
    example: Tensor,
    precision: str,
    *,
    like_cuda: bool,
) -> Tower:
    """The costs of one tower.

    Args:
        module: the tower; `encode` calls it.
        example: `(1, ...)`, one input of `encode`.
    """
    try:
        with _faked(module) as mode, mode:
            batches = FAKE_BATCHES
            first, second = (_runs(module, encode, mode.from_tensor(example), n, precision, like_cuda) for n in batches)
    except RuntimeError:  # what it does depends on numbers
        batches = REAL_BATCHES
        first, second = (_runs(module, encode, example, n, precision, like_cuda) for n in batches)

    def line(part: str) -> Linear:
        return through(batches[0], getattr(first, part), batches[1], getattr(second, part))

    parameters = list(module.parameters())
    return Tower(
        name, _numbers(parameters), _numbers([p for p in parameters if p.requires_grad]),
        line("forward"), line("backward"), line("forward_bytes"), line("backward_bytes"), line("saved"), line("peak"),
    )  # fmt: skip


def _runs(
    module: nn.Module, encode: Callable[[Tensor], Tensor], example: Tensor, n: int, precision: str, like_cuda: bool
) -> Run:
    batch = example.expand(n, *example.shape[1:]).contiguous()
    return count(lambda: encode(batch), module, precision, like_cuda=like_cuda)


@contextmanager
def _faked(module: nn.Module) -> Iterator[FakeTensorMode]:
    """Parameters and buffers as fake tensors, for the time of the block."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # constants that the tower makes from Python numbers
    places = [
        (held, name, value)
        for part in module.modules()
        for held in (part._parameters, part._buffers)
        for name, value in held.items()
        if value is not None
    ]
    try:
        for held, name, value in places:
            held[name] = mode.from_tensor(value)  # type: ignore[assignment]
        yield mode
    finally:
        for held, name, value in places:
            held[name] = value  # type: ignore[assignment]


def _numbers(parameters: Sequence[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _autocast(precision: str) -> Any:
    # the CPU's autocast knows float16 too, but few of its products do; the bytes are those of bfloat16
    return torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32")


@contextmanager
def _dropped_gradients(module: nn.Module) -> Iterator[None]:
    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in module.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """torch's attention of a locked tower is one operation, in which nothing can be counted."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
