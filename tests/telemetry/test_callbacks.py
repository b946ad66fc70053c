"""Callbacks of the user's own and trackers: when they are called, where, and what becomes of their mistakes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hvd_hetero.config.schema import RunConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.telemetry.callbacks import TRACKERS, Started
from hvd_hetero.telemetry.callbacks import numbers as numbers_of
from hvd_hetero.worker.callbacks import Callbacks

CONFIG = {"train": {"lr": 0.5, "tau": {"fast": 3}}, "run": {"seed": 7}}


def started(folder: Path, epochs: int = 0) -> Started:
    return Started(CONFIG, 0, 2, None, folder, epochs, 32 * epochs)


def row(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "samples_seen": 32 * epoch, "train_loss": 1.0 / epoch, "tau": {"fast": 3}, "note": "text"}


def tracked(name: str, folder: Path) -> Callbacks:
    """A run of two epochs, and a third one after it was resumed."""
    for first, last in ((0, 2), (2, 3)):
        found = Callbacks(RunConfig(trackers=[name]))
        found.call(0, "on_start", started(folder, first))
        for epoch in range(first + 1, last + 1):
            found.call(0, "on_epoch_end", row(epoch))
        found.call(0, "on_end", {})
    return found


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [
        (32, 1.0), (64, 0.5), (96, pytest.approx(1 / 3))]  # fmt: skip
    assert [event.value for event in events.Scalars("tau/fast")] == [3.0] * 3
    tracked("tensorboard", tmp_path)
    assert len(EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train_loss")) == 3  # begun anew


def test_mlflow_with_its_file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracked("mlflow", tmp_path)
    client = mlflow.MlflowClient((tmp_path / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("hvd-hetero").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == tmp_path.name
    assert run.data.params == {"train.lr": "0.5", "train.tau": "{'fast': 3}", "run.seed": "7"}
    losses = client.get_metric_history(run.info.run_id, "train_loss")
    assert [(item.step, item.value) for item in losses] == [(32, 1.0), (64, 0.5), (96, pytest.approx(1 / 3))]


def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    tracked("wandb", tmp_path)
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and all(b"train_loss" in file.read_bytes() for file in files)


class Broken(TRACKERS["tensorboard"]):  # type: ignore[misc]
    def on_epoch_end(self, row: dict[str, Any]) -> None:
        raise OSError("the disk is full")


def test_a_tracker_that_fails_is_warned_of_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(TRACKERS, "tensorboard", Broken)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "hvd_hetero"):
        tracked("tensorboard", tmp_path)
    output = [record.getMessage() for record in caplog.records]
    assert len(output) == 2, "once in each of two jobs"
    assert output[0].startswith("run.trackers=tensorboard: it is off from here on: OSError: the disk is full")


def test_numbers_of_a_row() -> None:
    assert dict(numbers_of(row(2))) == {"epoch": 2, "samples_seen": 64, "train_loss": 0.5, "tau/fast": 3}


@pytest.mark.parametrize(("given", "message"), [
    ({"trackers": ["tensorbord"]}, "run.trackers='tensorbord': unknown name; did you mean 'tensorboard'?"),
    ({"callbacks": ["nowhere:Class"]}, "run.callbacks='nowhere:Class': no module named 'nowhere'"),
    ({"callbacks": ["json:dumps"]}, "run.callbacks={}: argument 'obj' is missing"),
    ({"callbacks": ["json:JSONEncoder"]}, "run.callbacks='json:JSONEncoder': makes a JSONEncoder; derive it from"),
])  # fmt: skip
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Callbacks(RunConfig(**given))
    assert str(caught.value).startswith(message), caught.value


def test_a_tracker_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_hetero.worker.callbacks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"run.trackers='wandb': needs the package wandb.*hvd-hetero\[wandb\]"):
        Callbacks(RunConfig(trackers=["wandb"]))


@pytest.mark.parametrize(("version", "fits"), [("0.19.9", False), ("0.19.10", True), ("0.20.0rc1", True)])
def test_an_older_tracker_is_refused_before_it_fails(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_hetero.worker.callbacks.find_spec", lambda name: name)
    monkeypatch.setattr("hvd_hetero.telemetry.callbacks.version", lambda name: version)
    with nullcontext() if fits else pytest.raises(ConfigError, match="needs wandb 0.19.10 or newer, and 0.19.9 is"):
        Callbacks(RunConfig(trackers=["wandb"]))


@pytest.mark.horovod
def test_what_a_callback_takes_at_a_checkpoint_is_no_part_of_the_next_step() -> None:
    """Its rank would be taken for a slow one, and be given fewer steps."""
    from hvd_hetero.telemetry.stopwatch import Stopwatch
    from hvd_hetero.training.trainer_parts import TrainerParts

    class Clock:
        now = 0.0

        def call(self, rank: int, hook: str, number: int) -> None:
            self.now += 5.0

    clock, parts = Clock(), TrainerParts()
    parts.watch = Stopwatch(lambda: clock.now)
    parts.comm, parts.job = SimpleNamespace(rank=0), SimpleNamespace(components=SimpleNamespace(callbacks=clock))  # type: ignore[assignment]
    parts._tell_saved(SimpleNamespace(saved_round=3))  # type: ignore[arg-type]
    clock.now += 0.25
    assert parts.watch.span("data") == 0.25


# ---- in jobs --------------------------------------------------------------------------------------------------------

OWN = """
import json, os
import hvd_hetero

class Notes(hvd_hetero.Callback):
    on_all_ranks = True

    def __init__(self):
        self.notes = []

    def on_start(self, run):
        self.run = run
        self.notes.append(["start", run.rank, run.size, run.epochs, run.config["train"]["epochs"]])

    def on_evaluation(self, row):
        self.notes.append(["evaluation", row["epoch"], "eval_loss" in row])

    def on_epoch_end(self, row):
        self.notes.append(["epoch", row["epoch"]])
        row["norm"] = float(sum(p.norm() for p in self.run.model.parameters()))
        if os.environ.get("HVD_HETERO_TEST_FAILS") and self.run.rank == 1:
            raise ZeroDivisionError("mine")

    def on_checkpoint(self, round):
        self.notes.append(["checkpoint", round, (self.run.folder or None) is not None])

    def on_end(self, summary):
        self.notes.append(["end", summary is not None])
        with open(f"notes{self.run.rank}.json", "w") as file:
            json.dump(self.notes, file)

class First(hvd_hetero.Callback):
    def on_start(self, run):
        assert run.rank == 0
"""
SETTINGS = ["launch", "train.tau={fast: 16, slow: 2}", "cluster.classes.slow.slowdown=1.0", "train.epochs=2",
            "eval.every_epochs=2", "run.callbacks=[own_callbacks:Notes,own_callbacks:First]", "run.dir=run",
            "checkpoint.every_sec=null", "checkpoint.every_rounds=1000"]  # fmt: skip


def test_hooks_are_called_on_all_ranks_or_on_rank_0(tmp_path: Path, hvd_hetero: Callable[..., Any]) -> None:
    (tmp_path / "own_callbacks.py").write_text(OWN)
    done = hvd_hetero(SETTINGS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    notes = [json.loads((tmp_path / f"notes{rank}.json").read_text()) for rank in range(2)]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]["round"]
    for rank, output in enumerate(notes):
        assert output == [["start", rank, 2, 0, 2], ["epoch", 1], ["evaluation", 2, True], ["epoch", 2],
                        ["checkpoint", last, rank == 0], ["end", rank == 0]]  # fmt: skip
    assert all(row["norm"] > 0 for row in rows)


def test_a_callback_that_fails_ends_the_job_and_is_named(tmp_path: Path, hvd_hetero: Callable[..., Any]) -> None:
    (tmp_path / "own_callbacks.py").write_text(OWN)
    done = hvd_hetero(SETTINGS, cwd=tmp_path, env={"HVD_HETERO_TEST_FAILS": "1"})
    assert done.returncode == 2, done.stderr
    wanted = ("run.callbacks='own_callbacks:Notes': on_epoch_end fails on rank 1: ZeroDivisionError: mine "
              "(own_callbacks.py, line 22)")  # fmt: skip
    assert wanted in done.stderr, done.stderr
