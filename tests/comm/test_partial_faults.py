"""How a job with partial collectives ends when a rank fails or it is interrupted: soon, said, and without a trace."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import _end

pytestmark = pytest.mark.horovod

TESTS = Path(__file__).parents[1]
PROGRAM = TESTS / "ranks_partial" / "faults.py"
SIZE, HANG_SEC = 3, 120
ENDLESS = ["cluster.classes.slow.slowdown=1", "train.epochs=100000", "train.tau={fast: 8, slow: 4}",
           "train.batch_size=16", "eval.every_epochs=100"]
"""An epoch has fewer steps than those after which ``own_parts:fails_on_rank_1`` does, so it does so in mid-run."""
JOBS = {
    "eager": ["algorithm.name=eager_sgd"],
    "merging": ["aggregation.mode=solo"],
    "server": ["algorithm.name=asgd"],
}


class Running:
    """A job in a session of its own, with all that is known of its processes."""

    def __init__(self, command: Sequence[Any], folder: Path, cwd: Path | None = None) -> None:
        self.folder = folder
        # a test in the background ignores SIGINT, and what it starts would too
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.ports: set[tuple[str, int]] = set()

    def processes(self) -> list[psutil.Process]:
        """All that name the job's folder in their command line."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.folder) in " ".join(process.cmdline()) and process.pid != os.getpid():
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def rank(self, rank: int) -> psutil.Process:
        """The process that is a rank, not the shell around it."""
        for process in self.processes():
            try:
                if process.environ().get("HOROVOD_RANK") == str(rank) and "python" in process.name():
                    return process
            except psutil.Error:
                continue
        raise AssertionError(f"rank {rank} is not there")

    def listening(self) -> set[tuple[str, int]]:
        pids = {process.pid for process in self.processes()}
        found = psutil.net_connections("inet")
        return {tuple(c.laddr) for c in found if c.pid in pids and c.status == psutil.CONN_LISTEN}

    def await_mid_run(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + HANG_SEC
        while not true():
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate(timeout=10)
            time.sleep(0.05)
        self.ports = self.listening()
        assert self.ports, "Horovod's at least: else this would look at nothing"

    def end(self) -> str:
        """Waits for the end and sees that nothing is left; returns what was said."""
        try:
            out, err = self.process.communicate(timeout=HANG_SEC)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it does not end: {_end(self.process)}")
        assert self.process.returncode not in (0, 2), out + err
        assert self.processes() == [], out + err
        found = psutil.net_connections("inet")
        assert not {tuple(c.laddr) for c in found if c.status == psutil.CONN_LISTEN} & self.ports
        return out + err


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """``started(command)`` starts a job that names ``tmp_path``; whatever is left of it is ended after the test."""
    jobs = []

    def start(command: Sequence[Any], **options: Any) -> Running:
        jobs.append(Running(command, tmp_path, **options))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            _end(job.process)
        for process in job.processes():
            process.kill()


def launched(started: Callable[..., Running], job: str, folder: Path, *more: str) -> Running:
    command = [sys.executable, "-m", "hvd_hetero", "launch", f"run.dir={folder / 'run'}", *JOBS[job], *ENDLESS, *more]
    return started(command, cwd=TESTS / "ranks")


def assert_said_by_the_launcher(output: str, how: str) -> None:
    """Rank 1 and how it ended; or a survivor that left sooner than horovodrun looked, which then says why itself."""
    found = re.search(r"^hvd-hetero: error: the job failed: rank (\d) on \S+ ended first, ([^;\n]*)", output, re.M)
    assert found is not None, output
    if found[1] == "1":
        assert found[2] == how
    else:
        assert f"hvd-hetero: error: rank {found[1]} on localhost stops: " in output, output


def in_mid_run(folder: Path) -> Callable[[], bool]:
    rows = folder / "run" / "metrics.jsonl"
    return lambda: rows.exists() and rows.stat().st_size > 0


# ---- the collective alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["solo", "server", *(
    pytest.param(mode, marks=pytest.mark.slow) for mode in ("majority", "quorum"))])
@pytest.mark.parametrize("how", [pytest.param("exception", marks=pytest.mark.slow), "SIGKILL"])
def test_a_rank_that_is_lost_ends_the_collective(
    started: Callable[..., Running], tmp_path: Path, mode: str, how: str
) -> None:
    """No other rank goes on, whether it was about to start a round or waited for one."""
    line = [Path(sys.executable).with_name("horovodrun"), "--gloo", "-np", SIZE, "-H", f"localhost:{SIZE}"]
    job = started([*line, sys.executable, PROGRAM, tmp_path, mode, int(how == "exception")])
    job.await_mid_run(lambda: len(list(tmp_path.glob("*.there"))) == SIZE)
    hub = int((tmp_path / "port").read_text())
    assert hub not in {port for _, port in job.ports}, "its port is closed as soon as all ranks are connected"
    if how == "SIGKILL":
        job.rank(1).kill()
    output = job.end()
    if how == "exception":
        assert "rank 1 on localhost failed: RuntimeError: the disk of rank 1 is on fire" in output
    assert re.search(r"Process name: 1$|rank [02] on localhost stops: ", output, re.M), output


# ---- whole jobs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_an_exception_on_one_rank(started: Callable[..., Running], tmp_path: Path, job: str) -> None:
    running = launched(started, job, tmp_path, "train.loss=own_parts:fails_on_rank_1")
    output = running.end()
    assert "hvd-hetero: error: rank 1 on localhost failed: RuntimeError: the disk of rank 1 is on fire" in output
    assert_said_by_the_launcher(output, "with status 1")
    assert in_mid_run(tmp_path)() and not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("job", ["eager", "server", pytest.param("merging", marks=pytest.mark.slow)])
def test_a_rank_that_is_killed(started: Callable[..., Running], tmp_path: Path, job: str) -> None:
    running = launched(started, job, tmp_path)
    running.await_mid_run(in_mid_run(tmp_path))
    running.rank(1).kill()
    assert_said_by_the_launcher(running.end(), "killed by SIGKILL")
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_an_interrupted_launch(started: Callable[..., Running], tmp_path: Path, job: str) -> None:
    """As Ctrl-C, to the launcher alone; where there are no checkpoints it saves nothing first."""
    running = launched(started, job, tmp_path, "checkpoint.every_sec=null")
    running.await_mid_run(in_mid_run(tmp_path))
    running.process.send_signal(signal.SIGINT)
    output = running.end()
    assert "hvd-hetero: error: the job failed: rank " in output, output
    assert not (tmp_path / "run" / "summary.json").exists()
