"""What the ranks that train have of their helpers: rank 0 gives them models, and all take in what comes back.

What a helper does is in :mod:`hvd_hetero.training.helper_rank`. Nobody waits for one before the job's end, and there
only for the batch that it is at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from hvd_hetero.algorithms.policy import Policy
from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.helper_channel import HelperServer, Scores, open_channel
from hvd_hetero.comm.model_bytes import to_bytes
from hvd_hetero.config.schema import EVALUATE
from hvd_hetero.log import LOGGER
from hvd_hetero.telemetry.run_folder import RunFolder
from hvd_hetero.telemetry.stopwatch import Stopwatch
from hvd_hetero.telemetry.time_accounts import Accounts
from hvd_hetero.training.evaluation import EVAL
from hvd_hetero.worker.epoch import Epoch
from hvd_hetero.worker.worker import Worker

Place = Callable[[], Mapping[str, Any]]


class Helpers:
    """The helpers of a job, as a rank that trains has them; there may be none. All such ranks make it together.

    Args:
        policy: tells whether all ranks hold the same model after each round, or only when they meet.
        folder: of the run, on rank 0.

    Attributes:
        evaluate: one of them does, so that nobody else does before the run's end.
    """

    def __init__(
        self, cluster: Cluster, comm: Comm, worker: Worker, policy: Policy, folder: RunFolder | None
    ) -> None:
        self._comm, self._worker, self._folder = comm, worker, folder
        self.evaluate = any(c.role == EVALUATE for c in cluster.helpers)
        self._in_rounds = not policy.needs_quiesce
        self._server: HelperServer | None = None
        self._round_sent = -1
        self._rows: list[dict[str, Any]] = []
        self._scores: list[Scores] = []
        if cluster.helpers:
            end = open_channel(comm, len({fact.host for fact in cluster.facts}))
            self._server = end if isinstance(end, HelperServer) else None

    def end_round(self, number: int, place: Place) -> None:
        """As :meth:`offer`, where all ranks hold the same model after each round."""
        if self._in_rounds:
            self.offer(number, place)

    def offer(self, number: int, place: Place) -> None:
        """Give the model, which all ranks hold, to a helper that waits for one; no model is given twice.

        Args:
            number: of its round in the run.
            place: tells where in the run it is from.
        """
        if self._server is None or number == self._round_sent:
            return

        def packed() -> tuple[str, Any]:
            kinds, data = to_bytes(self._worker.state)
            return json.dumps([place(), kinds]), data

        if self._server.offer(packed):
            self._round_sent = number
            self._comm.watch.waited(0.0)

    def receive(self) -> None:
        """Write the evaluations that have come since the last call."""
        if self._server is None:
            return
        rows, scores = self._server.drain()
        self._rows += rows
        self._scores += scores
        for row in rows:
            if self._folder is not None:
                self._folder.evaluation(row)

    def broadcast_evaluations(self) -> list[dict[str, Any]]:
        """Return the evaluations that all ranks have not been told of; all that train call it, with the same result."""
        self.receive()
        if not self.evaluate:
            return []
        if self._rows:
            figures = ((name, value) for name, value in self._rows[-1].items() if name.startswith(EVAL))
            text = ", ".join(f"{name.removeprefix(EVAL)} {value:.4g}" for name, value in figures if value is not None)
            LOGGER.info("round %s, evaluated by a helper: %s", self._rows[-1]["round"], text)
        with self._comm.timed():
            shared = self._comm.broadcast_text(json.dumps(self._rows), "evaluations")
        self._rows = []
        rows: list[dict[str, Any]] = json.loads(shared)
        return rows

    def pop_scores(self, epoch: int) -> list[Scores]:
        """Return the losses that have come since the last call, at the end of an epoch.

        Those by a model of an earlier epoch are older than all that this one has trained on.
        """
        self.receive()
        taken, self._scores = self._scores, []
        return [scores if scores.epoch == epoch else scores._replace(rounds=0) for scores in taken]

    def finish(self, status: int) -> None:
        """Let helpers go, with the status that the job ends with."""
        if self._server is not None and self._server.finish(status):
            LOGGER.info("helpers drop what they are at: the ranks that train have evaluated the last model")

    def close(self) -> None:
        """Stop what runs in the background."""
        if self._server is not None:
            self._server.close()


def place_in(epoch: Epoch, accounts: Accounts, watch: Stopwatch, rounds: int, wall_sec: float) -> dict[str, Any]:
    """Tell where in a run the model of an epoch under way is from, after so many rounds of the epoch."""
    ahead, progress = rounds - epoch.progress.averages, epoch.progress
    samples = (progress.claimed or epoch.spent[1]) + ahead * epoch.round_samples
    train_sec = sum(watch.seconds.values()) + sum(spent for spent in watch.collectives if spent == spent)
    return {"epoch": accounts.epochs + 1, "round": accounts.rounds + rounds, "rounds": progress.version + ahead,
            "samples_seen": accounts.samples_seen + samples, "train_sec": accounts.train_sec + train_sec,
            "wall_sec": wall_sec}  # fmt: skip


def place_after(accounts: Accounts, wall_sec: float) -> dict[str, Any]:
    """Tell where in a run the model is from with which an epoch has ended."""
    return {"epoch": accounts.epochs, "round": accounts.rounds, "rounds": 0, "samples_seen": accounts.samples_seen,
            "train_sec": accounts.train_sec, "wall_sec": wall_sec}  # fmt: skip
