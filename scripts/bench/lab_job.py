"""Training jobs on two hosts h1 and h2 of a tool that makes hosts out of network namespaces and throttles ranks.

The tool's ``lab run --slow h2=SHARE -- COMMAND`` runs a command on h1, and gives the main thread of each rank on h2
that share of a core. ``--settle 0`` begins at once, so that speeds are measured as they will be. While a job runs,
``lab throttle r1 SHARE`` and ``lab signal r1 STOP`` change what rank 1 gets, and stop it.

Threads that a throttled thread starts share its quota, Horovod's among them if it begins at once: then an average
takes as long as the rest of the quota's period, 20 ms, as no slow accelerator's would. So until the training begins
the hosts' ranks are throttled anew (``lab throttle HOST|PID SHARE``) whenever they have started threads, which lets all
go but the main ones.

Each host has half of the machine's cores. Otherwise the system may leave a throttled rank on the core of a busy one,
which then loses what the other takes, while the other core idles.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a benchmark that is told to end takes its jobs along
MARK = "HVD_HETERO_BENCH"
SPEED_ONLY = ("train.epochs=null", "eval.every_epochs=1000000", "data.args.validation=0.01")
"""For runs of which only the speed counts: a small part of the training set stands in for the test set."""


def summary_of(lab: str, arguments: Sequence[str], share: float, *,
               faults: Sequence[tuple[float, str]] = (), fast_share: float | None = None) -> dict[str, Any]:
    """Runs one job and returns its summary, with its ``rows``; what it prints goes to standard error.

    Args:
        arguments: configuration files and ``key=value``.
        share: of a core, for each rank on h2.
        fast_share: of a core, for each rank on h1; None: as much as it takes.
        faults: seconds after the training has begun, in order, and what the tool is then told, for example
            ``(20, "throttle r1 0.05")``.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        job = begin(lab, launch_of(arguments, run), by_host(share, fast_share), run / "plan.json")
        with ended_if_this_fails(job):
            _inflict(lab, faults, job)
            job.wait()
        if job.returncode != 0:
            raise subprocess.CalledProcessError(job.returncode, job.args)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return {**json.loads((run / "summary.json").read_text()), "rows": rows}


def launch_of(arguments: Sequence[str], run: Path) -> list[str]:
    """The command that trains on these hosts; the run's ``plan.json`` is there as soon as it does."""
    # the quota holds for one thread, and both hosts show the same cores
    classes = ["cluster.hosts=h1:1,h2:1", "cluster.classes.slow.slowdown=1", "cluster.classes.fast.threads=1",
               "cluster.classes.slow.threads=1"]
    return [sys.executable, "-m", "hvd_hetero", "launch", *arguments, f"run.dir={run}", *classes, "profile.seconds=6",
            "profile.reuse=false", "cluster.affinity=false"]


def by_host(share: float, fast_share: float | None = None) -> list[tuple[str, float]]:
    """The hosts whose ranks are throttled, and the share of a core that each gets."""
    return [(host, part) for host, part in (("h1", fast_share), ("h2", share)) if part]


def begin(lab: str, command: Sequence[str], throttles: Sequence[tuple[str, float]],
          begun: Path) -> subprocess.Popen[bytes]:
    """Starts a command with its ranks throttled, see :func:`by_host`, and on the cores of their hosts.

    Returns when it has made a file, or has ended.
    """
    slow = [word for host, part in throttles for word in ("--slow", f"{host}={part}")]
    mark = f"{MARK}={uuid.uuid4().hex}"  # ranks have it in their environment, as the launcher's whole
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", MARK: mark.partition("=")[2]}
    job = subprocess.Popen([lab, "run", "--settle", "0", *slow, "--", *command], env=env, stdout=sys.stderr)
    known: set[int] | None = None
    with ended_if_this_fails(job):
        while job.poll() is None:
            waited = time.monotonic()
            while not (there := begun.exists()) and time.monotonic() - waited < 0.5:
                time.sleep(0.02)
            threads = _pinned(mark)
            if there and not threads:
                raise RuntimeError("no rank was found on h1 and h2")
            if threads != known:  # not each time: the tool takes a third of a second of a core
                words = [[lab, "throttle", host, str(part)] for host, part in throttles]
                failed = [subprocess.run(w, check=False, stderr=subprocess.DEVNULL).returncode for w in words]
                known = None if any(failed) else threads  # there is nothing to throttle yet, or somebody else was at it
            if there and known is not None:
                break
    return job


@contextmanager
def ended_if_this_fails(job: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        job.terminate()
        job.wait()
        raise


def cores_of_hosts() -> dict[str, set[int]]:
    """The cores of each host; all of them where there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    return {"h1": set(cores[:half] or cores), "h2": set(cores[half:])}


def _pinned(mark: str) -> set[int]:
    """Gives the ranks of a job, and what they start from then on, the cores of their hosts; returns their threads."""
    threads = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            words = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            for host, cores in cores_of_hosts().items():
                if mark in words and f"HOROVOD_HOSTNAME={host}" in words:
                    threads |= {tid for tid in map(int, os.listdir(process / "task")) if _runs_on(tid, cores)}
        except OSError:  # it has ended meanwhile
            continue
    return threads


def _runs_on(thread: int, cores: set[int]) -> bool:
    try:
        os.sched_setaffinity(thread, cores)
    except ProcessLookupError:
        return False
    return True


def _inflict(lab: str, faults: Sequence[tuple[float, str]], job: subprocess.Popen[bytes]) -> None:
    """Does what is to be done, each thing so many seconds from now."""
    left, began = list(faults), time.monotonic()
    while left and job.poll() is None:
        if time.monotonic() - began >= left[0][0]:
            after, what = left.pop(0)
            print(f"{after:g} s of training: {what}", file=sys.stderr, flush=True)
            subprocess.run([lab, *what.split()], check=True)
        time.sleep(0.02)
    for after, what in left:
        print(f"never done: {what} after {after:g} s", file=sys.stderr, flush=True)
