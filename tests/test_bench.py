"""The programs under scripts/bench, as far as that takes no time: they start, say what they need, reckon rightly."""

from __future__ import annotations

import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.horovod

BENCH = Path(__file__).resolve().parents[1] / "scripts" / "bench"
PROGRAMS = sorted(path.name for path in BENCH.iterdir() if path.is_file() and not path.suffix)
NEED_A_LAB = ("blocked", "efficiency", "followed", "jitter", "methods", "peers", "speedup")

Run = Callable[..., Any]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Run:
    """``bench(name, *arguments)`` runs a program here and gives its exit status; ``bench(name)`` only loads it."""
    monkeypatch.syspath_prepend(str(BENCH))

    def run(name: str, *arguments: str) -> Any:
        if not arguments:
            return runpy.run_path(str(BENCH / name))
        monkeypatch.setattr(sys, "argv", [str(BENCH / name), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(BENCH / name), run_name="__main__")
        return ended.value.code

    return run


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_says_what_it_measures(bench: Run, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert bench(name, "--help") == 0
    assert f"scripts/bench/{name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", NEED_A_LAB)
def test_without_a_lab_nothing_is_measured(bench: Run, name: str) -> None:
    output = bench(name, "config.yaml")
    assert output.startswith(f"scripts/bench/{name}: needs --lab") and "nothing was measured" in output


def test_without_a_gpu_nothing_is_measured(
    bench: Run, capsys: pytest.CaptureFixture[str], without_gpus: None
) -> None:
    assert bench("gpu", "--seconds", "1") == 2
    assert "there is no GPU here" in capsys.readouterr().err


def summary(train_sec: float, steps: tuple[int, int], step_sec: tuple[float, float]) -> dict[str, Any]:
    return {"train_sec": train_sec,
            "classes": [{"steps": n, "step_sec": sec, "blocked_fraction": 0.0, "tau": 1}
                        for n, sec in zip(steps, step_sec, strict=True)]}


def test_speedup_is_for_a_step_of_the_fast_rank(bench: Run) -> None:
    """100 steps of 80 ms, and 96, a whole number of rounds, of 11 ms; the slow rank is 8 times slower."""
    row = bench("speedup")["row"](summary(8.0, (100, 100), (0.01, 0.08)), summary(96 * 0.011, (96, 12), (0.01, 0.08)))
    assert row["speedup"] == pytest.approx(80 / 11) and row["of_one_over_r"] == pytest.approx(10 / 11)


def test_the_planner_meets_its_goal_on_both_counts(bench: Run) -> None:
    medians = bench("planner")["medians"]

    def run(off: float, blocked_off: float) -> dict[str, Any]:
        shares = {"fast": blocked_off, "slow": 0.0}
        return {"seconds": 1.0, "off": off, "off_by_run": 0.0, "blocked": shares, "blocked_off": shares,
                "blocked_off_by_run": shares}

    assert medians([run(0.09, -0.09), run(0.5, 0.5), run(-0.09, 0.0)])["met"]
    assert not medians([run(-0.11, 0.0)])["met"] and not medians([run(0.0, -0.11)])["met"]


def test_peers_share_each_epoch_without_overlap(bench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_of_epoch = bench("peers_ranks.py")["rows_of_epoch"]
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    parts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("HOROVOD_RANK", rank)
        parts.append(rows_of_epoch(103, 4, 0, 7))
    assert [part.shape for part in parts] == [(12, 4), (12, 4)]
    assert len(np.unique(np.concatenate(parts))) == 96
    assert not np.array_equal(parts[1], rows_of_epoch(103, 4, 1, 7)), "each epoch has an order of its own"


def test_one_peer_that_is_not_there_in_some_seed_is_never_there(bench: Run) -> None:
    summarize = bench("peers")["summary"]
    rows = [{"seconds": 2.0, "accuracy": 0.8}, {"seconds": 4.0, "accuracy": 0.7}]
    assert summarize([{"seconds": 2.0, "rows": rows}])["seconds"] == 2.0
    assert summarize([{"seconds": 2.0, "rows": rows}, {"seconds": None, "rows": rows}])["seconds"] is None


RANK = """
import pathlib, signal, sys
run = pathlib.Path(sys.argv[-1].removeprefix("run.dir="))
turns = []
signal.signal(signal.SIGCONT, lambda *_: turns.append(1))
(run / "plan.json").touch()
while len(turns) < 3:
    signal.pause()
(run / "summary.json").write_text('{"samples_seen": 100}')
"""


def test_a_contenders_seconds_are_those_of_its_turns(
    bench: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that ends in its third turn; between its turns it is stopped for twice as long."""
    module = tmp_path / "lib" / "hvd_hetero"
    module.mkdir(parents=True)
    (module / "__main__.py").write_text(RANK)
    (run := tmp_path / "run").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(module.parent))
    parts = bench("efficiency")
    job = subprocess.Popen([sys.executable, "-m", "hvd_hetero", "train", f"run.dir={run}"], cwd=tmp_path)
    while not (run / "plan.json").exists():
        assert job.poll() is None
        time.sleep(0.01)
    written = (run / "plan.json").stat().st_mtime
    made, turn = parts["Contender"], parts["turn"]
    turn.__globals__["TURN_SEC"] = 0.1
    contender, turns = made(run, job), 0
    while not contender.over:
        time.sleep(0.2)
        turn(contender)
        turns += 1
    assert turns == 3, "it is stopped between its turns"
    assert 0 < contender.seconds <= time.time() - written - 0.2 * turns, "nothing between its turns counts"
    assert contender.rate() == pytest.approx(100 / contender.seconds)
    with pytest.raises(RuntimeError, match="0 processes in place of 1 are ranks of run"):
        made(run, job)
    contender.end()
