import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "against.py"


@pytest.fixture(scope="module")
def against() -> ModuleType:
    spec = importlib.util.spec_from_file_location("against", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_interval_is_that_of_a_paired_t_test_of_logarithms(against: ModuleType) -> None:
    rng = np.random.default_rng(0)
    pace = rng.uniform(1, 3, 12)  # of the machine, the same for both of a pair
    before, now = pace * rng.lognormal(0, 0.02, 12), 1.1 * pace * rng.lognormal(0, 0.02, 12)
    found = against.compare(before.tolist(), now.tolist())
    interval = stats.ttest_rel(np.log(now), np.log(before)).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], np.exp([interval.low, interval.high]), rtol=1e-12)
    assert found.low < found.ratio < found.high < 1.15 and found.low > 1.05  # pairs remove what the pace adds
    assert (found.before, found.now) == (pytest.approx(np.median(before)), pytest.approx(np.median(now)))


def test_a_machine_that_slows_down_favours_neither(against: ModuleType) -> None:
    clock = 1.0
    costs: dict[str, list[float]] = {"before": [], "now": []}
    for turn in range(20):
        for name in against.order(turn):
            costs[name].append(clock)
            clock *= 1.01
    assert against.compare(costs["before"], costs["now"]).ratio == pytest.approx(1, abs=1e-12)


def test_both_checkouts_run_in_turns(
    against: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, cost in (("before", 1.0), ("now", 1.25)):
        (tmp_path / name / "contrastive").mkdir(parents=True)
        (tmp_path / name / "contrastive" / "__init__.py").write_text(f"COST = {cost}\n")
    (tmp_path / "script.py").write_text(
        "import contrastive, json, pathlib\n"
        f"with open({str(tmp_path / 'log')!r}, 'a') as log: log.write(f'{{contrastive.COST}} ')\n"
        "size = pathlib.Path(log.name).stat().st_size\n"
        "print('something else')\n"
        "print(json.dumps({'seconds': contrastive.COST * (1 + size / 1e6)}))\n"
    )
    monkeypatch.setattr(against, "ROOT", tmp_path / "now")
    argv = ["against.py", str(tmp_path / "before"), "--turns", "3", "--", str(tmp_path / "script.py")]
    monkeypatch.setattr(sys, "argv", argv)
    assert against.main() == 0
    assert (tmp_path / "log").read_text().split() == ["1.25", "1.0", "1.0", "1.25", "1.25", "1.0", "1.0", "1.25"]
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row == ["seconds", "1", "1.25", "1.250", "+25.0", "%", "to", "+25.0", "%"]
    monkeypatch.setattr(sys, "argv", [*argv[:2], "--bound", "0.05", *argv[2:]])
    assert against.main() == 1


def test_a_run_that_fails_ends_the_comparison(
    against: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "script.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(SystemExit, match="script.py ended with exit code 3"):
        against.costs(tmp_path, [str(tmp_path / "script.py")])
