"""Training jobs on two hosts h1 and h2 of a tool that makes hosts out of network namespaces and throttles ranks.

The tool's ``lab run --slow h2=SHARE -- COMMAND`` runs a command on h1, and gives the main thread of each rank on h2
that share of a core. ``--settle 0`` begins at once, so that speeds are measured as they will be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def summary_of(lab: str, arguments: Sequence[str], share: float, *, hosts: str = "h1:1,h2:1",
               faults: Sequence[str] = ()) -> dict[str, Any]:
    """Runs one job and returns its summary; what it prints goes to standard error.

    Args:
        arguments: configuration files and ``key=value``.
        share: of a core, for each rank on h2.
        faults: what ``lab run --at`` is to do while the job runs, for example ``"20 throttle r1 0.05"``.
    """
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    at = [word for fault in faults for word in ("--at", fault)]
    with tempfile.TemporaryDirectory() as folder:
        command = [lab, "run", "--settle", "0", "--slow", f"h2={share}", *at, "--",
                   sys.executable, "-m", "hvd_hetero", "launch", *arguments, f"run.dir={folder}/run",
                   f"cluster.hosts={hosts}", "cluster.classes.slow.slowdown=1", "profile.seconds=6",
                   # the quota holds for one thread, and both hosts show the same cores
                   "cluster.classes.fast.threads=1", "cluster.classes.slow.threads=1", "cluster.affinity=false"]
        subprocess.run(command, check=True, env=env, stdout=sys.stderr)
        summary: dict[str, Any] = json.loads((Path(folder) / "run" / "summary.json").read_text())
        return summary
