"""``hvd-hetero status``, ``save`` and ``stop``: what they tell of a run that goes on, and what it does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from method_helpers import of

from hvd_hetero import algorithms
from hvd_hetero.analysis.live.status import ask, text, to_dict
from hvd_hetero.checkpoint import Store
from hvd_hetero.cli import main
from hvd_hetero.cluster.device_classes import DeviceClass
from hvd_hetero.config.load import load
from hvd_hetero.data import TensorSource
from hvd_hetero.errors import EXIT_BAD_INPUT, EXIT_STOPPED, ConfigError
from hvd_hetero.planning.plan import ClassPlan, Plan
from hvd_hetero.planning.schedules import left_sec
from hvd_hetero.telemetry.progress import span
from hvd_hetero.telemetry.run_status import LIVE_TRACE, LOOK, STATUS, StatusReader, own_mark
from hvd_hetero.telemetry.stopwatch import Stopwatch
from hvd_hetero.telemetry.time_accounts import Accounts
from hvd_hetero.telemetry.trace import from_chrome
from hvd_hetero.training.live_status import LiveStatus, rounds_of
from hvd_hetero.worker.epoch import Epoch, Progress

RANKS = Path(__file__).parents[1] / "ranks"
SETTINGS = ["train.tau={fast: 8, slow: 2}", "cluster.classes.slow.slowdown=4", "train.epochs=100000",
            "checkpoint.every_sec=3600", "train.loss=own_parts:bad_on_rank_1", "run.trace_rounds=0"]  # fmt: skip
MOST_SEC = 240.0
ALONE = (DeviceClass("fast", "cpu", (0,)),)


def until(what: Callable[[], Any]) -> Any:
    """What is true in the end."""
    deadline = time.monotonic() + MOST_SEC
    while not (found := what()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


@pytest.mark.horovod
def test_a_run_tells_how_it_stands_saves_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    line = [sys.executable, "-m", "hvd_hetero", "launch", *SETTINGS, f"run.dir={run}"]
    job = subprocess.Popen(line, cwd=RANKS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        def told() -> dict[str, Any]:
            assert job.poll() is None, job.communicate()[0]
            return to_dict(StatusReader(run)()) if (run / STATUS).exists() else {}

        until(lambda: told().get("classes", {}).get("slow", {}).get("excluded"))
        now = told()
        fast, slow = now["classes"]["fast"], now["classes"]["slow"]
        assert now["phase"] in ("training", "evaluating")
        assert now["epochs"] == 100000 and now["round"] > now["epoch"] > 0
        assert fast["tau"] == 8 and slow["tau"] == 2 and fast["excluded"] == 0 < slow["excluded"] <= now["round"]
        assert fast["steps_per_sec"] == pytest.approx(4 * slow["steps_per_sec"])
        assert all(0 <= c["blocked_fraction"] <= 1 for c in (fast, slow))
        assert 0 < now["eval_accuracy"] <= 1 and now["left_sec"] > 0 and 0 < now["share_done"] < 1
        assert now["checkpoint"]["round"] is None and now["checkpoint"]["age_sec"] > 0

        assert main(["save", str(run)]) == 0
        saved = until(lambda: Store(run).candidates())[0].round
        until(lambda: told()["checkpoint"]["round"] == saved > 0)
        assert not (run / "save").exists()

        (run / LOOK).touch()
        until((run / LIVE_TRACE).exists)
        spans, lanes = from_chrome(json.loads((run / LIVE_TRACE).read_text()))
        assert len(lanes) == 2 and all({"compute", "comm"} <= {kind for kind, *_ in own} for own in spans)
        steps = [sum(kind == "compute" for kind, *_ in own) for own in spans]
        assert steps[0] > steps[1] > 0
        until(lambda: not (run / LOOK).exists())

        assert main(["status", str(run)]) == 0
        assert main(["stop", str(run)]) == 0
        shown = capsys.readouterr().out
        assert "slow   1      2" in shown and "accuracy" in shown and "left" in shown and "saves and ends" in shown
        output = job.communicate(timeout=MOST_SEC)[0]
    finally:
        job.terminate()
        job.wait(60)
    assert job.returncode == EXIT_STOPPED, output
    assert main(["status", "--watch", "--json", str(run)]) == 0, "it ends, since the run has"
    end = json.loads(capsys.readouterr().out)
    newest = max(found.round for found in Store(run).candidates())
    assert end["phase"] == "stopped" and end["checkpoint"]["round"] == newest > saved
    for command in ("stop", "save"):
        assert main([command, str(run)]) == EXIT_BAD_INPUT
        assert f"RUN='{run}': has ended (stopped); there is nothing to {command}" in capsys.readouterr().err
        assert not (run / command).exists()


def write(folder: Path, **content: Any) -> Path:
    (folder / STATUS).write_text(json.dumps({"phase": "training", **own_mark(), **content}))
    return folder


def test_a_rank_that_is_gone_without_a_word(tmp_path: Path) -> None:
    """By its number, where the machine has not been started again meanwhile."""
    found = StatusReader(write(tmp_path))()
    assert found.phase == "training" and found.here and not found.silent
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    assert StatusReader(write(tmp_path, pid=int(ended.stdout)))().phase == "failed"
    assert StatusReader(write(tmp_path, boot="an earlier one"))().phase == "failed"
    long_ago = StatusReader(write(tmp_path, monotonic_sec=time.monotonic() - 500))()
    assert long_ago.phase == "training" and long_ago.silent and 500 <= long_ago.silent_sec < 5000
    assert "may have died" in text(long_ago)
    with pytest.raises(ConfigError, match="has ended"):
        ask(write(tmp_path, pid=int(ended.stdout)), "stop")


def test_of_another_machine_only_what_is_seen_from_here_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its clock nor its processes."""
    now = 1e6
    monkeypatch.setattr(time, "monotonic", lambda: now)
    there = {"host": "elsewhere", "boot": "another", "pid": 2**30, "monotonic_sec": 3.0}
    read = StatusReader(write(tmp_path, **there))
    assert read().phase == "training" and read().silent_sec == 0 and "by the clock there" in text(read())
    now += 130
    assert read().silent and read().silent_sec == 130
    write(tmp_path, **there, round=5)
    assert read().silent_sec == 0


def test_one_that_does_not_listen_is_not_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hears nothing; .*SIGTERM"):
        ask(write(tmp_path, checkpoint=None), "save")
    assert not (tmp_path / "save").exists()
    assert "saves" in ask(write(tmp_path), "save"), "one that prepares is heard later"
    assert (tmp_path / "save").exists()


def test_folders_that_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused: dict[str, tuple[str, str | None]] = {
        "does not exist": ("none", None), "is not the folder of a run": ("empty", ""),
        "cannot be read: JSONDecodeError": ("cut", '{"phase": '), "cannot be read: KeyError": ("other", "{}"),
        "cannot be read: TypeError": ("list", "[]"),
    }
    for problem, (name, content) in refused.items():
        if content is not None:
            (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / STATUS).write_text(content)
        for command in ("status", "stop", "save"):
            assert main([command, str(tmp_path / name)]) == EXIT_BAD_INPUT
            assert problem in capsys.readouterr().err


def test_what_is_left_goes_by_the_pace_of_this_job() -> None:
    assert left_sec(10.0, 0.0, 0.25) == 30.0
    assert left_sec(10.0, 0.5, 0.75) == 10.0, "what was done before it was resumed tells nothing"
    assert left_sec(10.0, 0.5, 0.5) is None and left_sec(10.0, 0.0, 1.0) == 0.0


def test_how_times_are_written() -> None:
    assert [span(s) for s in (0.4, 59.4, 61, 3599, 3600, 7260)] == ["0 s", "59 s", "1 min", "1 h 0 min", "1 h 0 min",
                                                                   "2 h 1 min"]  # fmt: skip


@pytest.mark.horovod
def test_what_an_earlier_job_did_of_an_epoch_is_not_this_ones_pace() -> None:
    """It is resumed after 6 of 10 rounds, the last 2 of which were of twice as many steps."""
    plan = Plan((ClassPlan("fast", (0,), 4, 1, 1.0),), 10)
    epoch = Epoch(plan, np.zeros((40, 1), int), TensorSource(torch.zeros(9), torch.zeros(9)), torch.Generator())
    epoch.progress = Progress(4, 4)
    epoch.deal_rest(replace(plan, classes=(replace(plan.classes[0], tau=8),), rounds=3), np.zeros((24, 1), int))
    epoch.progress += Progress(2, 2)
    assert rounds_of(None) == 0 and rounds_of(epoch) == 4
    run: Any = SimpleNamespace(
        config=load((), {"train.epochs": 2}, algorithms.method), plan=replace(epoch.plan, rounds=5), folder=None,
        saver=None, watch=Stopwatch(), accounts=(accounts := Accounts(of(ALONE))), done=accounts.done, epoch=epoch,
        begin=0.0, job=None,
    )  # fmt: skip
    status = LiveStatus(run)
    status.begin()
    now = status._content
    assert now["share_done"] == pytest.approx(0.4) and now["left_sec"] is None and now["rounds_in_epoch"] == 6
