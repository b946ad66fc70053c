"""Starting jobs of scripts, looking at the processes of jobs, and doing something in the middle of one."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def found_by_ranks(
    horovodrun: Callable[..., Any], size: int, script: Path, folder: Path, *words: str, timeout: float = 120
) -> list[Any]:
    """Run ``script FOLDER WORD...`` on all ranks; return what each has left in ``FOLDER/rank{N}.pt``."""
    done = horovodrun(size, [sys.executable, script, folder, *words], timeout=timeout, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(size)]


def processes_with(text: str) -> list[str]:
    """Command lines of all running processes that hold a text."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line and int(file.parent.name) != os.getpid():
            found.append(line)
    return found


def rank_pids(folder: Path, rank: int) -> list[int]:
    """Processes of a rank of the job whose run is in the folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            line, environment = ((place / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        wanted = f"HOROVOD_RANK={rank}".encode() in environment
        if wanted and b"train" in line and any(str(folder).encode() in word for word in line):
            found.append(int(place.name))
    return found


def when(happened: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Does something beside the job, once something has happened in it."""

    def wait() -> None:
        deadline = time.monotonic() + 280
        while not happened():
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread
