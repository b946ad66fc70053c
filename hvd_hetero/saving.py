"""Saving a job, and taking up one that was saved; all ranks take part in both.

A pass is worked off in stretches of rounds. After each one all ranks agree, in one small collective, on how far they
are, on whether somebody was asked to stop, and on whether to save. What is saved is copied first, and written by a
thread beside the next stretches.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hvd_hetero.comm.horovod import Comm
from hvd_hetero.errors import ConfigError, UserError
from hvd_hetero.passes import Reached
from hvd_hetero.plan import Plan
from hvd_hetero.schema import AUTO, RESHAPE, CheckpointConfig
from hvd_hetero.stopping import StopRequest
from hvd_hetero.store import CheckpointError, Store
from hvd_hetero.worker import Worker
from hvd_hetero.writing import Write, copied

NONE = -1
PATH_BYTES = 4096
LOCKSTEP, DRAINING = (1.0, 1), (30.0, 64)
"""How many seconds ranks work on between two agreements, and how many rounds the first time."""
GROWTH = 4
"""By how much a stretch may be longer than the one before: the first rounds of a job are slow."""


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from: its round, rank 0's state, and whether it is of another configuration or ranks."""

    round: int
    state: Any
    reshaped: bool = False


def find(run_dir: Path, digest: str, world_size: int, reshape: bool = False) -> Found | None:
    """The newest checkpoint of a run, if there is one; an older one where it is damaged.

    Args:
        digest: of the configuration.
        reshape: take one of another configuration or number of ranks too.

    Raises:
        CheckpointError: there are checkpoints, but none that this run can go on from.
    """
    first: CheckpointError | None = None
    damaged: list[CheckpointError] = []
    wanted = (None, None) if reshape else (digest, world_size)
    for candidate in Store(run_dir).candidates(*wanted):
        try:
            if candidate.checkpoint is not None:
                candidate.checkpoint.verify()
                meta = candidate.checkpoint.meta
                other = (meta.config_digest, meta.world_size) != (digest, world_size)
                found = Found(candidate.round, candidate.checkpoint.load(0), other)
                for error in damaged:
                    warnings.warn(str(error), RuntimeWarning, stacklevel=2)
                return found
        except CheckpointError as error:
            damaged.append(error)
            first = first or error
            continue
        if not candidate.unfinished:
            first = first or candidate.error
    if first is not None:
        raise first
    return None


def check_fits(state: Any, worker: Worker, samples: int) -> None:
    """Refuses to carry a checkpoint over to something else than what it is of.

    Raises:
        ConfigError: another model, or another number of samples.
    """
    saved, own = state["worker"]["model"], worker.state.state_dict()
    shapes = [[len(vector) for vector in one["vectors"]] for one in (saved, own)]
    known = own["others"]["tensors"]
    same = all(known[name].shape == t.shape for name, t in saved["others"]["tensors"].items() if name in known)
    if shapes[0] != shapes[1] or saved["layout"] != own["layout"] or not same:
        problem = "the checkpoint is of another model"
        remedy = "take the model that it was made with, and the same train.channels_last"
        raise ConfigError("run.resume", RESHAPE, problem, remedy)
    if (known := len(state["rank0"]["sampler"]["losses"])) != samples:
        problem = f"the checkpoint is of {known} training samples, and these are {samples}"
        raise ConfigError("run.resume", RESHAPE, problem, "take the data that it was made with")


def check_devices(state: Any, worker: Worker, comm: Comm) -> None:
    """Refuses to go on with ranks on other kinds of devices, whose random numbers are others; all ranks call it.

    Raises:
        ConfigError: on all ranks.
    """
    was_on_gpu = state["worker"]["random"]["cuda"] is not None
    if comm.max([float(was_on_gpu != (worker.device.type == "cuda"))], "checkpoint.device")[0]:
        problem = "the checkpoint was made with other ranks on GPUs"
        raise ConfigError("run.resume", AUTO, problem, "give the ranks the devices that they had, or set it to reshape")


@dataclass(frozen=True)
class Agreed:
    """What all ranks agree on after a stretch: how far the pass is, whether to stop, and whether to save."""

    reached: Reached
    stop: bool
    due: bool


class Saver:
    """The checkpoints of one run.

    Args:
        run_dir: on rank 0, which tells the others.
        digest: of the configuration, without what says how long the run goes on.
        drains: whether the method has to come to rest before all ranks can meet.

    Attributes:
        saved_round: that is on the disk, or is gone on from.
    """

    def __init__(self, run_dir: str | Path, spec: CheckpointConfig, digest: str, comm: Comm, drains: bool) -> None:
        self._spec, self._digest, self._comm = spec, digest, comm
        self._stretch_sec, self._stretch = DRAINING if drains else LOCKSTEP
        path = str(Path(run_dir).resolve()).encode().ljust(PATH_BYTES) if comm.rank == 0 else bytes(PATH_BYTES)
        told = comm.broadcast(torch.tensor(list(path), dtype=torch.uint8), "checkpoint.path")
        self._run_dir = Path(bytes(told.tolist()).decode().rstrip())
        self._store = Store(self._run_dir, spec.keep)
        self.stopping = StopRequest(self._run_dir)
        self._began = time.monotonic()
        self._saved_at, self._tried, self.saved_round = time.monotonic(), NONE, NONE
        self._write: Write | None = None
        self._best: float | None = None

    @property
    def active(self) -> bool:
        """Whether anything is saved before the run ends."""
        return self._spec.every_sec is not None or self._spec.every_rounds is not None

    def load(self, found: Found | None) -> tuple[Any, bool]:
        """What to go on from, and whether it is of another configuration or number of ranks.

        It is this rank's state in the checkpoint that rank 0 has found, rank 0's where it is reshaped; None where there
        is none.

        Raises:
            UserError: on all ranks, if one of them cannot read its part.
        """
        told = torch.tensor([NONE, 0] if found is None else [found.round, int(found.reshaped)])
        number, reshaped = (int(x) for x in self._comm.broadcast(told, "checkpoint.found"))
        if number == NONE:
            problem = ""
            try:
                if self._comm.rank == 0 and self._store.folder.exists():
                    self._store.rewind(None)
            except CheckpointError as error:
                problem = str(error)
            if self._comm.max([float(bool(problem))], "checkpoint.begun")[0]:
                raise UserError(problem or "rank 0 cannot remove old checkpoints, and says why")
            return None, False
        state, problem = None, ""
        try:
            saved = self._store.at(number)
            state = saved.load(0 if reshaped else self._comm.rank)
            if reshaped:  # rank 0 may have had no part in the training
                state["worker"] = saved.load(min(Plan.from_dict(state["plan"]).training[0].ranks))["worker"]
            if self._comm.rank == 0:
                self._store.rewind(number)
                self._best = self._store.best_value()
        except CheckpointError as error:
            problem = f"rank {self._comm.rank}: {error}"
            print(f"hvd-hetero: error: {problem}", file=sys.stderr, flush=True)
        if self._comm.max([float(bool(problem))], "checkpoint.loaded")[0]:
            raise UserError(problem or "a rank cannot read its part of the checkpoint, and has said why")
        self._tried = self.saved_round = number
        return state, bool(reshaped)

    # ---- between two stretches --------------------------------------------------------------------------------------

    def stretch(self, left: int, rounds: int) -> int:
        """Rounds to go before the next agreement, of those that are left of the pass, after so many of the run."""
        self._began = time.monotonic()
        if not self.active:
            return left
        every = self._spec.every_rounds
        return min(left, self._stretch, every - rounds % every if every else left)

    def agree(self, reached: Reached, length: int, rounds: int) -> Agreed:
        """Meets all ranks after a stretch.

        Args:
            reached: how far this rank has come in it.
            length: rounds that it was to have.
            rounds: of the run, before it.
        """
        now, spec, lead = time.monotonic(), self._spec, self._comm.rank == 0
        due = spec.every_sec is not None and now - self._saved_at >= spec.every_sec
        worth = round(self._stretch_sec * length / max(now - self._began, 1e-6))
        said = [self.stopping(), self._write is not None and self._write.busy, lead and due,
                lead and max(1, min(worth, GROWTH * length))]
        reached, (stop, busy, late, stretch) = reached.agreed(self._comm, said)
        self._stretch = int(stretch)
        if self._write is not None and not busy:
            self._go_on()
        number = rounds + reached.rounds
        if spec.every_rounds is not None:  # in partial collectives rounds do not come in the planned numbers
            late = late or number // spec.every_rounds > max(self._tried, 0) // spec.every_rounds
        return Agreed(reached, bool(stop), bool(late and self._write is None and number > self._tried))

    def save(self, number: int, passes: int, state: Callable[[], Any], wait: bool, value: float | None = None) -> None:
        """Saves every rank's state; if that cannot be done, the run goes on without, and says so.

        Args:
            number: rounds so far.
            state: makes it; called only if there is something new to save.
            wait: until it is on the disk; else it is copied, and a thread writes it.
            value: the evaluation at this time, if there was one: the best one's checkpoint is kept.
        """
        self._finish()
        if number > self.saved_round:  # one that could not be saved is tried again, where the job ends
            content = state()
            self._write = Write(self._store, number, passes, self._digest, self._comm,
                                content if wait else copied(content), self._is_best(value))
            self._saved_at, self._tried = time.monotonic(), number
            if wait:
                self._finish()

    def newest(self) -> int | None:
        """Round of the newest checkpoint, if there is one."""
        latest = self._store.latest()
        return None if latest is None else latest.meta.round

    def _is_best(self, value: float | None) -> float | None:
        if value is None or math.isnan(value) or (self._best is not None and value <= self._best):
            return None
        self._best = value
        return value

    def _finish(self) -> None:
        while self._write is not None:
            self._write.join()
            if not self._comm.max([float(self._write.busy)], "checkpoint.wait")[0]:
                self._go_on()

    def _go_on(self) -> None:
        assert self._write is not None
        if not self._write.go_on():
            if self._write.done:
                self.saved_round = self._write.number
            self._write = None
