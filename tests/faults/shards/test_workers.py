"""A loader worker that dies, sleeps or fails ends the run: one line, on every rank at the same step, and no orphans."""

import os
import re
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch

from contrastive.shards.workers import AHEAD, BESIDE, from_workers, new_bytes
from tests.distributed.spawn import PATIENCE, run_ranks

from .faulty import at_step, children, corpus_with, die, fail, run, sleep_for_ever, state

OPTIONS = ["data.workers=1", "checkpoint.every=2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus_with(tmp_path_factory.mktemp("corpus"), bad=0)


def broken_run(rank: int, world: int, corpus: Path, run_dir: Path, fault: str) -> dict[str, Any]:
    """The last rank's worker has the fault when it prepares the batch of step 6."""
    actions = {"dies": die, "sleeps": sleep_for_ever, "raises": fail}
    at_step(5, actions[fault], rank=world - 1)
    return run(rank, world, corpus, run_dir, [*OPTIONS, f"data.timeout={20 if fault == 'sleeps' else PATIENCE}"])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("fault", "words"), [
    ("dies", "data.workers: a loader worker was killed by signal 9 before the batch of step [56] was ready"),
    ("sleeps", "data.timeout: a loader worker did not finish the batch of step 6 in 20 s"),
    ("raises", "data.train: the disk is on fire"),
])  # fmt: skip
def test_a_worker_with_a_fault_ends_every_rank_with_its_one_line(
    corpus: Path, tmp_path: Path, world: int, fault: str, words: str
) -> None:
    ended = run_ranks(world, broken_run, corpus, tmp_path, fault)
    for rank in ended:
        assert rank["error"] is not None and re.search(words, rank["error"]) and "\n" not in rank["error"]
        assert rank["workers"] == 0
    assert len({rank["error"] for rank in ended}) == 1
    # what starting again may mend, exit code 1, is that on every rank
    assert {rank["kind"] for rank in ended} == {"UserError" if fault == "raises" else "Fault"}
    done = int(re.search("goes on from step (.)", ended[0]["error"])[1])  # type: ignore[index]
    # all that was trained is kept; what the dead worker had ready for step 5 may be lost with it
    assert done in ((4, 5) if fault == "dies" else (5,))
    assert state(tmp_path, done)["loader"]["cursor"] == (done * 16) % 40


def test_a_run_goes_on_behind_a_worker_that_died(corpus: Path, tmp_path: Path) -> None:
    run_ranks(1, broken_run, corpus, tmp_path, "dies")
    (again,) = run_ranks(1, run_again, corpus, tmp_path)
    assert again["error"] is None and state(tmp_path, 8)["step"] == 8


def run_again(rank: int, world: int, corpus: Path, run_dir: Path) -> dict[str, Any]:
    return run(rank, world, corpus, run_dir, OPTIONS, resume=True)


SCRIPT = """
import sys
from tests.faults.shards.faulty import at_step, die
from contrastive.cli import main
at_step(3, die)
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_the_command_ends_with_one_line_and_the_exit_code_of_a_fault(corpus: Path, tmp_path: Path) -> None:
    from tests.tiny import write_recipe

    recipe = write_recipe(corpus, tmp_path / "tiny.yaml")
    command = [sys.executable, "-c", SCRIPT, str(recipe), f"run.dir={tmp_path}/run", "data.workers=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1  # not 2, a mistake: started again it goes on
    assert "was killed by signal 9" in done.stderr and "Traceback" not in done.stderr


class Odd:
    """Numbers, with a fault at 7."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def __getitem__(self, number: int) -> tuple[int, int]:
        if number == 7 and self.fault == "error":
            raise ZeroDivisionError("by seven")
        if number == 7 and self.fault == "slow":
            time.sleep(1)
        return number, os.getpid()


def test_an_error_that_nobody_foresaw_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)in a loader worker.*__getitem__.*ZeroDivisionError: by seven"):
        list(from_workers(Odd("error"), range(20), 2, timeout=100))


@pytest.mark.parametrize("count", [1, 3])
def test_items_come_in_order_from_all_workers(count: int) -> None:
    items = list(from_workers(Odd("slow"), range(20), count, timeout=100))
    assert [number for number, _ in items] == list(range(20))
    assert len({process for _, process in items}) == count


class Pictures:
    """Item i is 1,000 bytes that are all i, as a view."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        picture = new_bytes(10, 100)
        picture.fill_(number)
        return {"number": number, "picture": picture.T[1:]}


@pytest.mark.parametrize("room", [0, 1000, 77])  # 77: of another size than what is asked for
@pytest.mark.parametrize("kept", [0, 1, 9])
def test_what_is_still_looked_at_is_not_written_over(kept: int, room: int) -> None:
    held: deque[tuple[int, torch.Tensor]] = deque()
    for item in from_workers(Pictures(), range(40), 2, timeout=100, room=room):
        held.append((item["number"], item["picture"][3:]))  # a view of a view: the item itself is let go
        del item
        if len(held) > kept:
            held.popleft()
        time.sleep(0.002)  # for a worker to write what it should not
        assert all((picture == number).all() for number, picture in held)


def test_memory_that_is_let_go_is_used_again() -> None:
    stream = from_workers(Pictures(), range(40), 1, timeout=100, room=1000)
    places = [item["picture"].data_ptr() for item in stream]
    assert len(places) == 40 and len(set(places)) <= AHEAD + 2


class Mixed:
    """Item i is pixels and tensors of several kinds beside them, the last of which is `large` numbers."""

    def __init__(self, large: int = 0) -> None:
        self.large = large

    def __getitem__(self, number: int) -> list[torch.Tensor]:
        pixels = new_bytes(7, 11)  # an odd number of bytes: what follows must be aligned all the same
        pixels.fill_(number)
        table = torch.arange(12).view(3, 4) + number
        return [pixels, table, table.T, table > 5, torch.empty(0, 2), torch.tensor(number / 3), torch.ones(self.large)]


@pytest.mark.parametrize("large", [3, BESIDE])  # the second does not fit into the slot
def test_tensors_beside_the_pixels_arrive_as_they_are(large: int) -> None:
    for number, item in enumerate(from_workers(Mixed(large), range(12), 2, timeout=100, room=77)):
        expected = Mixed(large)[number]
        assert [(t.dtype, t.shape) for t in item] == [(t.dtype, t.shape) for t in expected]
        assert all(torch.equal(*pair) for pair in zip(item, expected, strict=True))
        inside = [t.untyped_storage().data_ptr() == item[0].untyped_storage().data_ptr() for t in item]
        assert inside == [True] * 6 + [large == 3]


def test_a_tensor_beside_pixels_that_were_let_go_is_not_written_over() -> None:
    held = []
    for item in from_workers(Mixed(3), range(20), 1, timeout=100, room=77):
        held.append(item[1])
        del item
    assert [int(table[0, 0]) for table in held] == list(range(20))


def test_what_is_kept_outlives_the_workers() -> None:
    stream = from_workers(Pictures(), range(40), 2, timeout=100, room=1000)
    held = [next(stream) for _ in range(3)]
    stream.close()  # type: ignore[attr-defined]
    assert all((item["picture"] == item["number"]).all() for item in held)


def test_no_worker_outlives_the_iterator() -> None:
    before = children(os.getpid())
    stream = from_workers(Odd(), range(10**9), 3, timeout=100)
    next(stream)
    started = set(children(os.getpid())) - set(before)
    assert len(started) == 3
    stream.close()  # type: ignore[attr-defined]
    assert not started & set(children(os.getpid()))


ORPHANS = """
import os, signal, sys
sys.path.insert(0, ".")
from tests.faults.shards.faulty import children
from tests.faults.shards.test_workers import Odd
from contrastive.shards.workers import from_workers
stream = from_workers(Odd(), range(10**9), 2, timeout=100)
print(*{next(stream)[1] for _ in range(4)}, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["killed", "over"])
def test_workers_end_soon_behind_a_main_process(end: str) -> None:
    command = [sys.executable, "-c", ORPHANS, end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert not done.stderr
    workers = [int(number) for number in done.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
