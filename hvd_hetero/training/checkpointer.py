"""Saving a job, and reading what was saved of one; all ranks take part in both.

An epoch is worked off in segments of rounds. After each one all ranks agree, in one small collective, on how far they
are, on whether somebody was asked to stop, and on whether to save. What is saved is copied first, and written by a
thread beside the next segments.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from hvd_hetero.checkpoint import CheckpointError, Store, join, split
from hvd_hetero.checkpoint.background_write import Best, Write, copied
from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.kv_store import JobEnv
from hvd_hetero.config.schema import RESHAPE, Config
from hvd_hetero.errors import ConfigError, Unquoted, UserError
from hvd_hetero.log import LOGGER
from hvd_hetero.telemetry.run_status import SAVE
from hvd_hetero.training.fingerprint import made_with
from hvd_hetero.training.resume import Found, load_for, places
from hvd_hetero.training.stop_request import StopRequest
from hvd_hetero.training.survivor import Survivor
from hvd_hetero.worker.epoch import Progress

NONE = -1
PATH_BYTES = 4096
LOCKSTEP, DRAINING = (0.7, 1), (30.0, 64)
"""How many seconds ranks work on between two agreements, and how many rounds the first time."""
LAST_SEC = 30.0
"""What a checkpoint that is on its way gets, where the job fails meanwhile."""
GROWTH = 4
"""By how much a segment may be longer than the one before: the first rounds of a job are slow."""


@dataclass(frozen=True)
class SyncDecision:
    """What all ranks agree on after a segment: how far the epoch is, whether to stop, and whether to save.

    Attributes:
        step_sec: of a local step in it on the slowest rank of each class, NaN if it took none; empty where nobody met.
        rounds: that it had.
        figures: the maxima of what ranks gave.
        keep: whether to remember the state, in case that a rank is lost.
    """

    progress: Progress
    stop: bool
    due: bool
    step_sec: tuple[float, ...] = ()
    rounds: int = 0
    figures: Sequence[float] = ()
    keep: bool = False


class SyncPoints:
    """When all ranks meet between two segments, and agree on whether to save; a subclass keeps what is saved.

    Args:
        needs_quiesce: whether the method has to come to rest before all ranks can meet.

    Attributes:
        saved_round: of the newest state that is kept, or is gone on from; ``saved_at``, when that was, by this
            process's clock.
        stopping: whether this rank was asked to stop.
    """

    stopping: StopRequest

    def __init__(self, config: Config, comm: Comm, needs_quiesce: bool) -> None:
        self._config, self._spec, self._comm = config, config.checkpoint, comm
        self._segment_sec, self._segment = DRAINING if needs_quiesce else LOCKSTEP
        if config.train.max_train_sec is not None:
            self._segment = 1  # until then nobody knows what share of the run is done
        self._began = time.monotonic()
        self._tried_at = self.saved_at = time.monotonic()
        self._tried = self.saved_round = NONE

    @property
    def active(self) -> bool:
        """Whether anything is saved before the run ends."""
        return self._spec.every_sec is not None or self._spec.every_rounds is not None

    @property
    def _is_busy(self) -> bool:
        """Whether what was saved last is still on its way."""
        return False

    def _is_asked(self) -> bool:
        """Whether somebody asks rank 0 to save now."""
        return False

    def _is_copy_due(self) -> bool:
        """Whether rank 0 finds it time to remember the state."""
        return False

    def _settle(self) -> None:
        """Take note of what has become of what was saved last; no rank is busy with it any more."""

    def load(self, found: Found | None, cluster: Cluster) -> tuple[Any, bool]:
        """Return what to go on from, and whether it is of another configuration or number of ranks."""
        raise NotImplementedError(type(self).__name__)

    def save(self, number: int, epochs: int, state: Callable[[], Any], wait: bool, value: float | None = None) -> None:
        """Save every rank's state; if that cannot be done, the run goes on without, and says so.

        Args:
            number: rounds so far.
            state: makes it; called only if there is something new to save.
            wait: until it is on the disk; else it is copied, and a thread writes it.
            value: the evaluation at this time, if there was one: the best one's checkpoint is kept.
        """
        raise NotImplementedError(type(self).__name__)

    def abandon(self) -> None:
        """Lets a checkpoint that is on its way come to its end, where this rank fails and would take it along."""

    def keep(self, number: int, state: Callable[[], Any]) -> None:
        """Remember what would be saved after so many rounds, in case that another rank is lost."""

    def survive(self) -> None:
        """Write what is remembered: another rank is lost, or this one fails."""

    def newest(self) -> int | None:
        """Round of the newest checkpoint, if there is one."""
        return None

    # ---- between two segments --------------------------------------------------------------------------------------

    def segment(self, left: int, rounds: int) -> int:
        """Rounds to go before the next agreement, of those that are left of the epoch, after so many of the run."""
        self._began = time.monotonic()
        every = self._spec.every_rounds
        return min(left, self._segment, every - rounds % every if every else left)

    def agree(
        self, progress: Progress, length: int, rounds: int, step_sec: Sequence[float] = (),
        figures: Sequence[float] = (), left_sec: float = math.inf,
    ) -> SyncDecision:  # fmt: skip
        """Meets all ranks after a segment.

        Args:
            progress: how far this rank has come in it.
            length: rounds that it was to have.
            rounds: of the run, before it.
            step_sec: of its local steps in it, at the place of its class; 0 elsewhere.
            figures: others, as many on every rank.
            left_sec: until the run's limit; the next segment is not to go beyond it. Rank 0's counts.
        """
        now, spec, lead = time.monotonic(), self._spec, self._comm.rank == 0
        due = spec.every_sec is not None and now - self._tried_at >= spec.every_sec
        due = due or (lead and self._is_asked())
        worth = round(min(self._segment_sec, max(left_sec, 0.0)) * length / max(now - self._began, 1e-6))
        flags = [self.stopping(), self._is_busy, lead and due, lead and self._is_copy_due(),
                lead and max(1, min(worth, GROWTH * length))]
        mine = astuple(progress)
        numbers = [float(number) for number in (*mine, *flags, *step_sec, *figures)]
        most = self._comm.max(numbers, "epoch.progress")
        progress = Progress(*(int(number) for number in most[: len(mine)]))
        stop, busy, late, keep, segment, *most = most[len(mine) :]
        slowest = tuple(sec or math.nan for sec in most[: len(step_sec)])
        self._segment = int(segment)
        if not busy:
            self._settle()
        number = rounds + progress.averages
        save = bool(late) and not busy
        if spec.every_rounds is not None:  # in partial collectives rounds do not come in the planned numbers
            save = save or number // spec.every_rounds > max(self._tried, 0) // spec.every_rounds
        due, stop = self.active and save and number > self._tried, self.active and stop
        return SyncDecision(progress, bool(stop), due, slowest, length, most[len(step_sec) :], bool(keep))


class Saver(SyncPoints):
    """The checkpoints of one run.

    Args:
        run_dir: on rank 0, which tells the others.
        best_by: what evaluations are compared by.
    """

    def __init__(
        self, run_dir: str | Path, config: Config, env: JobEnv, comm: Comm, needs_quiesce: bool, best_by: str = ""
    ) -> None:
        super().__init__(config, comm, needs_quiesce)
        self._best_by = best_by
        self._env, self._made_with = env, made_with(config)
        path = str(Path(run_dir).resolve()).encode().ljust(PATH_BYTES) if comm.rank == 0 else bytes(PATH_BYTES)
        message = comm.broadcast(torch.tensor(list(path), dtype=torch.uint8), "checkpoint.path")
        self._run_dir = Path(bytes(message.tolist()).decode().rstrip())
        self._store = Store(self._run_dir, self._spec.keep)
        self.stopping = StopRequest(self._run_dir)
        self.survivor = Survivor(self._store, comm.rank, self._spec.memory_sec)
        self.stopping.on_signal = self.survivor.write_soon
        self._write: Write | None = None
        self._best: float | None = None

    @property
    def _is_busy(self) -> bool:
        return self._write is not None and self._write.busy

    def _is_asked(self) -> bool:
        return os.path.exists(self._run_dir / SAVE)

    def _is_copy_due(self) -> bool:
        return self.survivor.is_due

    def load(self, found: Found | None, cluster: Cluster) -> tuple[Any, bool]:
        """What to go on from, and whether it is of another configuration or number of ranks.

        It is this rank's state in the checkpoint that rank 0 has found; where it is reshaped, what
        :func:`~hvd_hetero.training.resume.load_for` makes of it; None where there is none.

        Raises:
            UserError: on all ranks, if one of them cannot read its part.
        """
        message = torch.tensor([NONE, 0, 0])
        if found is not None:
            elsewhere = self._config.run.resume == RESHAPE and found.state.get("classes") != places(cluster)
            message = torch.tensor([found.round, int(found.reshaped or elsewhere), int(found.restores_ranks)])
        number, reshaped, restores_ranks = (int(x) for x in self._comm.broadcast(message, "checkpoint.found"))
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
            rank = self._comm.rank
            state = load_for(saved, self._config, cluster, rank, bool(restores_ranks)) if reshaped else saved.load(rank)
            if found is not None:
                state["rank0"] = found.state["rank0"]
                self._store.rewind(number)
                self._best = self._store.best_value(self._best_by)
        except CheckpointError as error:
            problem = f"rank {self._comm.rank}: {error}"
            print(f"hvd-hetero: error: {problem}", file=sys.stderr, flush=True)
        if self._comm.max([float(bool(problem))], "checkpoint.loaded")[0]:
            raise UserError(problem or "a rank cannot read its part of the checkpoint, and has said why")
        self._tried = self.saved_round = number
        return state, bool(reshaped)

    def save(self, number: int, epochs: int, state: Callable[[], Any], wait: bool, value: float | None = None) -> None:
        self._finish()
        if self._comm.rank == 0:
            with suppress(OSError):
                (self._run_dir / SAVE).unlink()
        if number > self.saved_round:  # one that could not be saved is tried again, where the job ends
            best = Best(value, self._best_by) if value is not None and self._is_best(value) else None
            self._write = Write(self._store, self._env, number, epochs, self._made_with,
                                state if wait else lambda: copied(state()), best)
            self._tried_at, self._tried = time.monotonic(), number
            if wait:
                self._finish()

    def abandon(self) -> None:
        if self._write is not None:
            self._write.join(LAST_SEC)

    def keep(self, number: int, state: Callable[[], Any]) -> None:
        self.survivor.keep(number, state)

    def survive(self) -> None:
        self.survivor.write()

    def newest(self) -> int | None:
        latest = self._store.latest()
        return None if latest is None else latest.meta.round

    def _is_best(self, value: float) -> bool:
        better = not math.isnan(value) and (self._best is None or value > self._best)
        self._best = value if better else self._best
        return better

    def _finish(self) -> None:
        if self._write is not None:
            self._write.join()
            self._settle()

    def _settle(self) -> None:
        if self._write is None:
            return
        problem = self._write.problem
        if problem.startswith(f"rank {self._comm.rank}:"):  # the others' they say themselves
            LOGGER.warning("no checkpoint at round %s: %s", self._write.number, problem)
        if not self._comm.max([float(bool(problem))], "checkpoint.done")[0]:
            self.saved_round, self.saved_at = self._write.number, self._tried_at
        self._write = None


class LoopSaver(SyncPoints):
    """States of a run that a program keeps, wherever it likes.

    Attributes:
        is_asked: the program asks whether something is to be saved.
        state: the newest, of this rank; None where there is none that the program has not been told of.
        loaded_state: what to go on from, if there is anything.
    """

    def __init__(self, config: Config, comm: Comm, needs_quiesce: bool, loaded_state: Mapping[str, Any] | None) -> None:
        super().__init__(config, comm, needs_quiesce)
        self.stopping = StopRequest(None)
        self.is_asked, self.loaded_state = False, loaded_state
        self.state: dict[str, Any] | None = None

    def load(self, found: Found | None, cluster: Cluster) -> tuple[Any, bool]:
        """This rank's state, which the program has given back.

        Raises:
            UserError: on all ranks, if they were given states of different rounds, or some of them none.
        """
        mine = NONE if self.loaded_state is None else int(self.loaded_state["round"])
        rounds = [int(number) for number in self._comm.gather(torch.tensor([mine]), "checkpoint.given")]
        if len(set(rounds)) > 1:
            text = ", ".join("none" if number == NONE else f"round {number}" for number in rounds)
            raise ConfigError("load_state_dict", Unquoted(text), "by rank, these are states of different rounds",
                              "give each rank its own, all of one round")  # fmt: skip
        if self.loaded_state is None:
            return None, False
        self._tried = self.saved_round = mine
        return join(self.loaded_state["tensors"], self.loaded_state["rest"]), False

    def save(self, number: int, epochs: int, state: Callable[[], Any], wait: bool, value: float | None = None) -> None:
        """Have a copy of this rank's state at hand, where the program asks for it."""
        if number > self._tried:
            self._tried_at, self._tried = time.monotonic(), number
            if self.is_asked:
                tensors, rest = split(state())
                copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
                self.state = {"round": number, "tensors": copies, "rest": copy.deepcopy(rest)}
