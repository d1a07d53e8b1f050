"""The command line's frame: choosing a command, help, exit codes, and what is imported."""

import subprocess
import sys
import types
from importlib.metadata import version

import pytest

import contrastive
from contrastive import cli
from contrastive.errors import UserError


@pytest.fixture
def command(monkeypatch):
    """Make `contrastive train` do what the test wants."""

    def install(run):
        module = types.SimpleNamespace(NAME="train", HELP="do it", run=run)
        module.add_arguments = lambda parser: (
            parser.add_argument("recipe"),
            parser.add_argument("overrides", nargs="*"),
            parser.add_argument("--dry-run", action="store_true"),
        )
        monkeypatch.setitem(sys.modules, "contrastive.cli.train", module)

    return install


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_exit_code_is_that_of_the_command(command):
    command(lambda args: 7)
    assert cli.main(["train", "r.yaml"]) == 7


def test_overrides_may_stand_on_both_sides_of_an_option(command):
    seen = []
    command(lambda args: seen.append(args) or 0)
    cli.main(["train", "r.yaml", "a.b=1", "--dry-run", "c.d=x=2"])
    assert (seen[0].recipe, seen[0].overrides, seen[0].dry_run) == ("r.yaml", ["a.b=1", "c.d=x=2"], True)


def test_a_command_may_be_given_no_overrides(command):
    seen = []
    command(lambda args: seen.append(args) or 0)
    cli.main(["train", "r.yaml"])
    assert seen[0].overrides == []


def test_a_users_mistake_is_one_line_and_exit_code_2(command, capsys):
    def run(args):
        raise UserError("train.lr: unknown key")

    command(run)
    assert cli.main(["train", "r.yaml"]) == 2
    assert capsys.readouterr().err == "error: train.lr: unknown key\n"


def test_another_exception_is_not_swallowed(command):
    def run(args):
        raise RuntimeError("a bug")

    command(run)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["train", "r.yaml"])


def test_an_interrupt_is_exit_code_130(command, capsys):
    def run(args):
        raise KeyboardInterrupt

    command(run)
    assert cli.main(["train", "r.yaml"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_an_unknown_option_is_one_line_and_exit_code_2(command, capsys):
    command(lambda args: 0)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "r.yaml", "--dryrun"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --dryrun (see `contrastive train --help`)\n"


def test_an_unknown_command_suggests_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'trian'. Did you mean 'train'?\n"


def test_a_command_like_no_other_lists_them_all(capsys):
    assert cli.main(["frobnicate"]) == 2
    shown = capsys.readouterr().err
    assert all(name in shown for name in cli.COMMANDS)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_command_with_its_help(argv, capsys):
    try:
        assert cli.main(argv) == 0
    except SystemExit as stop:  # argparse leaves this way
        assert stop.code == 0
    shown = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert any(line.split()[:1] == [name] and len(line.split()) > 2 for line in shown.splitlines())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_describes_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: contrastive {name} ")


def test_version_is_that_of_the_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"contrastive {version('contrastive')}\n"


def test_python_m_contrastive_is_the_command_line():
    done = subprocess.run([sys.executable, "-m", "contrastive", "trian"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: unknown command 'trian'. Did you mean 'train'?\n")


def test_importing_the_package_loads_nothing_heavy():
    assert python("import sys, contrastive; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))") == "set()"


def test_help_loads_nothing_heavy():
    code = "import sys; from contrastive.cli import main; main([]); print({'torch', 'numpy'} & set(sys.modules))"
    assert python(code).splitlines()[-1] == "set()"


def test_a_command_imports_no_other_command():
    code = "import sys; from contrastive.cli import main; main(['recipes', 'list']); "
    code += "print(sorted(name for name in sys.modules if name.startswith('contrastive.cli.')))"
    assert python(code).splitlines()[-1] == "['contrastive.cli.recipes']"


@pytest.mark.parametrize("name", ["LinearProbe", "ZeroShotClassifier", "embed", "load"])
def test_a_public_name_is_found_when_it_is_used(name):
    assert name in dir(contrastive)
    assert callable(getattr(contrastive, name))


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        contrastive.nothing  # noqa: B018
