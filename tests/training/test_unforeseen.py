"""A run that ends with an error that nobody foresaw ends."""

import subprocess
import sys

SCRIPT = """
import sys
from contrastive.config import load_config
from contrastive.pretrain import pretrain
from contrastive.training.trainer import Trainer

def broken(self, *arguments):
    raise RuntimeError("nobody foresaw this")

Trainer._log = broken
pretrain(load_config(sys.argv[1], ["data.workers=2", f"run.dir={sys.argv[2]}"]), quiet=True)
"""


def test_an_error_in_the_loop_ends_the_workers_and_the_process(corpus, tmp_path):
    from tests.tiny import write_recipe

    recipe = write_recipe(corpus, tmp_path / "tiny.yaml")
    command = [sys.executable, "-c", SCRIPT, str(recipe), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "nobody foresaw this" in done.stderr
