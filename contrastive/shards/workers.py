"""Processes that compute items ahead of time. What can go wrong with one ends the stream with an error, never a hang.

torch's DataLoader does the same with two differences that matter here: it tells of a dead worker by an exception out
of a signal handler, in the middle of whatever the main process does (a collective, with the other ranks in it); and
with a timeout it looks for dead workers only when the timeout is over.
"""

import atexit
import math
import os
import signal
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch
import torch.multiprocessing as multiprocessing  # its pipes pass tensors in shared memory

from contrastive.errors import UserError

AHEAD = 2  # items that each worker has in hand or ready


class Items(Protocol):
    """What the workers call, once for each number; it is copied into them."""

    def __getitem__(self, number: int, /) -> Any: ...


def from_workers(items: Items, numbers: Iterable[int], count: int, timeout: float) -> Iterator[Any]:
    """`items[number]` for each of the numbers, in their order, computed by `count` processes.

    The processes end with the iterator, or within seconds of this process, however that ends.

    Raises UserError with a worker's own text when it raised one; when a worker dies; when an item has not come after
    `timeout` seconds. Raises RuntimeError with the traceback of any other error of a worker.
    """
    workers = [_Worker(items) for _ in range(count)]
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


def new_bytes(*shape: int) -> torch.Tensor:
    """Zeros, uint8; in a worker they lie where the main process will see them, so that nothing is copied on the way."""
    if not _in_worker:
        return torch.zeros(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collate does
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class _Worker:
    def __init__(self, items: Items) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=_work, args=(items, theirs), daemon=True)
        self.process.start()
        atexit.register(self.end)  # Python would end it by a signal that it ignores, and wait for ever
        theirs.close()  # only the worker holds it now, so that its death ends what we read

    def ask(self, number: int) -> None:
        try:
            self.pipe.send(number)
        except OSError:
            pass  # it is dead, which `answer` tells

    def answer(self, number: int, timeout: float) -> Any:
        ready = wait([self.pipe, self.process.sentinel], timeout)
        if not ready:
            raise UserError(
                f"data.timeout: a loader worker did not finish the batch of step {number + 1} in {timeout:g} s; look "
                "at the disk or network of the shards, or raise data.timeout"
            )
        try:
            if self.pipe not in ready:
                raise EOFError
            item = self.pipe.recv()
        except (EOFError, OSError):  # it died before it answered, or while it did
            self.process.join(5.0)  # its pipe may close a moment before it is over
            code = self.process.exitcode
            how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
            raise UserError(
                f"data.workers: a loader worker {how} before the batch of step {number + 1} was ready; if memory was "
                "short, use fewer workers or a smaller train.global_batch"
            ) from None
        if isinstance(item, _Failure):
            raise UserError(item.text) if item.mendable else RuntimeError(f"in a loader worker:\n{item.text}")
        return item

    def end(self) -> None:
        atexit.unregister(self.end)
        self.process.kill()  # it holds nothing that must be written
        self.process.join()
        self.pipe.close()


class _Failure:
    def __init__(self, text: str, mendable: bool) -> None:
        self.text, self.mendable = text, mendable


def _work(items: Items, pipe: Connection) -> None:
    """The life of a worker: answer until nobody asks any more."""
    global _in_worker
    _in_worker = True
    torch.set_num_threads(1)  # the training step needs the cores
    os.nice(5)  # and goes first: on few cores a step waits for its slowest thread, and working ahead hides ours
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not survive the fork
    # The main process decides how to end on Ctrl-C or a scheduler's signal, and may still want batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    while True:
        if pipe not in wait([pipe, parent.sentinel]):  # the main process was killed: nobody will end us
            return
        try:
            number = pipe.recv()
        except EOFError:
            return
        answer: Any
        try:
            answer = items[number]
        except UserError as error:
            answer = _Failure(str(error), True)
        except Exception:
            answer = _Failure(traceback.format_exc(), False)
        try:
            pipe.send(answer)
        except OSError:
            return
