"""Ranks on this machine, under horovodrun, each writing what it found into a folder."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def found_by(ranks: int, script: Path, *arguments: Any, timeout_sec: float) -> list[dict[str, Any]]:
    """Runs ``script FOLDER ARGUMENTS`` on so many ranks and returns what each wrote into ``FOLDER/rank{N}.json``.

    What the ranks print goes to standard error.

    Raises:
        RuntimeError: the job failed, or was not done in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [Path(sys.executable).with_name("horovodrun"), "--gloo", "-np", ranks, "-H", f"localhost:{ranks}",
                   "--cycle-time-ms", 1, sys.executable, script, folder, *arguments]
        job = subprocess.Popen([str(word) for word in command], stdout=sys.stderr, start_new_session=True)
        try:
            status = job.wait(timeout_sec)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done within {timeout_sec:g} s") from None
        finally:
            job.terminate()  # it ends its ranks when it is asked to, and leaves them behind when it is killed
            job.wait()
        if status != 0:
            raise RuntimeError(f"horovodrun ended with status {status}")
        return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def hvd_hetero(command: str, *arguments: str) -> None:
    """Runs a command of the package; what it prints goes to standard error.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    subprocess.run([sys.executable, "-m", "hvd_hetero", command, *arguments], check=True, stdout=sys.stderr)


def summary_of(*arguments: str) -> dict[str, Any]:
    """Trains on this machine's ranks, as configuration files and ``key=value`` say, and returns the run's summary."""
    with tempfile.TemporaryDirectory() as folder:
        hvd_hetero("launch", *arguments, f"run.dir={folder}/run")
        summary: dict[str, Any] = json.loads((Path(folder) / "run" / "summary.json").read_text())
        return summary
