"""Ranks that hang, are stopped, or have lost their launcher: named, ended, and nothing left of the job."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from job_helpers import processes_with, rank_pids, when

from hvd_hetero.comm.kv_store import ORPHAN
from hvd_hetero.errors import EXIT_STUCK
from hvd_hetero.telemetry.heartbeat import Heartbeat
from hvd_hetero.training.watchdog import BEATS_PER_SEC, SILENT_BEATS, PeerStatus, rhythm

RANKS = Path(__file__).parents[1] / "ranks"
ENDLESS = ["train.tau={fast: 8, slow: 4}", "cluster.classes.slow.slowdown=1", "train.epochs=1000000"]


def in_mid_run(folder: Path) -> Callable[[], bool]:
    rows = folder / "metrics.jsonl"
    return lambda: rows.exists() and rows.stat().st_size > 0


# ---- real jobs ------------------------------------------------------------------------------------------------------


def test_a_rank_that_hangs_in_the_users_code_is_named_with_its_stack(
    hvd_hetero: Callable[..., Any], tmp_path: Path
) -> None:
    done = hvd_hetero(["launch", *ENDLESS, f"run.dir={tmp_path / 'run'}", "run.watchdog_sec=5",
                       "model.target=hangs:writer", "model.args={at: 300}"], cwd=RANKS)
    assert done.returncode == EXIT_STUCK, done.stdout + done.stderr
    assert "hvd-hetero: error: rank 1 on localhost has made no progress for 5 s in local step\n" in done.stderr
    assert "hangs.py" in done.stderr and "in forward" in done.stderr, "its stack"
    assert "hvd-hetero: error: the job failed: rank 1 on localhost ended first, with status 5; it said: " in done.stderr
    assert processes_with(str(tmp_path)) == []


@pytest.mark.slow
def test_a_rank_that_lets_no_thread_run_says_where_it_is_and_is_ended(
    horovodrun: Callable[..., Any], tmp_path: Path
) -> None:
    done = horovodrun(2, [sys.executable, RANKS / "holds_the_gil.py"], cwd=tmp_path)
    assert done.returncode != 0
    assert "rank 1 on localhost has said nothing for 6 s" in done.stderr
    assert "Timeout (0:00:04" in done.stderr and "in forward" in done.stderr, "its stack, by a thread without Python"
    assert processes_with("holds_the_gil.py") == []


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_by_the_other(hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    """It cannot say anything itself; and it is killed, which a polite signal would not do."""
    folder = tmp_path / "run"

    def stop() -> None:
        for pid in rank_pids(folder, 1):
            os.kill(pid, signal.SIGSTOP)

    when(in_mid_run(folder), stop)
    done = hvd_hetero(["launch", *ENDLESS, f"run.dir={folder}", "run.watchdog_sec=5"])
    assert done.returncode == EXIT_STUCK, done.stdout + done.stderr
    assert "hvd-hetero: error: rank 1 on localhost has said nothing for 5 s, last in " in done.stderr
    assert processes_with(str(tmp_path)) == []


@pytest.mark.slow
def test_ranks_without_a_launcher_leave(hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    """horovodrun and the processes between it and the ranks die at once, so that nobody is left to tell the ranks."""
    folder, orphans = tmp_path / "run", list[psutil.Process]()

    def orphan() -> None:
        ranks = [psutil.Process(pid) for rank in (0, 1) for pid in rank_pids(folder, rank)]
        above = {parent for rank in ranks for parent in rank.parents() if "hvd_hetero" in " ".join(parent.cmdline())}
        runner = [p for p in above if "horovodrun" in " ".join(p.cmdline())]
        between = [p for rank in ranks for p in rank.parents() if any(r in p.parents() for r in runner)]
        orphans.extend(ranks)
        for process in [*runner, *between]:
            process.suspend()  # else the first one's end would be noticed by the next
        for process in {*runner, *between}:
            process.kill()

    acting = when(in_mid_run(folder), orphan)
    done = hvd_hetero(["launch", *ENDLESS, f"run.dir={folder}"], env={ORPHAN: "2"})
    acting.join()
    assert done.returncode != 0
    assert len(orphans) == 2
    gone, alive = psutil.wait_procs(orphans, timeout=60)
    assert alive == []


# ---- its parts ------------------------------------------------------------------------------------------------------


def test_what_was_waited_in_is_left_again() -> None:
    heartbeat = Heartbeat()
    heartbeat.begin("local step")
    before = heartbeat.count
    with pytest.raises(RuntimeError), heartbeat.waiting("average.0"):
        assert heartbeat.waits and heartbeat.phase == "collective average.0"
        raise RuntimeError
    assert not heartbeat.waits and heartbeat.phase == "local step"
    assert heartbeat.count > before, "to have come through a collective is progress"


def test_a_rank_is_silent_while_it_says_nothing_new() -> None:
    sight = PeerStatus()
    assert not sight.update(None, 5.0), "it has not begun"
    beat = {"number": 1, "host": "h2", "phase": "local step"}
    assert sight.update(beat, 5.0) and sight.silent_sec == 0
    assert not sight.update(dict(beat), 5.0) and not sight.update(None, 4.0)
    assert str(sight) == "on h2 has said nothing for 9 s, last in local step"
    assert sight.update(beat | {"number": 2}, 5.0) and sight.silent_sec == 0


def test_many_ranks_speak_less_often_and_are_given_up_later() -> None:
    assert rhythm(2, 600, 30) == rhythm(500, 600, 30) == (5, 35), "few speak as often as they like"
    assert rhythm(2, 8, 30) == (2, 8) and rhythm(2, math.inf, 1) == (5, 6)
    for size in (1000, 10000):
        every_sec, silent_sec = rhythm(size, 600, 30)
        assert size / every_sec == BEATS_PER_SEC and silent_sec >= SILENT_BEATS * every_sec
