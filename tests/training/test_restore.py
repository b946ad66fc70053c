"""What going on from a checkpoint rests on: rows that are kept, what is copied, what a failure leaves behind."""

from __future__ import annotations

import errno
import json
import os
import time
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_helpers import NEW, OLD, save_round, some_state

from hvd_hetero.checkpoint import Files, Store
from hvd_hetero.checkpoint.background_write import Best, Write, copied
from hvd_hetero.checkpoint.export import save_model
from hvd_hetero.cluster.device_classes import assign
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.comm.kv_store import JobEnv
from hvd_hetero.config.load import device_classes, load
from hvd_hetero.data import TensorSource
from hvd_hetero.errors import EXIT_LOST
from hvd_hetero.launch.horovodrun import End
from hvd_hetero.launch.supervisor import Supervisor
from hvd_hetero.planning.plan import make_plan
from hvd_hetero.telemetry.run_folder import EVALUATIONS, METRICS, RunFolder
from hvd_hetero.telemetry.staleness import KINDS, Counts
from hvd_hetero.training.resume import _earlier_rank0
from hvd_hetero.training.run_records import say_resumed
from hvd_hetero.training.stop_request import StopRequest
from hvd_hetero.worker.epoch import Epoch

pytestmark = pytest.mark.horovod

ROWS = [{"epoch": number, "samples_seen": 100 * number, "train_loss": 1.0} for number in range(1, 7)]


def written(path: Path, rows: list[dict[str, Any]], keep: list[int] | None = None) -> list[list[int]]:
    """Writes rows into a run's folder, every other one as an evaluation too; returns what checkpoints would note,
    before and after each.
    """
    folder = RunFolder(path, overwrite=True, keep_bytes=keep)
    sizes = [folder.rows_bytes]
    for row in rows:
        folder.row(row)
        if row["epoch"] % 2:
            folder.evaluation(row)
        sizes.append(folder.rows_bytes)
    folder.close()
    return sizes


def epochs(path: Path, name: str = METRICS) -> list[int]:
    return [json.loads(line)["epoch"] for line in (path / name).read_text().splitlines()]


def test_a_checkpoint_before_the_first_new_row_knows_the_rows_that_were_kept(tmp_path: Path) -> None:
    sizes = written(tmp_path, ROWS)
    again = written(tmp_path, ROWS[4:], keep=sizes[4])
    assert again[0] == sizes[4] and epochs(tmp_path) == [1, 2, 3, 4, 5, 6]
    written(tmp_path, ROWS[4:], keep=again[0])
    assert epochs(tmp_path) == [1, 2, 3, 4, 5, 6], "neither lost nor doubled"
    assert epochs(tmp_path, EVALUATIONS) == [1, 3, 5]
    written(tmp_path, ROWS[:1])
    assert epochs(tmp_path) == epochs(tmp_path, EVALUATIONS) == [1], "a new run begins with nothing"


def test_rows_that_are_gone_are_told_and_not_made_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    size = written(tmp_path, ROWS[:2])[-1]
    (tmp_path / METRICS).write_text("")
    (tmp_path / EVALUATIONS).unlink()
    written(tmp_path, ROWS[2:3], keep=size)
    assert "rows are missing" in caplog.text and epochs(tmp_path) == [3]


def test_rows_of_a_run_that_lost_rank_0_are_kept_as_far_as_it_goes_on(tmp_path: Path) -> None:
    for number in (2, 4):
        state = {"rank0": {"sampler": number}, "accounts": {"epochs": number}}
        Store(tmp_path).commit(number, [Store(tmp_path).write_shard(number, 0, state)], epochs=1, made_with={})
    rows = [{**row, "round": 10 * row["epoch"]} for row in ROWS]
    sizes = written(tmp_path, rows)
    kept = _earlier_rank0(tmp_path, number=35, epochs=4)
    assert kept == {"sampler": 4, "rows_bytes": [sizes[4][0], sizes[3][1]]}, "evaluations of an epoch under way, too"


@pytest.mark.parametrize("over", [True, False])
def test_a_run_that_has_ended_says_what_would_let_it_go_on(over: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    say_resumed("epoch 3, round 6", over)
    output = caplog.text
    assert "resumed after epoch 3, round 6" in output and ("train.epochs" in output) == over


def test_a_row_that_the_disk_does_not_take_comes_with_the_next_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tmp_path, overwrite=False)
    whole, parts = folder._rows._file, iter([5])

    class Full:
        """Takes five bytes, and then no more."""

        def write(self, data: bytes) -> int:
            for count in parts:
                return whole.write(data[:count])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder._rows._file = Full()  # type: ignore[assignment]
    folder.row(ROWS[0])
    assert f"{METRICS} cannot be written now: No space left" in caplog.text
    folder._rows._file = whole
    folder.row(ROWS[1])
    folder.close()
    assert epochs(tmp_path) == [1, 2]


def test_what_a_scheduler_counts_by_stays_what_it_is() -> None:
    milestones = Counter({30: 1, 60: 1})
    own = copied({"milestones": milestones, "order": OrderedDict(a=torch.zeros(2)), "betas": (0.9, 0.99)})
    assert type(own["milestones"]) is Counter and type(own["order"]) is OrderedDict and own["betas"] == (0.9, 0.99)
    milestones[90] += 1
    assert sorted(own["milestones"].elements()) == [30, 60]


def test_what_is_copied_is_of_its_own_whatever_it_is_kept_in() -> None:
    """A thread writes it while the training changes the rest."""
    state = {"set": {1}, "deque": deque([torch.zeros(2)], 3), "table": defaultdict(list, a=[1]), "array": np.zeros(2)}
    own = copied(state)
    state["set"].add(2)
    state["deque"][0] += 1
    state["deque"].append(5)
    state["table"]["a"].append(2)
    state["array"] += 1
    assert own["set"] == {1} and own["deque"][0].tolist() == [0, 0] and len(own["deque"]) == 1
    assert own["table"] == {"a": [1]} and own["array"].tolist() == [0, 0]


def written_checkpoint(run: Path, number: int, state: Any, files: Files | None = None) -> Write:
    """Of a job of one rank; the real thing, which has nobody to tell."""
    write = Write(Store(run, files=files), JobEnv(), number, 1, {"train.lr": 0.1}, lambda: state() if callable(state)
                  else state, Best(0.5, "accuracy"))  # fmt: skip
    write.join()
    return write


def test_a_checkpoint_is_written_with_what_it_was_made_with(tmp_path: Path) -> None:
    assert written_checkpoint(tmp_path, OLD, some_state()).problem == ""
    best = Store(tmp_path).best()
    assert best is not None and best.meta.made_with == {"train.lr": 0.1} and best.load(0)["n"] == 0


class Full(Files):
    """A disk that takes shards and no manifest."""

    def open(self, path: Path) -> int:
        if "manifest" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().open(path)


def raises() -> Any:
    raise KeyError("state of the user's own")


@pytest.mark.parametrize(("state", "files", "output"), [
    ({"a": {"b": object()}}, Files(), "the state's a.b: a builtins.object"),
    (raises, Files(), "state of the user's own"),
    ({}, Full(), "No space left on device; make room for it or choose another run.dir; round 10 is whole"),
])
def test_what_cannot_be_saved_is_told_and_leaves_nothing(tmp_path: Path, state: Any, files: Files, output: str) -> None:
    written_checkpoint(tmp_path, OLD, some_state())
    write = written_checkpoint(tmp_path, NEW, state, files)
    assert write.problem.startswith("rank 0: ") and output in write.problem
    assert [path.name for path in sorted(Store(tmp_path).folder.iterdir())] == ["000010", "best.json"]
    first = tmp_path / "first"
    first.mkdir()
    assert written_checkpoint(first, NEW, state, files).problem and not list(first.iterdir()), "no empty folder is left"


class Course:
    """Jobs that fail again and again, and what each is told; ``leave`` is done in each but the last."""

    def __init__(self, leave: Any) -> None:
        self.leave, self.told = leave, []

    def __call__(self, settings: list[str]) -> End:
        self.told.append(list(settings))
        if len(self.told) == 3:
            return End(0, "job")
        self.leave(len(self.told))
        return End(EXIT_LOST, "job")


def supervised(run: Path, leave: Any, monkeypatch: pytest.MonkeyPatch, *settings: str) -> list[list[str]]:
    monkeypatch.setattr(time, "sleep", lambda sec: None)
    monkeypatch.setattr("hvd_hetero.launch.supervisor.reap", lambda job, hosts, shell: [])
    course = Course(leave)
    hosts = [("localhost", 2)]
    assert Supervisor(course, load(None, settings), hosts, run, 5, None, lambda: hosts, lambda s: None).run() == 0
    return course.told


def test_checkpoints_of_this_run_are_known_from_those_of_an_earlier_one_at_the_same_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, states = Store(tmp_path), [some_state(0), some_state(1)]
    save_round(store, OLD, states)
    time.sleep(1.1)  # a manifest's time is in whole seconds

    def leave(start: int) -> None:
        if start == 2:  # the first start gets nowhere
            store.rewind(None)
            save_round(store, OLD, states)

    told = supervised(tmp_path, leave, monkeypatch, "run.overwrite=true")
    assert told == [[], ["run.overwrite=true", "run.resume=null"], ["run.resume=auto"]]


def test_a_stop_file_that_cannot_be_looked_at_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(path: Any, **options: Any) -> Any:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    stop = StopRequest(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stale)
        assert not stop()


def test_what_was_counted_in_an_epoch_is_saved_with_it() -> None:
    cluster = assign(device_classes({"fast": {"ranks": [0]}, "slow": {"ranks": [1]}}),
                     [RankFacts(rank, "here", rank, (), "cpu", (0, 1)) for rank in range(2)])  # fmt: skip
    plan = make_plan(cluster, 100, {"fast": 2, "slow": 1}, {"fast": 4, "slow": 4})
    source, generator = TensorSource(torch.zeros(100, 1), torch.zeros(100)), torch.Generator()
    epoch = Epoch(plan, np.zeros((4, 4), dtype=np.int32), source, generator)
    epoch.count(1, Counts(fresh=3, late=1, staleness=Counter({0: 3, 2: 1})))
    again = Epoch.from_state(copied(epoch.state_dict()), source, generator)
    excluded, counts = again.count(2, Counts(fresh=1, staleness=Counter({0: 1})))
    assert excluded == 3 and counts is not None
    assert counts.tolist()[: len(KINDS) + 3] == [4, 1, 0, 0, 0, 0, 4, 0, 1]
    assert again.count(0, None) == (3, None), "a method without partial collectives"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSPC])
def test_a_model_that_cannot_be_synced_is_saved_and_one_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(file: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.EINVAL:
        assert torch.load(save_model(tmp_path, torch.nn.Linear(1, 1)), weights_only=True)
        return
    with pytest.raises(OSError, match="No space"):
        save_model(tmp_path, torch.nn.Linear(1, 1))
    assert not list(tmp_path.iterdir())
