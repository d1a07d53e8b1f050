"""Seconds of a training step with and without `train.compile: towers`, and the time until compiled steps are steady.

    python benchmarks/compile.py RECIPE [key.path=value ...]

Run it on an idle machine. The steps are those of `contrastive find batch`: random pixels and captions of the full
context, both towers forward, InfoNCE, backward, AdamW. Plain and compiled steps take turns, so that both see the same
machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

from contrastive.config import load_config
from contrastive.finding import _throwaway, _trial_step
from contrastive.training.compiling import compile_towers

STEPS, FIRST = 20, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(arguments.recipe, [*arguments.overrides, f"run.dir={folder}"])
        with _throwaway(config) as trial:
            plain, batch_of = _trial_step(trial)
            compiled, _ = _trial_step(trial)
            compile_towers(compiled.two_tower)
            batch = batch_of(trial.train.global_batch)
            seconds: dict[str, list[float]] = {"plain": [], "compiled": []}
            started = time.perf_counter()
            for number in range(FIRST):
                plain(batch, 1.0)
                before = time.perf_counter()
                float(compiled(batch, 1.0)["loss"])
                print(f"compiled step {number + 1}: {time.perf_counter() - before:.2f} s", flush=True)
            print(f"steady after {time.perf_counter() - started:.0f} s, plain steps included")
            for _ in range(STEPS):
                for name, step in (("plain", plain), ("compiled", compiled)):
                    before = time.perf_counter()
                    float(step(batch, 1.0)["loss"])
                    seconds[name].append(time.perf_counter() - before)
    ratios = [p / c for p, c in zip(seconds["plain"], seconds["compiled"], strict=True)]
    for name, values in seconds.items():
        print(f"{name:9s} {statistics.median(values):.3f} s a step (median of {STEPS})")
    print(
        f"speed-up  {statistics.median(ratios):.2f} (median of {STEPS} pairs; {min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
