"""A rank that is killed while the newest checkpoint is old: the others save what they have in memory."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from job_helpers import rank_pids, when

from hvd_hetero.checkpoint import CheckpointError, Store
from hvd_hetero.config.load import load
from hvd_hetero.launch.launcher import _check_places as check_places
from hvd_hetero.launch.launcher import training_ranks
from hvd_hetero.training.survivor import Survivor, adopt

RANKS = Path(__file__).parents[1] / "ranks"


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_no_more_than_a_round_is_lost_with_a_rank(killed: int, hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    """The state is that of the last round in which all ranks met.

    No checkpoint falls due before, unless rank 0 is lost: it takes the losses of samples along, so that what it had
    saved of them is needed.
    """
    run = tmp_path / "run"

    def kill() -> None:
        for pid in rank_pids(run, killed):
            os.kill(pid, signal.SIGKILL)

    def far_enough() -> bool:
        status = json.loads((run / "status.json").read_text()) if (run / "status.json").exists() else {}
        return status.get("round", 0) >= 3 and status["round"] % 2 == 1

    when(far_enough, kill)
    # rounds of half a second or more, so that ranks meet after each
    done = hvd_hetero(
        ["launch", "--max-restarts", "1", f"run.dir={run}", "run.trace_rounds=0", "cluster.hosts=localhost:3",
         "cluster.classes={one: {ranks: [0, 1]}, two: {ranks: [2]}}", "train.tau={one: 8, two: 4}", "train.epochs=2",
         "sampling.scheme=uniform", "train.optimizer=joining:Noted", "train.optimizer_args={momentum: 0.9}",
         "train.batch_size=8", "checkpoint.memory_sec=0",
         "checkpoint.every_sec=1000", f"checkpoint.every_rounds={1000 if killed else 2}",
         "delays.distribution=lognormal", "delays.seed=0", "delays.sec=0.06"],
        cwd=RANKS, timeout=250)  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    restart = re.search(r"restart 1 of 1, from round (\d+)", output)
    place = re.search(r"resumed after epoch 0, round 0, in the next epoch (\d+) rounds later, reshaped: 2 of 3", output)
    assert restart and place and int(place[1]) == int(restart[1]) >= 3, output
    assert output.count("LOADED localhost 6 True") == 2
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]


# ---- what survivors leave -------------------------------------------------------------------------------------------


def state(number: int) -> dict[str, Any]:
    return {"model": torch.full((3,), float(number)), "accounts": {"epochs": 1}, "table": np.arange(number)}


def left_by(run: Path, rounds: dict[int, list[int]]) -> Store:
    """Of each rank the rounds that it still held."""
    run.mkdir()
    for rank, numbers in rounds.items():
        survivor = Survivor(Store(run), rank, 0.0)
        for number in numbers:
            survivor.keep(number, lambda number=number: state(number))
        survivor.write()
    return Store(run)


def test_the_newest_round_that_most_ranks_have_becomes_the_checkpoint(tmp_path: Path) -> None:
    """Of each only the last two are there; one rank was a meeting behind the others."""
    store = left_by(tmp_path / "run", {0: [5, 6, 7], 2: [4, 5, 6], 3: [6, 7]})
    adopt(tmp_path / "run", load(None), 4)
    newest = store.latest(deep=True)
    assert newest is not None and (newest.meta.round, newest.meta.lost, newest.meta.epochs) == (6, (1,), 1)
    assert newest.load(3)["model"].tolist() == [6, 6, 6]
    with pytest.raises(CheckpointError, match="without rank 1, which had been lost; set run.resume=reshape"):
        newest.load(1)
    adopt(tmp_path / "run", load(None), 4)
    assert [c.round for c in store.candidates() if c.checkpoint] == [6], "nothing newer is left"


def test_what_is_not_whole_is_not_taken(tmp_path: Path) -> None:
    store = left_by(tmp_path / "run", {0: [7], 1: [7]})
    (tmp_path / "run" / "checkpoints" / "000007" / "rank0001.json").write_text("{")
    adopt(tmp_path / "run", load(None), 2)
    newest = store.latest()
    assert newest is not None and newest.meta.lost == (1,)


def test_nothing_is_kept_or_written_unless_it_is_asked_for(tmp_path: Path) -> None:
    survivor = Survivor(Store(tmp_path), 0, None)
    assert not survivor.is_due
    survivor.write()
    assert not list(tmp_path.iterdir())


def test_ranks_copy_the_same_rounds_whatever_their_clocks_say() -> None:
    """One that copies by its own clock may come to have no round in common with the others."""
    survivor = Survivor(Store(Path()), 0, 1000.0)
    assert survivor.is_due
    for number in (1, 2, 2, 3):
        survivor.keep(number, lambda number=number: state(number))
        assert not survivor.is_due
    assert [number for number, _ in survivor._states] == [2, 3], "of two meetings at one round the first"


@pytest.mark.parametrize("whole", [True, False])
def test_without_rank_0_what_it_kept_has_to_be_in_an_older_checkpoint(whole: bool, tmp_path: Path) -> None:
    run, config = tmp_path / "run", load(None, ["checkpoint.keep=1"])
    store = left_by(run, {0: [2], 1: [2]} if whole else {})
    if whole:
        adopt(run, config, 2)
    for number in (4, 6):  # the second one is all that is to be kept
        survivor = Survivor(Store(run), 1, 0.0)
        survivor.keep(number, lambda number=number: state(number))
        survivor.write()
        adopt(run, config, 2)
    assert [c.round for c in store.candidates() if c.checkpoint] == ([6, 4, 2] if whole else [])


def test_helpers_are_no_ranks_that_a_checkpoint_misses(tmp_path: Path) -> None:
    classes = "cluster.classes={one: {ranks: [0, 1]}, test: {ranks: [2], role: evaluate}}"
    config = load(None, ["run.resume=auto", f"run.dir={tmp_path / 'run'}", "cluster.hosts=localhost:3", classes])
    hosts = [("localhost", 3)]
    assert training_ranks(config, hosts) == 2
    store = left_by(tmp_path / "run", {0: [7], 1: [7]})
    adopt(tmp_path / "run", config, training_ranks(config, hosts))
    newest = store.latest()
    assert newest is not None and newest.meta.lost == ()
    check_places(config, hosts, trains=True)
    all_train = load(None, ["run.resume=auto", f"run.dir={tmp_path / 'run'}", "cluster.classes=auto"])
    with pytest.raises(CheckpointError, match="saved by 2 ranks, and this job has 3"):
        check_places(all_train, hosts, trains=True)
