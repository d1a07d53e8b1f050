"""When a checkpoint is written, by whom, and which ones stay."""

from __future__ import annotations

import json
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

from contrastive.training.checkpoint import Snapshot, list_checkpoints, prune, write_checkpoint

BEST = "best.json"
NICENESS = 5  # of the thread that writes: behind a step on the same cores, and done in much the same time all the same


class Saver:
    """Writes snapshots behind training's back, one at a time, and deletes what need not be kept.

    Training waits for the copy that a snapshot is, as far as it is not made here too, and for the snapshot before if
    that is still being written.

    Args:
        folder: of the checkpoints.
        keep: the newest ones that stay; keep_every: those of every so many steps stay too, as does the best one.

    spare: the latest snapshot; once `finish` returns its memory can be used again.
    failed: why a checkpoint could not be written; the run saves nothing more then. saved_step: of the newest that was.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every: int | None = None) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.failed: str | None = None
        self.saved_step = 0
        self.spare: Snapshot | None = None
        self._best: tuple[int, float] | None = None
        self._writing: threading.Thread | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write `snapshot`."""
        self.finish()
        if self.failed is not None:
            return
        self.spare = snapshot
        # no daemon: Python waits for it at exit
        self._writing = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._writing.start()

    @property
    def reads_the_run(self) -> bool:
        """Whether weights and moments are still being copied; `wait_until_copied` comes before they change."""
        return self._writing is not None and self.spare is not None and bool(self.spare.rest)

    def wait_until_copied(self) -> None:
        """Return once the run may change again."""
        if self.reads_the_run:
            assert self.spare is not None
            self.spare.copied.wait()

    def finish(self) -> None:
        """Wait until nothing is being written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def _write(self, snapshot: Snapshot) -> None:
        try:
            snapshot.copy_rest()
            _let_training_go_first()
            bad = snapshot.not_finite()  # here and not ahead of the copy: training need not wait for it
            if bad is not None:
                self.failed = (
                    f"{bad} is not finite after step {snapshot.step}; nothing was saved. Lower optim.lr or set "
                    "optim.clip, and go on from the newest checkpoint with --resume"
                )
                return
            write_checkpoint(self.folder, snapshot)
            self.saved_step = snapshot.step
            prune(self.folder, keep=self.keep, keep_every=self.keep_every, best=self._best and self._best[0])
        except Exception as fault:  # of this thread: the trainer tells it, on all processes at the same step
            reason = fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault) or repr(fault)
            told = f"{self.folder}: the checkpoint of step {snapshot.step} could not be written ({reason})"
            self.failed = f"{told}; the one before is whole. Make room and go on with --resume"
            with suppress(OSError):  # the folder may have gone with the disk
                if not list_checkpoints(self.folder):
                    self.failed = f"{told}; there is none before it. Make room and start again with --overwrite"

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the best weights so far, also of those of the runs before this one was resumed."""
        if self._best is None and (self.folder / BEST).is_file():
            kept = json.loads((self.folder / BEST).read_text())
            self._best = (kept["step"], kept["value"])
        return self._best

    def score(self, step: int, value: float) -> bool:
        """Whether the weights of `step` are the best so far; their checkpoint is not deleted then.

        A step that is not behind the best one is done again, after a kill perhaps before its checkpoint was whole.
        """
        best = self.best
        if best is not None and step > best[0] and value <= best[1]:
            return False
        self.finish()  # its pruning goes by the best one
        self._best = (step, value)
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".{BEST}"
        aside.write_text(json.dumps({"step": step, "value": value}) + "\n")
        os.replace(aside, self.folder / BEST)
        return True


def _let_training_go_first() -> None:
    """Lower the priority of this thread, and of those that it starts."""
    if sys.platform == "linux":  # elsewhere there is a priority of the process alone
        thread = threading.get_native_id()
        with suppress(OSError):  # a sandbox may refuse it, which must not cost a checkpoint
            os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS))
