"""``contrastive plan``: what it prints, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from contrastive.cli import main
from tests.tiny import write_corpus, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("plan")
    return str(write_recipe(write_corpus(folder / "corpus"), folder / "tiny.yaml"))


def test_the_plan_is_printed(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe, "--gpus", "4", "--gpu", "a100-40", "train.steps=5"]) == 0
    shown = capsys.readouterr().out
    for part in ("parameters", "FLOPs a sample", "memory of a card", "=> fits", "bound by", "the run", "assumed"):
        assert part in shown


def test_an_option_changes_what_it_names(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for share in ("0.2", "0.4"):
        assert main(["plan", recipe, "--gpu", "h100", "--utilisation", share, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [plan["assumptions"]["utilisation"] for plan in found] == [0.2, 0.4]
    seconds = [plan["seconds"]["towers, products"] for plan in found]
    assert seconds[0] == pytest.approx(2 * seconds[1])


def test_an_unknown_gpu_is_one_line_and_exit_code_2(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe, "--gpu", "t1000"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --gpu t1000: unknown; ") and said.count("\n") == 1 and "h200" in said


def test_help_and_a_wrong_gpu_load_no_torch() -> None:
    code = "import sys; from contrastive.cli import main\ntry: main(['plan', '--help'])\nexcept SystemExit: pass\n"
    code += "assert main(['plan', 'pretrain/vit-b-32', '--gpu', 'nothing']) == 2\n"
    code += "print({'torch', 'numpy'} & set(sys.modules))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.splitlines()[-1] == "set()"
