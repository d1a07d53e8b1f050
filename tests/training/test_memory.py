"""Freed memory that is kept is taken again: counted in page faults, each in a process of its own."""

import json
import os
import platform
import subprocess
import sys

import pytest

from tests.distributed.spawn import PATIENCE

# Blocks as a step has them: larger than what glibc keeps by itself, several at a time, and something small on top.
SCRIPT = """
import ctypes, json, resource, sys
import torch
from contrastive.training.memory import keep_freed_memory, release_freed_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, each a single fault (PR_SET_THP_DISABLE)
kept = keep_freed_memory() if sys.argv[1] == "keep" else None

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(40 << 18) for _ in range(4)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults = [faults_of_a_step() for _ in range(6)][-1]
before = resident()
release_freed_memory()
print(json.dumps([kept, faults, before - resident()]))
"""

only_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def measured(mode: str, **environment: str) -> tuple[bool | None, int, int]:
    """What `keep_freed_memory` returned, the page faults of a later step, the bytes that were given back at the end."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", SCRIPT, mode]
    done = subprocess.run(
        command, env=clean | environment, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    kept, faults, released = json.loads(done.stdout)
    return kept, faults, released


@only_glibc
def test_memory_that_is_kept_is_taken_again_without_faults_and_can_be_released() -> None:
    pages = 4 * (40 << 20) // os.sysconf("SC_PAGESIZE")
    assert measured("leave")[1] > pages / 2  # else there is nothing to gain
    kept, faults, released = measured("keep")
    assert kept and faults < pages / 100
    assert released > 100 << 20


@only_glibc
@pytest.mark.parametrize(
    "setting", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}], ids=str
)
def test_the_users_own_settings_hold(setting: dict[str, str]) -> None:
    kept, faults, _ = measured("keep", **setting)
    assert kept is False and faults > 1000
