"""Variables that accelerate reads: refused, or without effect on gradients and on the names of weights."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from safetensors.torch import load_file

from contrastive.errors import UserError
from contrastive.training.launcher_settings import (
    SETTINGS,
    Harmless,
    Refused,
    check_launcher_settings,
    notes_on_settings,
    setting_of,
)
from tests.distributed.spawn import PATIENCE
from tests.tiny import write_corpus, write_recipe

READERS = {"get", "getenv", "pop", "parse_flag_from_env", "parse_choice_from_env", "get_int_from_env"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def train(corpus: Path, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A run of the tiny recipe in a process of its own: accelerate reads its environment once."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "contrastive", "train", str(write_recipe(corpus, folder / "tiny.yaml")),
               f"run.dir={folder}/run", "train.steps=2", "data.validation=null"]  # fmt: skip
    plain = {name: value for name, value in os.environ.items() if setting_of(name) is None}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env={**plain, "OMP_NUM_THREADS": "1", **environment}
    )


def refused() -> list[tuple[str, str]]:
    values = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_DYNAMO_BACKEND": "inductor",
              "ACCELERATE_FP8_BACKEND": "AO", "ACCELERATE_TORCH_DEVICE": "cuda:1"}  # fmt: skip
    return [(name, values.get(name, "true")) for name, row in SETTINGS.items() if isinstance(row, Refused)]


@pytest.mark.parametrize(("name", "value"), [*refused(), ("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER"),
                                             ("ACCELERATE_USE_FSDP", "1")])  # fmt: skip
def test_a_setting_that_would_change_a_run_is_refused_with_its_remedy(name, value):
    with pytest.raises(UserError, match=f"{name}={value}.*unset it") as caught:
        check_launcher_settings({name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name, _ in refused()])
def test_a_setting_that_is_off_is_not_refused(name):
    check_launcher_settings({name: ""})
    check_launcher_settings({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_DYNAMO_BACKEND": "NO",
                             "ACCELERATE_USE_FSDP": "false"})  # fmt: skip


def test_a_refused_setting_ends_the_command_before_it_writes(corpus, tmp_path):
    done = train(corpus, tmp_path, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"})
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4" in lines[0] and "train.chunk" in lines[0]


def test_what_is_not_refused_changes_neither_gradients_nor_names(corpus, tmp_path):
    """All of it at once, with values that accelerate understands."""
    values = {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_DYNAMO_MODE": "max-autotune", "FSDP_VERSION": "2",
              "ACCELERATE_DYNAMO_USE_FULLGRAPH": "true", "FSDP_OFFLOAD_PARAMS": "true", "FSDP_USE_ORIG_PARAMS": "true",
              "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_GRADIENT_CLIPPING": "0.001", "FP8_MARGIN": "2",
              "MEGATRON_LM_TP_DEGREE": "2", "PARALLELISM_CONFIG_TP_SIZE": "2", "ACCELERATE_FP8_FORMAT": "E4M3",
              "ACCELERATE_INIT_INCLUDE_BUFFERS": "true", "ACCELERATE_BYPASS_DEVICE_MAP": "true",
              "ACCELERATE_DEBUG_MODE": "true", "ACCELERATE_LOG_LEVEL": "ERROR", "ACCELERATE_DOWNCAST_BF16": "true",
              "ACCELERATE_ALLOW_CP_STANDALONE": "true", "ACCELERATE_USE_CPU": "true", "FORK_LAUNCHED": "0",
              "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "ACCELERATE_SPLIT_BATCHES": "true"}  # fmt: skip
    plain, other = train(corpus, tmp_path / "plain", {}), train(corpus, tmp_path / "other", values)
    assert plain.returncode == other.returncode == 0, other.stderr[-2000:]
    assert "ACCELERATE_MIXED_PRECISION=fp16 is not followed; train.precision says fp32" in other.stdout
    for name in ("model", "optimizer"):
        file = f"run/checkpoints/step_2/{name}.safetensors"
        expected, found = load_file(tmp_path / "plain" / file), load_file(tmp_path / "other" / file)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_notes_name_what_is_not_followed():
    assert list(notes_on_settings("bf16", False, {"ACCELERATE_MIXED_PRECISION": "no"})) == []
    assert list(notes_on_settings("bf16", False, {"ACCELERATE_MIXED_PRECISION": "BF16"})) == []
    (note,) = notes_on_settings("fp32", False, {"NVIDIA_TF32_OVERRIDE": "1"})
    assert "NVIDIA_TF32_OVERRIDE=1 changes the rounding" in note


def variables_of(file: Path) -> set[str]:
    """Names of environment variables that a file of source reads or writes."""
    found: set[str] = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for part in ast.walk(tree):
        if not isinstance(part, (ast.FunctionDef, ast.Module)):
            continue
        prefixes = {
            target.id: node.value.value
            for node in ast.walk(part)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name) and isinstance(node.value.value, str)
        }
        if isinstance(part, ast.Module) and len(prefixes) > 50:
            prefixes = {}
        for node in ast.walk(part):
            keys: list[ast.expr] = []
            if isinstance(node, ast.Call) and node.args:
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                on_environ = name not in ("get", "pop") or "environ" in ast.unparse(node.func)
                if name in READERS and on_environ:
                    first = node.args[0]
                    keys = first.elts if isinstance(first, ast.List) else [first]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                keys = [node.slice]
            for key in keys:
                if isinstance(key, ast.Constant):
                    found.add(str(key.value))
                elif (
                    isinstance(key, ast.BinOp)
                    and isinstance(key.left, ast.Name)
                    and isinstance(key.right, ast.Constant)
                ):
                    found.add(prefixes.get(key.left.id, "?") + str(key.right.value))
    return {name for name in found if not name.startswith("?")}


def test_every_variable_that_accelerate_reads_has_a_row():
    package = Path(accelerate.__file__).parent
    files = [file for file in package.rglob("*.py") if not {"test_utils", "commands"} & set(file.parts)]
    found = set().union(*map(variables_of, files))
    assert {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND", "FSDP_VERSION"} <= found
    examples = {"FOO"}  # of a docstring
    assert sorted(name for name in found - examples if setting_of(name) is None) == []


def test_a_row_says_why_it_is_harmless():
    assert all(row.why for row in SETTINGS.values() if isinstance(row, Harmless))
