"""Running one function over the parts of a job: in this process, on several, or on a Ray cluster."""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from contrastive.errors import UserError

# runner(function, job, tasks, what): calls function(job, task) for every task, in any order, and yields the task
# after each; `what` names the work to whoever watches.
Runner = Callable[[Callable[[Any, Any], None], Any, Sequence[Any], str], Iterator[Any]]


def run_here(function: Callable[[Any, Any], None], job: Any, tasks: Sequence[Any], what: str = "") -> Iterator[Any]:
    """One task after the other, in this process."""
    for task in tasks:
        function(job, task)
        yield task


def on_processes(workers: int) -> Runner:
    """A runner on `workers` processes of this machine.

    Raises UserError when one of them is killed; what it was working on is named.
    """
    if workers < 1:
        raise UserError(f"--workers {workers}: give at least 1")
    return run_here if workers == 1 else partial(_run_processes, workers)


_here: tuple[Any, Any] | None = None  # function and job, in a process of a pool


def _start(function: Any, job: Any) -> None:
    global _here
    _here = function, job
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # the parent was killed: nobody waits for this process

    threading.Thread(target=follow, daemon=True).start()


def _call(task: Any) -> None:
    assert _here is not None
    function, job = _here
    function(job, task)


def _run_processes(workers: int, function: Any, job: Any, tasks: Sequence[Any], what: str = "") -> Iterator[Any]:
    if not tasks:
        return
    # spawned, not forked: a fork of a process with torch's threads can hang
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(tasks)), multiprocessing.get_context("spawn"), _start, (function, job)
    )
    # Processes are started as tasks come in, and inherit the mask: Ctrl-C reaches the whole group, but the first
    # process alone answers it, and ends the others.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    futures = {pool.submit(_call, task): task for task in tasks}
    left = set(futures)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while left:
            done, left = concurrent.futures.wait(left, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                future.result()
                yield futures.pop(future)
    except BrokenProcessPool:
        # parts are begun in order, one a process
        numbers = sorted(task.part.number for task in futures.values())[: workers + 1]
        raise UserError(
            f"a process was killed while {what} (near part {numbers[0]} of {len(tasks)}; out of memory?); run the same "
            "command again, with fewer --workers: finished parts are kept"
        ) from None
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def on_ray(address: str | None = None) -> Runner:
    """A runner on a Ray cluster: `address`, or RAY_ADDRESS, or one of this machine's own.

    Every node must have this package and see the source and the destination under the same paths.
    """
    try:
        import ray.data  # noqa: F401
    except ImportError:
        raise UserError("--ray: Ray is not installed; pip install 'contrastive[ray]'") from None
    return partial(_run_ray, address)


def _run_ray(address: str | None, function: Any, job: Any, tasks: Sequence[Any], what: str = "") -> Iterator[Any]:
    import ray

    if not tasks:
        return
    if not ray.is_initialized():
        _check_listening(address)
        try:
            ray.init(address=address, include_dashboard=None if address else False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as fault:
            raise UserError(f"--ray {address}: no such cluster ({str(fault).splitlines()[0]})") from None
    shared = ray.put((function, job, list(tasks)))

    def work(row: dict[str, Any]) -> dict[str, Any]:
        function, job, tasks = _fetch(shared)
        try:
            function(job, tasks[row["number"]])
        except UserError as error:  # as a value: how Ray wraps what a task raises differs by version
            return {**row, "error": str(error)}
        return row

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"number": number, "error": ""} for number in range(len(tasks))]
    try:
        for row in ray.data.from_items(rows, override_num_blocks=len(rows)).map(work).iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            yield tasks[row["number"]]
    except ray.exceptions.RayError as fault:
        line = next((line for line in reversed(str(fault).splitlines()) if line.strip()), type(fault).__name__)
        raise UserError(
            f"a task on the Ray cluster failed ({line.strip()}); run the same command again: finished parts are kept"
        ) from None


_fetched: dict[str, Any] = {}


def _fetch(shared: Any) -> Any:
    """What `shared` stands for, once a process: a job may hold a long list of files, and open a model."""
    import ray

    if shared.hex() not in _fetched:
        _fetched.clear()
        _fetched[shared.hex()] = ray.get(shared)
    return _fetched[shared.hex()]


def _check_listening(address: str | None) -> None:
    """Ray itself looks for a cluster that is not there for more than a minute."""
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.rpartition("/")[2], int(port)), timeout=10).close()
    except (OSError, OverflowError) as fault:
        raise UserError(f"--ray {address}: no cluster answers there ({fault}); see `ray status`") from None
