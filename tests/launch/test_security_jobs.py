"""Real jobs among strangers: what they say on the job's ports ends nothing, and none of the user's secrets gets out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from strangers import Strangers, family, listening

pytestmark = pytest.mark.horovod

LATE = Path(__file__).parents[1] / "ranks_partial" / "late_links.py"
SECRET = "hunter2-and-more"
QUICK = ["train.epochs=2", "train.tau={fast: 16, slow: 8}", "cluster.classes.slow.slowdown=1"]

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command under a careless umask and with secrets in its environment; ends what is left of it."""
    started: list[subprocess.Popen[str]] = []

    def begin(*words: Any, **variables: str) -> subprocess.Popen[str]:
        secrets = dict.fromkeys(("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HVD_HETERO_TOKEN"), SECRET)
        secrets["HTTPS_PROXY"] = f"http://me:{SECRET}@proxy"
        started.append(subprocess.Popen(
            [sys.executable, *map(str, words)], env={**os.environ, **secrets, **variables}, umask=0, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path, start_new_session=True,
        ))
        return started[-1]

    yield begin
    for process in started:
        for member in family(process.pid) if process.poll() is None else []:
            member.send_signal(signal.SIGKILL)


def is_store(process: Any) -> bool:
    """horovodrun itself, which keeps the job's key-value store."""
    words = process.cmdline()
    return any(word.endswith("/horovodrun") for word in words[:2]) or "hvd_hetero.comm.horovodrun" in words[:3]


def test_strangers_at_the_store_and_secrets_in_the_environment(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    job = start("-m", "hvd_hetero", "launch", f"run.dir={run}", *QUICK, 'launch.environment=[WANDB_API_KEY, "*"]')
    with Strangers(job.pid, is_store) as strangers:
        assert job.stdout is not None
        output, ports, variables = "", None, list[dict[str, str]]()
        for line in job.stdout:
            output += line
            if line.startswith("class fast") and ports is None and ": ranks" in line:
                ranks = [p for p in family(job.pid) if not is_store(p) and "train" in p.cmdline()]
                ports = [address for p in ranks for address in listening(p)]
                variables = [p.environ() for p in ranks if p.environ().get("HOROVOD_RANK")]
        status = job.wait(timeout=120)
    assert status == 0, output
    assert len(strangers.visits) == 1, strangers.visits
    assert ports == [], "once it runs, no rank can be connected to"
    assert "Traceback" not in output
    assert len(variables) >= 2
    assert all(each["WANDB_API_KEY"] == SECRET for each in variables), "it was asked for by name"
    assert not [each for each in variables if list(each.values()).count(SECRET) > 1 or "HTTPS_PROXY" in each]

    seen = [line for line in strangers.lines if "hvd_hetero" in line]
    assert len(seen) >= 3, "the launcher, horovodrun, and ranks"
    assert not [line for line in strangers.lines if SECRET in line]
    files = [path for path in run.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "summary.json", "manifest.json"} <= names
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    open_to_all = [path for path in (run.parent, run, *run.rglob("*")) if path.stat().st_mode & 0o022]
    assert open_to_all == [], "nobody else can change any of it, although the umask was 0"


@pytest.mark.slow
def test_strangers_at_the_channel_of_partial_collectives(start: Start, tmp_path: Path) -> None:
    """Its port is open until all ranks are there; here that takes them seconds."""
    told, program = tmp_path / "address", Path(sys.executable).with_name("horovodrun")
    job = start(program, "--gloo", "-np", "2", "-H", "localhost:2", sys.executable, LATE, "train",
                "algorithm.name=eager_sgd", "train.epochs=2", f"run.dir={tmp_path / 'run'}",
                "cluster.classes.slow.slowdown=1", HVD_HETERO_TEST_ADDRESS=str(told))
    with Strangers(job.pid, is_store) as strangers:
        deadline = time.monotonic() + 60
        while not told.exists() or not told.read_text().endswith("\n"):
            assert job.poll() is None and time.monotonic() < deadline, job.stdout and job.stdout.read()
            time.sleep(0.02)
        host, port = told.read_text().split()
        for _ in range(5):
            strangers.visit((host, int(port)))
        out, _ = job.communicate(timeout=120)
    assert job.returncode == 0, out
    assert host == "127.0.0.1", "all ranks are on one host"
    assert strangers.visits[host, int(port)] > 0
    assert (tmp_path / "run" / "summary.json").exists()
