"""Decide where a run ends, from figures that all ranks share. Pure (no torch, no Horovod)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hvd_hetero.config.schema import TrainConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.plan import Plan


@dataclass(frozen=True)
class RunProgress:
    """What a run has done so far; ``fast_steps`` are those of the rank that took the most.

    Attributes:
        epoch_rounds: of the epoch under way, which none of the others count, when all ranks last met; in ``epoch_sec``.
    """

    epochs: int = 0
    rounds: int = 0
    fast_steps: int = 0
    samples: int = 0
    train_sec: float = 0.0
    epoch_rounds: float = 0.0
    epoch_sec: float = 0.0

    def after(self, plan: Plan) -> RunProgress:
        """What is done one more epoch later; the clock is left alone."""
        steps, samples = plan.rounds * fast_steps(plan), plan.rounds * round_samples(plan)
        return RunProgress(self.epochs + 1, self.rounds + plan.rounds, self.fast_steps + steps, self.samples + samples,
                    self.train_sec)


def next_rounds(train: TrainConfig, plan: Plan, done: RunProgress) -> int:
    """Rounds of the next epoch: all of the plan's, fewer where a limit lies within it, 0 where the run is over.

    A limit in steps or samples is never exceeded. One in seconds is met as nearly as the mean speed so far can tell;
    within an epoch it is looked at where ranks meet.
    """
    if train.epochs is not None and done.epochs >= train.epochs:
        return 0
    rounds = plan.rounds
    if train.max_fast_steps is not None:
        rounds = min(rounds, (train.max_fast_steps - done.fast_steps) // fast_steps(plan))
    if train.max_samples is not None:
        rounds = min(rounds, (train.max_samples - done.samples) // round_samples(plan))
    if train.max_train_sec is not None and done.samples and done.train_sec > 0:
        left = (train.max_train_sec - done.train_sec) * done.samples / done.train_sec
        rounds = min(rounds, round(left / round_samples(plan)))
    return max(0, rounds)


def rest_rounds(train: TrainConfig, old: Plan, new: Plan, left: int, samples: int, done: RunProgress) -> int:
    """Rounds of another plan that take the place of those that are left of an epoch; perhaps 0.

    Args:
        left: rounds of the old plan, and ``samples``, how many there are for what takes their place.
        done: so far, in this epoch too. Its limit in seconds has been reckoned with when it began.
    """
    counted = fast_steps if train.epoch_length == "fast_steps" else round_samples
    rounds = min(left * counted(old) // counted(new), samples // round_samples(new))
    return min(rounds, next_rounds(replace(train, max_train_sec=None), new, done))


def expected_epochs(train: TrainConfig, plan: Plan) -> int | None:
    """How many epochs the run will have, the last one perhaps short; None where only seconds limit it."""
    limits = [] if train.epochs is None else [train.epochs]
    if train.max_fast_steps is not None:
        limits.append(math.ceil(train.max_fast_steps // fast_steps(plan) / plan.rounds))
    if train.max_samples is not None:
        limits.append(math.ceil(train.max_samples // round_samples(plan) / plan.rounds))
    return min(limits) if limits else None


def check_limits(train: TrainConfig, plan: Plan) -> None:
    """Refuses limits within which the plan has no round at all.

    Raises:
        ConfigError: naming the limit, and what one round takes.
    """
    for key, limit, takes in (
        ("train.max_fast_steps", train.max_fast_steps, fast_steps(plan)),
        ("train.max_samples", train.max_samples, round_samples(plan)),
    ):
        if limit is not None and limit < takes:
            remedy = f"set it to {takes} or more, or a smaller train.tau"
            raise ConfigError(key, limit, f"one round takes {takes}", remedy)


def fast_steps(plan: Plan) -> int:
    """Local steps of one round, on the ranks that take the most."""
    return max(c.tau for c in plan.classes)


def round_samples(plan: Plan) -> int:
    """Samples of one round, over all ranks."""
    return sum(c.round_samples for c in plan.classes)
