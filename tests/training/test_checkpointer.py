"""Checkpoints of real jobs: what a failure in the next round, a file system or a schedule may do to them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from together import together

from hvd_hetero import algorithms
from hvd_hetero.checkpoint import Store
from hvd_hetero.config.load import load
from hvd_hetero.training.checkpointer import SyncPoints
from hvd_hetero.worker.epoch import Progress

pytestmark = pytest.mark.horovod

RANKS = Path(__file__).parents[1] / "ranks"
TRAIN = [sys.executable, "-m", "hvd_hetero", "train"]
"""Without the launcher, which would try out the model once more."""
SETTINGS = ["model.target=fails_next:model", "train.tau={fast: 8, slow: 2}", "cluster.classes.slow.slowdown=1",
            "checkpoint.every_rounds=1", "train.max_samples=120", "run.trace_rounds=0",
            "train.scheduler=fails_next:Halving"]  # fmt: skip
NO_SYNC = """
#include <dlfcn.h>
#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

int fsync(int file) {
    struct stat found;
    if (!fstat(file, &found) && S_ISDIR(found.st_mode)) { errno = EINVAL; return -1; }
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(file);
}
"""


def checkpoints(run: Path) -> list[int]:
    """Rounds that have one, all files of which are read; and there is nothing else beside them."""
    found = Store(run).candidates(deep=True)
    assert all(candidate.checkpoint is not None for candidate in found), [str(candidate.error) for candidate in found]
    assert not list((run / "checkpoints").rglob(".*")), "nothing half written"
    return [candidate.round for candidate in found]


@pytest.fixture
def no_sync(tmp_path: Path) -> dict[str, str]:
    """An environment in which folders cannot be synced."""
    if shutil.which("gcc") is None:
        return {}
    source, library = tmp_path / "no_sync.c", tmp_path / "no_sync.so"
    source.write_text(f"#define _GNU_SOURCE{NO_SYNC}")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


def test_a_failure_in_the_next_round_does_not_lose_what_was_saved(
    horovodrun: Callable[..., Any], tmp_path: Path, no_sync: dict[str, str]
) -> None:
    """Neither where rank 0 fails, which finishes checkpoints, nor where another one does."""
    runs = {"0:8": tmp_path / "first", "1:2": tmp_path / "second"}
    calls = []
    for who, run in runs.items():
        line = [*TRAIN, *SETTINGS, f"run.dir={run}"]
        calls.append(partial(horovodrun, 2, line, cwd=RANKS, env={"HVD_HETERO_TEST_FAILS": who}))
    for (who, run), done in zip(runs.items(), together(*calls), strict=True):
        assert done.returncode == 1, done.stdout + done.stderr
        assert f"rank {who[0]} on localhost failed: RuntimeError: the next round is not" in done.stderr
        assert checkpoints(run) == [1], "the round before the failure"
    run = runs["1:2"]
    done = horovodrun(2, [*TRAIN, *SETTINGS, f"run.dir={run}", "run.resume=auto"], cwd=RANKS, env=no_sync)
    assert done.returncode == 0 and "resumed after epoch 0, round 0, in the next epoch 1 rounds later" in done.stdout
    assert checkpoints(run) == [3, 2] and "no checkpoint" not in done.stdout


@pytest.mark.parametrize("every_sec", [None, 60.0])
def test_ranks_that_meet_without_checkpoints_neither_save_nor_stop(every_sec: float | None) -> None:
    """They meet for their plan's sake; what is asked of them cannot be done."""
    config = load((), {"checkpoint.every_sec": every_sec}, algorithms.method)
    comm: Any = SimpleNamespace(rank=0, max=lambda numbers, name: numbers)
    asked: Any = type("Asked", (SyncPoints,), {"stopping": lambda self: True, "_is_asked": lambda self: True})
    meetings = asked(config, comm, False)
    agreed = meetings.agree(Progress(3, 3), meetings.segment(9, 0), 0, (0.5,))
    assert (agreed.stop, agreed.due) == (every_sec is not None,) * 2 and agreed.step_sec == (0.5,)
