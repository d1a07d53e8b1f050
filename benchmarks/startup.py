"""CPU seconds of `import contrastive` and `contrastive --help`: medians, as JSON on standard output.

    python benchmarks/startup.py [RUNS]

Each run is a new process; its user and system seconds are counted, without those of an empty Python process.
"""

import json
import os
import statistics
import subprocess
import sys

CASES = {
    "python": "pass",
    "import contrastive": "import contrastive",
    "contrastive --help": "from contrastive.cli import main; main([])",
    "contrastive train RECIPE --print-config": (
        "from contrastive.cli import main; main(['train', 'pretrain/pictograms', '--print-config'])"
    ),
}


def cpu_seconds(code: str) -> float:
    before = os.times()
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def loads_torch(code: str) -> bool:
    code += "; import sys; sys.exit(3 if 'torch' in sys.modules else 0)"
    return subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 3


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(runs):  # in turn, so that a busy moment of the machine meets all of them
        for name, code in CASES.items():
            seconds[name].append(cpu_seconds(code))
    empty = statistics.median(seconds.pop("python"))
    result = {
        name: {
            "cpu_seconds": round(statistics.median(found) - empty, 3),
            "torch_loaded": loads_torch(CASES[name]),
        }
        for name, found in seconds.items()
    }
    print(json.dumps({"runs": runs, "empty_python": round(empty, 3), **result}, indent=2))


if __name__ == "__main__":
    main()
