"""Delays put into the ranks' steps, for experiments with unbalanced load. Pure (no torch, no Horovod).

As in the experiments of eager-SGD (Li et al. 2020): a delay is slept after a step's batch is there and counts as the
step's compute. All draws come from ``delays.seed``, the step and the rank, so a run can be repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np

from hvd_hetero.config.schema import DelaysConfig
from hvd_hetero.errors import ConfigError


def check_delays(spec: DelaysConfig) -> None:
    """Refuses delays that could not be repeated.

    Raises:
        ConfigError: they have no seed.
    """
    if spec.distribution is not None and spec.seed is None:
        raise ConfigError("delays.seed", None, "delays are drawn at random", "set it, for example delays.seed=0")


def delays(spec: DelaysConfig, rank: int, size: int, first: int = 0) -> Iterator[float] | None:
    """Seconds by which each step of a rank is delayed, from its step ``first`` on, or None for no delays.

    - ``random_ranks``: in each step ``ranks`` draws of a rank, each drawn one is delayed by ``sec``; since a rank may
      be drawn twice, these are up to ``ranks``.
    - ``lognormal``: every rank and step on its own, ``sec * exp(sigma * N(0, 1))``; ``sec`` is the median.
    - ``linear_skew``: from 0 to ``sec``, in equal parts over the ranks, handed on by one rank each step.
    """
    if spec.distribution is None:
        return None
    assert spec.seed is not None
    draw, seed = DISTRIBUTIONS[spec.distribution], spec.seed
    return (draw(spec, np.random.default_rng((seed, step)), step, rank, size) for step in count(first))


Distribution = Callable[[DelaysConfig, np.random.Generator, int, int, int], float]


def _random_ranks(spec: DelaysConfig, rng: np.random.Generator, step: int, rank: int, size: int) -> float:
    return spec.sec if rank in rng.integers(size, size=spec.ranks) else 0.0


def _lognormal(spec: DelaysConfig, rng: np.random.Generator, step: int, rank: int, size: int) -> float:
    return spec.sec * math.exp(spec.sigma * float(rng.standard_normal(size)[rank]))


def _linear_skew(spec: DelaysConfig, rng: np.random.Generator, step: int, rank: int, size: int) -> float:
    return spec.sec * ((rank + step) % size) / max(size - 1, 1)


DISTRIBUTIONS: dict[str, Distribution] = {
    "random_ranks": _random_ranks, "lognormal": _lognormal, "linear_skew": _linear_skew,
}  # fmt: skip
