"""What a program may do at certain moments of a run, and experiment trackers, which do just that on rank 0."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hvd_hetero.errors import ConfigError
from hvd_hetero.files import write_text


@dataclass(frozen=True)
class Started:
    """A run that begins or goes on.

    Attributes:
        config: the whole configuration, by section.
        rank: of this process, of ``size``.
        model: this rank's.
        folder: the run's; None: it has none.
        epochs: done before, and ``samples`` seen in them; 0 for a new run.
    """

    config: Mapping[str, Mapping[str, Any]]
    rank: int
    size: int
    model: Any
    folder: Path | None
    epochs: int
    samples: int


class Callback:
    """Hooks of a run; a class of your own overrides those that it wants. What a hook raises ends the job.

    Attributes:
        on_all_ranks: whether all ranks call the hooks, or rank 0 alone.
    """

    on_all_ranks = False

    def on_start(self, run: Started) -> None:
        """Before the first epoch, and when a run is resumed."""

    def on_evaluation(self, row: dict[str, Any]) -> None:
        """After an evaluation, before :meth:`on_epoch_end`; ``eval_loss`` and others are in the row."""

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        """After each epoch, when all ranks hold the same model; what rank 0 adds to the row is written with it."""

    def on_checkpoint(self, round: int) -> None:
        """When the checkpoint of a round is on the disk."""

    def on_end(self, summary: Mapping[str, Any] | None) -> None:
        """At the end of a run that was not stopped; the summary is rank 0's."""


def numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a row by name, those of device classes as ``tau/fast``."""
    for name, value in row.items():
        for part, number in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(number, (int, float)):
                yield (f"{name}/{part}" if part else name), number


# ---- trackers -------------------------------------------------------------------------------------------------------


class TensorBoard(Callback):
    """Events under ``tensorboard/`` in the run's folder, over samples seen."""

    needs = "tensorboard"

    def on_start(self, run: Started) -> None:
        from torch.utils.tensorboard import SummaryWriter

        assert run.folder is not None
        folder = run.folder / "tensorboard"
        if not run.samples:
            for path in folder.glob("events.*"):
                path.unlink()
        # what a resumed run does again is not shown twice
        self._events = SummaryWriter(str(folder), purge_step=run.samples + 1 if run.samples else None)

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        for name, number in numbers(row):
            self._events.add_scalar(name, number, row["samples_seen"])
        self._events.flush()

    def on_end(self, summary: Mapping[str, Any] | None) -> None:
        self._events.close()


class MLflow(Callback):
    """A run of MLflow, over samples seen: where ``MLFLOW_TRACKING_URI`` says, else under ``mlflow/`` in the folder."""

    needs = "mlflow"
    FILE = "mlflow.json"

    def on_start(self, run: Started) -> None:
        import mlflow
        import mlflow.environment_variables

        assert run.folder is not None
        place = None
        if not mlflow.is_tracking_uri_set():
            place = (run.folder / "mlflow").resolve().as_uri()
            allowed = getattr(mlflow.environment_variables, "MLFLOW_ALLOW_FILE_STORE", None)
            if allowed is not None:  # its newer versions want a database, whose making alone takes seconds
                allowed.set(True)
        self._client = mlflow.MlflowClient(place)
        file = run.folder / self.FILE
        if run.epochs and file.exists():
            self._run: str = json.loads(file.read_text())["run_id"]
            self._client.update_run(self._run, status="RUNNING")
            return
        found = self._client.get_experiment_by_name("hvd-hetero")
        experiment = self._client.create_experiment("hvd-hetero") if found is None else found.experiment_id
        self._run = self._client.create_run(experiment, run_name=run.folder.name).info.run_id
        write_text(file, json.dumps({"run_id": self._run}) + "\n")
        for section, values in run.config.items():
            for key, value in values.items():
                self._client.log_param(self._run, f"{section}.{key}", value)

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        for name, number in numbers(row):
            self._client.log_metric(self._run, name, number, step=row["samples_seen"])

    def on_end(self, summary: Mapping[str, Any] | None) -> None:
        self._client.set_terminated(self._run)


class WandB(Callback):
    """A run of Weights & Biases in offline mode, under ``wandb/`` in the run's folder; ``wandb sync`` uploads it."""

    needs = "wandb"
    LEAST = (0, 19, 10)
    """The first version that keeps several runs of a process apart (``reinit="create_new"``)."""

    def __init__(self) -> None:
        found = version(self.needs)
        if tuple(map(int, re.findall(r"\d+", found)[:3])) < self.LEAST:
            problem = f"needs {self.needs} {'.'.join(map(str, self.LEAST))} or newer, and {found} is installed"
            raise ConfigError("run.trackers", "wandb", problem, "pip install 'hvd-hetero[wandb]'")

    def on_start(self, run: Started) -> None:
        import wandb

        assert run.folder is not None
        config = {name: dict(section) for name, section in run.config.items()}
        self._run = wandb.init(project="hvd-hetero", name=run.folder.name, dir=run.folder, config=config,
                               mode="offline", reinit="create_new")  # fmt: skip

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        self._run.log(dict(numbers(row)))

    def on_end(self, summary: Mapping[str, Any] | None) -> None:
        self._run.finish()


TRACKERS: Mapping[str, type[TensorBoard | MLflow | WandB]] = {
    "tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB
}  # fmt: skip
