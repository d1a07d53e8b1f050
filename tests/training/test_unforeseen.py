"""A run that ends with an error that nobody foresaw ends, and says where it was."""

import signal
import subprocess
import sys

from tests.distributed.spawn import PATIENCE

ERROR = """
import sys
from contrastive.config import load_config
from contrastive.pretrain import pretrain
from contrastive.training.trainer import Trainer

def broken(self, *arguments):
    raise RuntimeError("nobody foresaw this")

Trainer._log = broken
pretrain(load_config(sys.argv[1], ["data.workers=2", f"run.dir={sys.argv[2]}"]), quiet=True)
"""
CRASH = """
import os, sys
from contrastive.cli import main
from contrastive.training.trainer import Trainer

Trainer._log = lambda *arguments: os.abort()
main(["train", sys.argv[1], f"run.dir={sys.argv[2]}"])
"""


def ended(script, corpus, tmp_path):
    from tests.tiny import write_recipe

    recipe = write_recipe(corpus, tmp_path / "tiny.yaml")
    command = [sys.executable, "-c", script, str(recipe), str(tmp_path / "run")]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def test_an_error_in_the_loop_ends_the_workers_and_the_process(corpus, tmp_path):
    done = ended(ERROR, corpus, tmp_path)
    assert done.returncode == 1 and "nobody foresaw this" in done.stderr


def test_a_crash_of_a_library_leaves_the_stacks(corpus, tmp_path):
    done = ended(CRASH, corpus, tmp_path)
    assert done.returncode == -signal.SIGABRT and "in fit" in done.stderr
