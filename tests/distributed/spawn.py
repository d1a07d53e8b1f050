"""Run a function on several gloo ranks of this machine and collect what each returns."""

import datetime
import faulthandler
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

# What the server of ranks has imported before it forks one: the whole package, which takes a core seven seconds.
PRELOAD = ["torch", "torch.distributed", "open_clip", "accelerate", "contrastive.pretrain"]

# Seconds after which whatever a test waits for counts as stuck: far more than a machine takes that does much else.
PATIENCE = 300.0


class Crash(RuntimeError):
    """A rank was ended by a library, not by an exception: memory that is not its own, a failed assertion in C."""


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = PATIENCE) -> list[Any]:
    """`[fn(rank, world, *args) for each rank]`, each rank a new process with an initialised gloo group.

    `fn` is a module-level function; arguments and results are pickled. The environment has RANK, LOCAL_RANK,
    WORLD_SIZE, MASTER_ADDR and MASTER_PORT as a launcher would set them, and torch one thread a rank; what
    else a rank needs goes through `args`: the server that starts it keeps the environment of its own start.
    Raises RuntimeError with the traceback of the rank that failed first, or after `timeout` seconds, and Crash,
    which is one, with the stacks of a rank that crashed; no process is left behind either way.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # one server imports the heavy packages, once a test session, and forks the ranks: seconds, not a minute
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes = [
            context.Process(target=_rank, args=(rank, world, port, folder, timeout, fn, args)) for rank in range(world)
        ]
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + timeout
            while any(process.is_alive() for process in processes):
                if any(process.exitcode for process in processes):
                    break
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{world} ranks were not done after {timeout:g} s{_failures(folder)}")
                time.sleep(0.02)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        codes = [process.exitcode for process in processes]
        if any(codes):
            told = _failures(folder)
            crashed = "\nFatal Python error: " in told[:60]  # the first one, which may end the others in any way
            raise (Crash if crashed else RuntimeError)(f"exit codes of the ranks: {codes}{told}")
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world)]


def _failures(folder: str) -> str:
    """The tracebacks that ranks have left, oldest first: the others mostly report that this one is gone."""
    files = sorted(Path(folder).glob("*.error"), key=lambda file: file.stat().st_mtime_ns)
    return "".join(f"\n--- rank {file.stem}\n{file.read_text()}" for file in files if file.stat().st_size)


def _rank(rank: int, world: int, port: int, folder: str, timeout: float, fn: Any, args: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        ACCELERATE_USE_CPU="true",
    )
    torch.set_num_threads(1)
    error = (Path(folder) / f"{rank}.error").open("a")
    faulthandler.enable(error)  # all threads' stacks, where a library ends the process
    try:
        # a file, not the port: nobody else can have taken it in the meantime
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout),
        )
        result = pickle.dumps(fn(rank, world, *args))
        (Path(folder) / f"{rank}.result").write_bytes(result)
        if dist.is_initialized():  # what is tested may have ended it
            dist.barrier()  # nobody leaves while another still talks to it
            dist.destroy_process_group()
    except BaseException as reason:
        error.write(traceback.format_exc())
        error.flush()
        own = reason.code if isinstance(reason, SystemExit) else None  # what is tested may end with a code of its own
        raise SystemExit(own or 1) from None
