"""Processes that compute items ahead of time. What can go wrong with one ends the stream with an error, never a hang.

torch's DataLoader does the same with two differences that matter here: it tells of a dead worker by an exception out
of a signal handler, in the middle of whatever the main process does (a collective, with the other ranks in it); and
with a timeout it looks for dead workers only when the timeout is over.
"""

import atexit
import io
import math
import os
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import numpy as np
import torch
import torch.multiprocessing as multiprocessing  # its pipes pass tensors in shared memory

from contrastive.errors import Fault, UserError

AHEAD = 2  # items that each worker has in hand or ready
BESIDE = 1 << 23  # bytes of a slot for what an item holds besides its pixels; pages that nobody touches cost nothing
ALIGNED = 64  # bytes


class Items(Protocol):
    """What the workers call, once for each number; it is copied into them."""

    def __getitem__(self, number: int, /) -> Any: ...


def from_workers(items: Items, numbers: Iterable[int], count: int, timeout: float, room: int = 0) -> Iterator[Any]:
    """`items[number]` for each of the numbers, in their order, computed by `count` processes.

    The processes end with the iterator, or within seconds of this process, however that ends.
    room: bytes that an item takes from `new_bytes`; its other tensors are put beside them, and arrive without gradients
    or gaps in memory. Where they lie is used again as soon as nothing in this process refers to any of the item's
    tensors any more: the pages of fresh memory cost more than filling them, and torch's own way to pass a tensor on
    asks the worker once more, which is busy.

    Raises UserError with a worker's own text when it raised one; Fault when a worker dies; when an item has not come
    after `timeout` seconds. Raises RuntimeError with the traceback of any other error of a worker.
    """
    workers = [_Worker(items, room) for _ in range(count)]
    remaining, asked = iter(numbers), deque[tuple[int, _Worker]]()

    def ask(worker: _Worker) -> None:
        number = next(remaining, None)
        if number is not None:
            worker.ask(number)
            asked.append((number, worker))

    try:
        for _ in range(AHEAD):
            for worker in workers:
                ask(worker)
        while asked:
            number, worker = asked.popleft()
            item = worker.answer(number, timeout)
            ask(worker)
            yield item
    finally:
        for worker in workers:
            worker.end()


_in_worker = False
_slot: torch.Tensor | None = None  # of the item that this worker computes: room for `new_bytes`, and BESIDE bytes


def new_bytes(*shape: int) -> torch.Tensor:
    """uint8, filled with anything; in a worker it lies where the main process sees it: nothing is copied on the way."""
    if not _in_worker:
        return torch.empty(shape, dtype=torch.uint8)
    if _slot is not None and math.prod(shape) == len(_slot) - BESIDE:
        return _slot[:-BESIDE].view(shape)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collate does
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class _Lease:
    """A slot while an item lies in it: what numpy and torch hold on to as long as there is a view of it."""

    def __init__(self, number: int, slot: torch.Tensor, free: list[int]) -> None:
        self.number, self.slot, self.free = number, slot, free
        data = {"data": (slot.data_ptr(), False), "shape": tuple(slot.shape), "typestr": "|u1", "version": 3}
        self.__array_interface__ = data

    def __del__(self) -> None:
        self.free.append(self.number)


_Spot = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]  # byte, of what, shape, strides


class _Pickler(ForkingPickler):
    """Items on their way to the main process: tensors lie in the slot, or are put there; only their place is sent."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.end = 0 if _slot is None else -(-(len(_slot) - BESIDE) // ALIGNED) * ALIGNED

    def persistent_id(self, value: object) -> _Spot | None:
        if _slot is None or not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return None
        if value.untyped_storage().data_ptr() == _slot.untyped_storage().data_ptr():
            start = value.storage_offset() * value.element_size()
            return int(start), value.dtype, tuple(value.shape), value.stride()
        start, self.end = self.end, self.end + -(-value.nbytes // ALIGNED) * ALIGNED
        if self.end > len(_slot):
            self.end = start
            return None
        own = value.detach().contiguous()
        _in_place(_slot, (start, own.dtype, tuple(own.shape), own.stride())).copy_(own)
        return start, own.dtype, tuple(own.shape), own.stride()


def _in_place(slot: torch.Tensor, spot: _Spot) -> torch.Tensor:
    start, dtype, shape, stride = spot
    whole = slot[start : len(slot) // ALIGNED * ALIGNED].view(dtype)
    return whole.as_strided(shape, stride, whole.storage_offset())


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, lease: _Lease | None) -> None:
        super().__init__(io.BytesIO(data))
        self.slot = None if lease is None else torch.from_numpy(np.asarray(lease))

    def persistent_load(self, spot: _Spot) -> torch.Tensor:
        assert self.slot is not None
        return _in_place(self.slot, spot)


class _Worker:
    def __init__(self, items: Items, room: int) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        # One in use and one that its user is about to let go, besides those that are ahead.
        self.slots = [
            torch.empty(room + BESIDE, dtype=torch.uint8).share_memory_() for _ in range(AHEAD + 2 if room else 0)
        ]
        self.free, self.taken = list(range(len(self.slots))), deque[int | None]()
        self.ended = False
        # The step goes first. Where it is computed on these cores it waits for its slowest thread: it loses less by
        # waiting for a batch now and then than by sharing a core (docs/experiments.md).
        niceness = 5 if torch.accelerator.is_available() else 19
        self.process = multiprocessing.Process(target=_work, args=(items, theirs, self.slots, niceness), daemon=True)
        self.process.start()
        atexit.register(self.end)  # Python would end it by a signal that it ignores, and wait for ever
        theirs.close()  # only the worker holds it now, so that its death ends what we read

    def ask(self, number: int) -> None:
        slot = self.free.pop() if self.free else None  # None: it takes new memory
        self.taken.append(slot)
        try:
            self.pipe.send((number, slot))
        except OSError:
            pass  # it is dead, which `answer` tells

    def answer(self, number: int, timeout: float) -> Any:
        ready = wait([self.pipe, self.process.sentinel], timeout)
        if not ready:
            raise Fault(
                f"data.timeout: a loader worker did not finish the batch of step {number + 1} in {timeout:g} s; look "
                "at the disk or network of the shards and at what else uses these cores (it has a low priority), "
                "or raise data.timeout"
            )
        try:
            if self.pipe not in ready:
                raise EOFError
            data = self.pipe.recv_bytes()
            slot = self.taken.popleft()
            lease = None if slot is None else _Lease(slot, self.slots[slot], self.free)
            item = _Unpickler(data, lease).load()
        except (EOFError, OSError):  # it died before it answered, or while it did
            self.process.join(5.0)  # its pipe may close a moment before it is over
            code = self.process.exitcode
            how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
            raise Fault(
                f"data.workers: a loader worker {how} before the batch of step {number + 1} was ready; if memory was "
                "short, use fewer workers or a smaller train.global_batch"
            ) from None
        if isinstance(item, _Failure):
            raise UserError(item.text) if item.mendable else RuntimeError(f"in a loader worker:\n{item.text}")
        return item

    def end(self) -> None:
        if self.ended:  # at exit, and then once more as the iterator is collected, when modules are gone
            return
        self.ended = True
        atexit.unregister(self.end)
        self.process.kill()  # it holds nothing that must be written
        self.process.join()
        self.pipe.close()


class _Failure:
    def __init__(self, text: str, mendable: bool) -> None:
        self.text, self.mendable = text, mendable


def _work(items: Items, pipe: Connection, slots: list[torch.Tensor], niceness: int) -> None:
    """The life of a worker: answer until nobody asks any more."""
    global _in_worker, _slot
    _in_worker = True
    torch.set_num_threads(1)  # the training step needs the cores
    os.nice(niceness)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not survive the fork
    # The main process decides how to end on Ctrl-C or a scheduler's signal, and may still want batches.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # not everywhere
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    while True:
        if pipe not in wait([pipe, parent.sentinel]):  # the main process was killed: nobody will end us
            return
        try:
            number, slot = pipe.recv()
        except EOFError:
            return
        _slot = None if slot is None else slots[slot]
        answer: Any
        try:
            answer = items[number]
        except UserError as error:
            answer = _Failure(str(error), True)
        except Exception:
            answer = _Failure(traceback.format_exc(), False)
        data = io.BytesIO()
        _Pickler(data).dump(answer)
        try:
            pipe.send_bytes(data.getbuffer())
        except OSError:
            return
