"""Learning-rate schedules by progress: what share of a run is done, whatever its budget is counted in. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hvd_hetero.config.schema import TrainConfig
from hvd_hetero.errors import ConfigError, Unquoted, nearest
from hvd_hetero.planning.plan import Plan
from hvd_hetero.planning.stop_criteria import RunProgress, fast_steps, round_samples

COSINE, LINEAR = "cosine", "linear"
NAMES = (COSINE, LINEAR)
ARGUMENTS: Mapping[str, float] = {"warmup": 0.0, "floor": 0.0}
"""Share of the run in which the rate rises linearly from 0; share of the rate that is left at the run's end."""


def check_schedule(train: TrainConfig) -> None:
    """Refuse arguments that a named schedule does not have.

    Raises:
        ConfigError: naming the key.
    """
    if train.scheduler is None and train.scheduler_unit != "epoch":
        problem = "there is no scheduler that could step"
        raise ConfigError("train.scheduler_unit", train.scheduler_unit, problem, "set train.scheduler")
    if train.scheduler not in NAMES:
        return
    for name, value in train.scheduler_args.items():
        key = f"train.scheduler_args.{name}"
        if name not in ARGUMENTS:
            raise ConfigError(key, value, f"is no argument of {train.scheduler}", nearest(name, ARGUMENTS))
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= 1 or (name == "warmup" and value == 1):
            raise ConfigError(key, Unquoted(value), "is no share", "give a number from 0 to 1 (below 1 for warmup)")


def rate_factor(name: str, fraction: float, args: Mapping[str, Any]) -> float:
    """Return the factor of the learning rate where ``fraction`` of the run is done, in [0, 1]."""
    filled = {**ARGUMENTS, **args}
    warmup, floor = filled["warmup"], filled["floor"]
    if fraction < warmup:
        return fraction / warmup
    left = 1 - (fraction - warmup) / (1 - warmup)
    shape = left if name == LINEAR else 0.5 * (1 - math.cos(math.pi * left))
    return floor + (1 - floor) * shape


def next_rate(train: TrainConfig, plan: Plan, done: RunProgress, scheduled: float = 1.0) -> float:
    """Return the learning rate with which the next epoch begins.

    Args:
        scheduled: by a scheduler that steps; what is set, where the schedule goes by progress.
    """
    if train.scheduler not in NAMES:
        return scheduled
    return scheduled * rate_factor(train.scheduler, run_fraction(train, plan, done, 0.0), train.scheduler_args)


def round_factor(train: TrainConfig, plan: Plan, done: RunProgress, number: int, rounds: float) -> float | None:
    """Return the factor of the learning rate in a round, by warm-up and named schedule; None where there are none.

    Args:
        done: at the end of the last epoch.
        number: of the round, from 1 over the whole run; ``rounds``, those of the epoch under way.
    """
    factor = None
    if train.warmup_rounds:  # always: a late rank may skip the round with which the warm-up ends
        factor = min(1.0, number / train.warmup_rounds)
    if train.scheduler in NAMES:
        fraction = run_fraction(train, plan, done, rounds)
        factor = (factor or 1.0) * rate_factor(train.scheduler, fraction, train.scheduler_args)
    return factor


def run_fraction(train: TrainConfig, plan: Plan, done: RunProgress, rounds: float) -> float:
    """Return what share of a run is done; of several limits, by the one that is nearest.

    Args:
        done: at the end of the last epoch.
        rounds: of the epoch under way. The seconds of a round are taken to be those of all rounds until ranks last met,
            so that all of them come to the same share, but half of those left at most, since the first round may have
            been a slow one; before they have met none have passed.
    """
    fractions = [0.0]
    if train.epochs is not None:
        fractions.append((done.epochs + rounds / plan.rounds) / train.epochs)
    if train.max_fast_steps is not None:
        fractions.append((done.fast_steps + rounds * fast_steps(plan)) / train.max_fast_steps)
    if train.max_samples is not None:
        fractions.append((done.samples + rounds * round_samples(plan)) / train.max_samples)
    if train.max_train_sec is not None and (past := done.rounds + done.epoch_rounds):
        spent = done.train_sec + done.epoch_sec
        since = min(spent * (rounds - done.epoch_rounds) / past, max(0.0, train.max_train_sec - spent) / 2)
        fractions.append((spent + since) / train.max_train_sec)
    return min(1.0, max(fractions))


def left_sec(spent_sec: float, before: float, fraction: float) -> float | None:
    """Return the seconds that a run will take from now on, at the pace so far; None before anything is done.

    Args:
        spent_sec: by this job, in which the share of the run that is done has grown from ``before`` to ``fraction``.
    """
    return spent_sec * (1 - fraction) / (fraction - before) if fraction > before else None
