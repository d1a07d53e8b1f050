"""Where the time goes: the clock against delays of known length, at a known place."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive.losses import infonce
from contrastive.losses.waiting import watch_exchanges
from contrastive.pretrain import pretrain
from contrastive.training import clock as clock_module
from contrastive.training import read_metrics, trainer
from contrastive.training.clock import KEPT, PHASES, Clock, time_averaging
from contrastive.training.curriculum import StagedBatches
from contrastive.training.step import TrainStep
from contrastive.training.trainer import Trainer
from tests.distributed.spawn import run_ranks

CPU = torch.device("cpu")
LATE = 1.0  # seconds, far above what a tiny step takes, on a busy machine too


@pytest.fixture
def at(monkeypatch):
    """Sets the time."""
    now = [0.0]
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_a_phase_has_the_time_until_the_next_and_a_block_gives_back_to_the_phase_around_it(at):
    clock = Clock(CPU)
    clock.start()
    at(1.0)
    clock.enter("loss")
    at(4.0)
    with clock.within("communication"):
        at(6.0)
    at(7.0)
    clock.enter("backward")
    at(10.0)
    found = clock.shares()
    expected = {"other": 0.1, "loss": 0.4, "communication": 0.2, "backward": 0.3}
    assert found == pytest.approx(dict.fromkeys(PHASES, 0.0) | expected)
    at(12.0)
    assert clock.shares()["backward"] == 1.0  # the time since, in the phase that goes on


def test_many_marks_are_added_up_and_not_kept(at):
    clock = Clock(CPU)
    clock.start()
    for i in range(3 * KEPT):
        at(float(i))
        clock.enter(("forward", "backward", "backward")[i % 3])
    at(3.0 * KEPT)
    assert len(clock._marks) <= KEPT + 1
    found = clock.shares()
    assert found["forward"] == pytest.approx(1 / 3) and found["backward"] == pytest.approx(2 / 3)


# ---- a run


def rows(config) -> list[dict[str, float]]:
    found = read_metrics(Path(config.run.dir) / "metrics.jsonl")
    return [{p: row[f"train/time_{p}"] for p in PHASES} for row in found if "train/time_data" in row]


@pytest.fixture
def second(monkeypatch):
    """Lets a second pass for the clock, whose time stands still otherwise, however busy the machine is."""
    now = [0.0]
    monkeypatch.setattr(clock_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return lambda: now.__setitem__(0, now[0] + 1.0)


def late(plain, second):
    def call(*arguments, **options):
        second()
        return plain(*arguments, **options)

    return call


def slow_towers(step, second):
    step.model.register_forward_pre_hook(lambda *_: second())


def slow_backward(step, second):
    step.two_tower.logit_scale.register_hook(lambda gradient: second())


def slow_optimizer(step, second):
    step.optimizer.step = late(step.optimizer.step, second)


def slow_loss(step, second):
    step.loss = late(step.loss, second)


def changed(monkeypatch, change, second) -> None:
    plain = TrainStep.__init__

    def create(self, *arguments, **options):
        plain(self, *arguments, **options)
        change(self, second)

    monkeypatch.setattr(TrainStep, "__init__", create)


@pytest.mark.parametrize("options", [[], ["train.chunk=8"]], ids=["whole", "chunks"])
@pytest.mark.parametrize(
    "phase, change",
    [("forward", slow_towers), ("backward", slow_backward), ("optimizer", slow_optimizer), ("loss", slow_loss)],
)
def test_a_part_of_the_step_that_is_slow_has_the_time(make_config, monkeypatch, second, phase, change, options):
    changed(monkeypatch, change, second)
    config = make_config("train.steps=3", "track.probe=null", *options)
    pretrain(config, quiet=True)
    for row in rows(config)[1:]:  # the first step warms up
        assert row == dict.fromkeys(PHASES, 0.0) | {phase: 1.0}


@pytest.mark.parametrize(
    "phase, where, name",
    [
        ("data", StagedBatches, "fetch"),
        ("saving", Trainer, "_save"),
        ("validation", Trainer, "_validate"),
        ("other", trainer.Progress, "update"),
    ],
)
def test_what_goes_on_between_steps_has_the_time_when_it_is_slow(make_config, monkeypatch, second, phase, where, name):
    monkeypatch.setattr(where, name, late(getattr(where, name), second))
    config = make_config("train.steps=3", "checkpoint.every=1", "eval.every=1", "track.probe=null")
    pretrain(config, quiet=True)
    for row in rows(config)[1:]:  # what follows a log line is in the next one
        assert row == dict.fromkeys(PHASES, 0.0) | {phase: 1.0}


class Waits(TorchDispatchMode):
    """Counts what a host waits for a device for: a value is read, or sizes depend on values."""

    READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique"}

    def __init__(self) -> None:
        super().__init__()
        self.readers: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket.__name__.split("::")[-1] in self.READS:
            frame = sys._getframe()
            while Path(frame.f_code.co_filename).parent.parent.name != "contrastive":
                frame = frame.f_back
            self.readers.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
        return func(*args, **(kwargs or {}))


def test_a_step_that_is_not_logged_reads_two_values_of_the_device(make_config, monkeypatch):
    """On a CPU the reads of a step can be seen. Those of values that the host itself made are known by name."""
    steps: list[list[str]] = []
    plain, fetch = TrainStep.__call__, StagedBatches.fetch
    waits = Waits()

    def step(self, batch, factor):
        self.loss = lambda *a, **k: infonce(*a, **k, check=False)  # as on an accelerator
        return plain(self, batch, factor)

    def next_step(*place):
        steps.append(list(waits.readers))
        waits.readers.clear()
        return fetch(*place)

    monkeypatch.setattr(TrainStep, "__call__", step)
    monkeypatch.setattr(StagedBatches, "fetch", next_step)
    config = make_config("train.steps=10", "track.log_every=10", "track.probe=null", "checkpoint.every=100")
    with waits:
        pretrain(config, quiet=True, stop_after=9)
    of_the_device = ["softmax.settle", "step.__call__"]  # the sums of the loss, and the gradient: finite?
    on_a_cpu = ["softmax.__init__", "tiled.backward"]  # nobody asks elsewhere, see there
    of_the_host = ["step.__call__", "trainer.fit", "trainer.add"]  # all rows valid? skipped? and once more in the sums
    expected = sorted(of_the_device + on_a_cpu + of_the_host)
    assert [sorted(readers) for readers in steps[1:]] == [expected] * 8


# ---- across processes


def exchange(rank: int, world: int, options: dict) -> float:
    """Seconds this rank was seen to wait in a loss to which the last rank comes late."""
    clock = Clock(CPU)
    generator = torch.Generator().manual_seed(rank)
    image, text = (F.normalize(torch.randn(4, 8, generator=generator), dim=1).requires_grad_() for _ in range(2))
    torch.distributed.barrier()
    clock.start()
    if rank == world - 1:
        time.sleep(LATE)
    started = time.perf_counter()
    with watch_exchanges(lambda: clock.within("communication")):
        infonce(image, text, torch.tensor(10.0), ids=torch.arange(4), **options)["loss"].backward()
    return clock.shares()["communication"] * (time.perf_counter() - started)


@pytest.mark.parametrize("options", [{"tile": None}, {"tile": 2, "exchange": "ring"}, {"tile": 2}], ids=str)
def test_a_wait_for_another_rank_in_a_loss_is_communication(options):
    first, last = run_ranks(2, exchange, options)
    assert first > 0.9 * LATE > 0.3 * LATE > last


def averaged(rank: int, world: int, timed: bool) -> tuple[list[torch.Tensor], dict[str, float]]:
    torch.manual_seed(0)
    towers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    model, clock = DistributedDataParallel(towers, gradient_as_bucket_view=True), Clock(CPU)
    if timed:
        time_averaging(model, clock)
    out = model(torch.full((2, 4), rank + 1.0)).square().sum()
    torch.distributed.barrier()
    clock.start()
    clock.enter("backward")
    if rank:
        out.register_hook(lambda gradient: time.sleep(LATE))
    out.backward()
    clock.enter("optimizer")
    return [p.grad.clone() for p in towers.parameters()], clock.shares()


def test_what_backward_does_not_hide_of_the_averaging_is_communication_and_the_average_is_ddps():
    (gradients, first), (_, last) = run_ranks(2, averaged, True)
    (expected, without), _ = run_ranks(2, averaged, False)
    torch.testing.assert_close(gradients, expected)  # a hook's own average beside DDP's: rounding
    assert first["communication"] > 0.9 > 0.1 > first["backward"]
    assert last["backward"] > 0.9
    assert without["communication"] == 0.0  # it would be taken for backward


def run_with_a_late_loader(rank: int, world: int, corpus: Path, run_dir: Path) -> None:
    from tests.tiny import tiny_config

    if rank == 1:
        StagedBatches.fetch = late(StagedBatches.fetch, lambda: time.sleep(LATE))
    pretrain(tiny_config(corpus, run_dir / "run", "train.steps=3", "eval.report=false"), quiet=True)


def test_shares_are_means_over_processes(corpus, tmp_path):
    """One of two processes waits for data, the other one for that process."""
    run_ranks(2, run_with_a_late_loader, corpus, tmp_path)
    found = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for row in [row for row in found if "train/time_data" in row][1:]:
        assert row["train/time_data"] == pytest.approx(0.5, abs=0.25)
        assert row["train/time_communication"] == pytest.approx(0.5, abs=0.25)
        assert sum(row[f"train/time_{phase}"] for phase in PHASES) == pytest.approx(1.0)
