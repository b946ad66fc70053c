"""Local steps that a program takes itself: the trainer hands out rounds, and waits until the program is done with each.

The trainer runs in a thread of its own and stays as it is, with its averages, plans and checkpoints. It and the
program take turns: one of the two always waits for the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from hvd_hetero.comm.nonfinite import Exclusions
from hvd_hetero.data import Batch
from hvd_hetero.data.batch import sample_counts
from hvd_hetero.describe import describe
from hvd_hetero.errors import RankError, Unquoted, UserError
from hvd_hetero.training.api import exit_on_error
from hvd_hetero.worker.losses import Numbers, per_sample
from hvd_hetero.worker.snapshot import snapshot
from hvd_hetero.worker.worker import Worker


class LoopExited(Exception):
    """The program has left its loop in the middle of a round."""


class Round:
    """One round of this rank: iterate over it for its local batches, and give back the losses of each.

    Attributes:
        number: from 1 over the whole run.
        measures: its steps only show how fast they are here: model, optimizer and random numbers are put back then.
        excluded: this rank's numbers (NaN, Inf) have not gone into the last average: the state of an optimizer of your
            own should be cleared, ``optimizer.state.clear()``; that of ``loop.optimizer`` has been.
        steps: taken so far.
    """

    def __init__(
        self, batches: Iterator[tuple[Any, set[int]]], number: int, measures: bool, excluded: bool,
        fail: Callable[[Exception], None],
    ) -> None:  # fmt: skip
        self._batches, self._fail, self._samples = batches, fail, set[int]()
        self.number, self.measures, self.excluded, self.steps = number, measures, excluded, 0
        self.taken: list[Numbers] = []

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                batch, self._samples = next(self._batches)
            except StopIteration:
                return
            except Exception as error:  # of reading: to look after that would cost more than a small step
                self._fail(error)
                raise
            self.steps += 1
            yield batch

    def losses(self, losses: Tensor, weights: Tensor | None = None) -> None:
        """Takes the per-sample losses ``[B]`` of the batch just trained on; the next epochs' sampling goes by them.

        Args:
            weights: ``[B]``, 0 for samples that do not count: they keep the losses that they had.

        Raises:
            RankError: they are not one number a sample; of several ranks, the job ends with status 2 instead.
        """
        try:
            values, weights = per_sample("round.losses", Unquoted(""), (losses, weights), self._samples)
        except UserError:
            again = partial(per_sample, "round.losses", Unquoted(describe(losses)), (losses, weights), self._samples)
            exit_on_error(partial(_alone, again))
            raise
        self.taken.append((values.detach(), weights))


def _alone(call: Callable[[], Any]) -> Any:
    """Call what goes wrong on one rank alone, while others wait for it.

    Raises:
        RankError: it has.
    """
    try:
        return call()
    except UserError as error:
        raise RankError(str(error)) from error


class LoopChannel:
    """The place where trainer and program meet.

    Attributes:
        is_out: the program has a round, and the trainer waits for it.
    """

    def __init__(self) -> None:
        self._to_program: SimpleQueue[Round | BaseException | None] = SimpleQueue()
        self._to_trainer: SimpleQueue[Exception | None] = SimpleQueue()
        self.is_out = False

    def begin(self, work: Callable[[], Any], device: str) -> None:
        """Start the trainer's thread; the program hears of the end of its work."""

        def run() -> None:
            problem = None
            try:
                if device != "cpu":
                    torch.cuda.set_device(torch.device(device))  # each thread has one of its own
                work()
            except BaseException as error:
                problem = error
            self._to_program.put(problem)

        threading.Thread(target=run, name="hvd_hetero.loop", daemon=True).start()

    def give(self, round: Round) -> None:
        """Hand out a round, and wait until the program is done with it; the trainer calls it.

        Raises:
            Exception: what has gone wrong there.
        """
        self._to_program.put(round)
        if (problem := self._to_trainer.get()) is not None:
            raise problem

    def swap(self, problem: Exception | None = None) -> Round | None:
        """Give back the round at hand and wait for the next one, None after the last; the program calls it.

        Args:
            problem: what has gone wrong in the round, with which the trainer is to end.

        Raises:
            BaseException: what the trainer has ended with.
        """
        if self.is_out:
            self._to_trainer.put(problem)
        item = self._to_program.get()
        self.is_out = isinstance(item, Round)
        if isinstance(item, BaseException):
            raise item
        return item


class LoopWorker(Worker):
    """A worker whose local steps are the program's; :meth:`connect` comes before the first."""

    _losses_key = "round.losses"

    def connect(
        self, channel: LoopChannel, excluded: Exclusions, kept: Mapping[str, Any], as_read: bool, needs_losses: bool,
        batch_size: Callable[[], int],
    ) -> None:  # fmt: skip
        """Take what hands rounds to the program.

        Args:
            kept: the program's own objects that its steps change.
            batch_size: tells of how many samples a step is, by the plan.
            as_read: a batch is handed out as a stream has it, else as (inputs, targets).
            needs_losses: samples are dealt by their losses, which a program must not leave out.
        """
        self._channel, self._exclusions, self._kept = channel, excluded, kept
        self._as_read, self._needs_losses = as_read, needs_losses
        self._batch_size, self._measures, self._excluded = batch_size, False, 0

    def local_steps(self, batches: Iterator[Batch], count: int, stop: Callable[[], bool] | None = None) -> int:
        """``count`` steps of the program on the next batches, fewer if ``stop`` says so after one; returns how many."""
        self._end_rest()
        is_whole = False

        def steps() -> Iterator[tuple[Any, set[int]]]:
            nonlocal is_whole
            self.watch.skip()  # what the program did between two rounds is no part of a step that is to be stretched
            for inputs, targets in self.emulator.steps(batches, count):
                counts = sample_counts(targets) | sample_counts(inputs)  # one of the two tells
                yield (inputs, counts) if self._as_read else ((inputs, targets), counts)
                if stop is not None and stop():
                    self.emulator.pause()
                    break
            is_whole = True

        excluded, before = self._exclusions.count, self._excluded
        round = Round(steps(), self._exclusions.round, self._measures, excluded > before, self._fail)
        self._excluded = excluded
        self._channel.give(round)
        if not is_whole:
            problem = f"a round has {count} batches, of which {round.steps} were taken"
            raise RuntimeError(f"{problem}: go through the whole round")
        self._collect_losses(round)
        return round.steps

    def check_learning(self) -> None:
        """Nothing: what learns is the program's to say, and its optimizer may have got it since."""

    def _collect_losses(self, round: Round) -> None:
        taken = round.taken
        if not taken and not self._needs_losses and not self._as_read and not self._measures:
            samples = round.steps * self._batch_size()
            nothing = torch.zeros(samples, dtype=torch.float32)
            taken = [(nothing, nothing)]  # they keep the losses that they had
        elif len(taken) != round.steps and (taken or self._needs_losses):
            problem = f"a round has {round.steps} batches, got losses of {len(taken)}"
            raise RuntimeError(f"{problem}: call round.losses for each batch")
        self._losses += taken

    def _fail(self, error: Exception) -> None:
        exit_on_error(lambda: self._channel.swap(error))

    def snapshot(self) -> Callable[[], None]:
        """Remembers everything that training changes; the rounds until it is put back are told to be measured."""
        restore, restore_kept, self._measures = super().snapshot(), snapshot(*self._kept.values()), True

        def restore_all() -> None:
            restore_kept()
            restore()
            self._measures = False

        return restore_all
