"""The examples of docs/losses.md run and keep what they promise."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from contrastive.config import load_config
from tests.distributed.spawn import PATIENCE, run_ranks
from tests.losses.dense import features, gradients, relative_error
from tests.tiny import write_corpus, write_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "losses.md").read_text()
N = 12


def example() -> dict:
    """What the page's two blocks of Python define."""
    names: dict = {}
    for source in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(source, "docs/losses.md", "exec"), names)
    return names


def spectral_dense(image: torch.Tensor, text: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    similarity = image[valid] @ text[valid].T
    own = similarity.diagonal()
    return ((similarity.square().sum() - own.square().sum()) / (len(own) - 1) - 2 * own.sum()) / len(own)


def on_ranks(rank: int, world: int) -> dict[str, list[torch.Tensor]]:
    image, text = features(0, N, 6)
    rows = slice(rank * N // world, (rank + 1) * N // world)
    scale, valid = torch.tensor(10.0, dtype=torch.float64, requires_grad=True), torch.arange(N) % 5 != 1
    found = {}
    for name in ("spectral", "tiled_spectral"):
        own_image, own_text = image[rows].detach().requires_grad_(), text[rows].detach().requires_grad_()
        loss = example()[name](own_image, own_text, scale, valid=valid[rows])["loss"]
        found[name] = [loss.detach(), *gradients(loss, own_image, own_text, scale)]
    return found


@pytest.mark.parametrize("name", ["spectral", "tiled_spectral"])
def test_the_worked_example_gives_the_global_gradient_on_any_number_of_processes(name):
    image, text = features(0, N, 6)
    oracle = spectral_dense(image, text, torch.arange(N) % 5 != 1)
    for world in (1, 2):
        ranks = [rank[name] for rank in run_ranks(world, on_ranks)]
        assert relative_error(sum(rank[0] for rank in ranks) / world, oracle) < 1e-12
        for place, expected in zip((1, 2), gradients(oracle, image, text), strict=True):
            found = torch.cat([rank[place] for rank in ranks]) / world
            assert relative_error(found, expected) < 1e-12
        assert all(rank[3] == 0 for rank in ranks)


# As an installed command starts: the folder of its script is on the path, the user's is not.
CONSOLE_SCRIPT = """
import sys
sys.path[:] = [place for place in sys.path if place not in ("", sys.argv[1])]
from contrastive.cli import main
sys.exit(main(["train", *sys.argv[2:]]))
"""


def test_the_worked_example_trains_by_its_import_path(tmp_path):
    source = re.findall(r"```python\n# my_losses.py\n(.*?)```", PAGE, re.DOTALL)[0]
    (tmp_path / "my_losses.py").write_text(source)
    recipe = write_recipe(write_corpus(tmp_path / "corpus"), tmp_path / "mine.yaml")
    override = re.findall(r"contrastive train mine.yaml '(loss=.*?)'", PAGE)[0]
    command = [sys.executable, "-c", CONSOLE_SCRIPT, str(tmp_path), str(recipe), override]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, f"run.dir={tmp_path}/run", "train.steps=2"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_every_loss_of_the_page_is_a_recipe(block, tmp_path):
    for number, line in enumerate(block.splitlines()):
        path = tmp_path / f"{number}.yaml"
        path.write_text(f"data: {{train: a}}\ntrain: {{steps: 1}}\n{line}\n")
        load_config(path)


# ---- the tables of figures are those of the files that benchmarks wrote


def table_after(page: str, heading: str) -> list[list[str]]:
    """The cells of the table whose first heading is this, below its rule."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |")) + 2
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_table_of_the_losses_speed_is_what_the_benchmark_wrote() -> None:
    expected = [
        [
            row["loss"], f"{row['n']:,}", f"{row['scale']}", f"{row['peer_seconds']:.3f}", f"{row['ours_seconds']:.3f}",
            f"{row['speedup']:.2f}", f"{row['x_products']:.2f}",
            f"{row['speedup_fused']:.2f}" if "speedup_fused" in row else "",
            f"{row['peer_mib']:,.0f}", f"{row['ours_mib']:.0f}", f"{row['memory_share']:.1%}".replace("%", " %"),
        ]
        for row in results("losses")["rows"]
    ]  # fmt: skip
    assert table_after("losses.md", "loss | pairs") == expected


def test_table_of_the_loaders_speed_is_what_the_benchmark_wrote() -> None:
    expected = []
    for case, found in results("loader").items():
        for system, row in found["systems"].items():
            memory = f"{row['worker_mib']:,.0f} ({row['worker_private_mib']:.0f})" if row["worker_mib"] else ""
            share = f"{row['of_limit']:.0%}".replace("%", " %") if "of_limit" in row else ""
            rate, times = f"{row['samples_per_second']:,.0f}", f"{row['of_open_clip']:.2f}"
            expected.append([case, system, rate, times, share, memory])
    assert table_after("experiments.md", "case | system") == expected


def test_table_of_the_losses_on_a_gpu_is_what_the_benchmark_wrote() -> None:
    expected = []
    for row in results("losses_gpu")["rows"]:
        peer = "open_clip_seconds" in row
        expected.append([
            row["loss"], f"{row['pairs']:,}", "TF32" if row["tf32"] else "float32",
            f"{1e3 * row['open_clip_seconds']:.1f}" if peer else "", f"{1e3 * row['ours_seconds']:.1f}",
            f"{row['times_as_fast']:.2f}" if peer else "",
            f"{row['open_clip_mib']:,.0f}" if peer else "", f"{row['ours_mib']:,.0f}",
            f"{row['memory_share']:.1%}".replace("%", " %") if peer else "",
        ])  # fmt: skip
    assert table_after("experiments.md", "loss | pairs | products") == expected


def test_table_of_plans_beside_published_runs_is_what_the_benchmark_wrote() -> None:
    expected = [
        [
            row["model"], f"{row['gpus']}", f"{row['rows']}", "yes" if row["checkpointing"] else "no",
            f"{row['planned']:.0f}", f"{row['measured']:.0f}", f"{row['planned'] / row['measured']:.2f}",
        ]
        for row in results("plan")["published"]
    ]  # fmt: skip
    assert table_after("planning.md", "model | GPUs") == expected


def test_table_of_plans_beside_steps_is_what_the_benchmark_wrote() -> None:
    expected = [
        [
            row["case"], row["quantity"], f"{row['planned']:,.2f}", f"{row['measured']:,.2f}",
            f"{row['planned'] / row['measured']:.2f}",
        ]
        for row in results("plan")["rows"]
    ]  # fmt: skip
    assert table_after("planning.md", "case | quantity") == expected


def test_table_of_the_steps_cost_is_what_the_benchmark_wrote() -> None:
    expected = [
        [str(found["threads"]), way["way"], way["beside"], f"{way['ms']:.0f}", f"{way['bare']:.0f}",
         f"{way['ratio']:.3f}", "{:.2f} - {:.2f}".format(*way["quartiles"]), f"{way['overhead']:+.1%}"]
        for _, found in sorted(results("step").items())
        for way in found["ways"]
    ]  # fmt: skip
    assert table_after("training-time.md", "threads | way") == expected


def test_table_of_a_checkpoints_cost_is_what_the_benchmark_wrote() -> None:
    seconds = results("checkpoint")["seconds"]
    expected = [[f"{taken:.2f}", f"{taken / seconds['disk']:.2f}"] for taken in seconds.values()]
    assert [row[1:] for row in table_after("reliability.md", "what | seconds")] == expected


def test_table_of_the_probes_sweeps_is_what_the_benchmark_wrote() -> None:
    def times(row: dict, kind: str) -> str:
        return ("at least " if row.get(f"{kind}_is_a_lower_bound") else "") + f"{row[f'{kind}_ratio']:.1f}"

    expected = [
        [
            row["set"], f"{row['samples']:,} x {row['width']:,}, {row['classes']} classes",
            f"{row['sweep']}, {row['strengths']}", f"{row['seconds']:.1f}", f"{row['largest_gap']:.0e}",
            times(row, "same"), times(row, "default"), times(row, "warm"),
            f"{row['iterations_with']:,} / {row['iterations_without']:,}",
            f"{row['gemm_share']:.0%}".replace("%", " %"),
        ]
        for row in results("probe")["rows"]
    ]  # fmt: skip
    assert table_after("probing.md", "set | size") == expected
