"""Training jobs on two hosts h1 and h2 of a tool that makes hosts out of network namespaces and throttles ranks.

The tool's ``lab run --slow h2=SHARE -- COMMAND`` runs a command on h1, and gives the main thread of each rank on h2
that share of a core. ``--settle 0`` begins at once, so that speeds are measured as they will be. While a job runs,
``lab throttle r1 SHARE`` and ``lab signal r1 STOP`` change what rank 1 gets, and stop it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def summary_of(lab: str, arguments: Sequence[str], share: float, *, hosts: str = "h1:1,h2:1",
               faults: Sequence[tuple[float, str]] = ()) -> dict[str, Any]:
    """Runs one job and returns its summary; what it prints goes to standard error.

    Args:
        arguments: configuration files and ``key=value``.
        share: of a core, for each rank on h2.
        faults: seconds after the training has begun, in order, and what the tool is then told, for example
            ``(20, "throttle r1 0.05")``.
    """
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        command = [lab, "run", "--settle", "0", "--slow", f"h2={share}", "--",
                   sys.executable, "-m", "hvd_hetero", "launch", *arguments, f"run.dir={folder}/run",
                   f"cluster.hosts={hosts}", "cluster.classes.slow.slowdown=1",
                   "profile.seconds=6", "profile.reuse=false",
                   # the quota holds for one thread, and both hosts show the same cores
                   "cluster.classes.fast.threads=1", "cluster.classes.slow.threads=1", "cluster.affinity=false"]
        with subprocess.Popen(command, env=env, stdout=sys.stderr) as job:
            _inflict(lab, faults, job, Path(folder) / "run" / "plan.json")
        if job.returncode != 0:
            raise subprocess.CalledProcessError(job.returncode, command)
        summary: dict[str, Any] = json.loads((Path(folder) / "run" / "summary.json").read_text())
        return summary


def _inflict(lab: str, faults: Sequence[tuple[float, str]], job: subprocess.Popen[bytes], plan: Path) -> None:
    """Does what is to be done, each thing at its time, from when the plan is there: then the training begins."""
    left, began = list(faults), None
    while left and job.poll() is None:
        if began is None and plan.exists():
            began = time.monotonic()
        if began is not None and time.monotonic() - began >= left[0][0]:
            after, what = left.pop(0)
            print(f"{after:g} s of training: {what}", file=sys.stderr, flush=True)
            subprocess.run([lab, *what.split()], check=True)
        time.sleep(0.02)
    for after, what in left:
        print(f"never done: {what} after {after:g} s", file=sys.stderr, flush=True)
