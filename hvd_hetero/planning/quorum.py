"""Quorums: how many ranks a round of a partial collective waits for, and how many it should. Pure (numpy alone)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvd_hetero.errors import ConfigError

QUORUM = "quorum"
"""The mode of a partial collective in which a round starts when a quorum has arrived."""
ROUNDING = 1e-9


@dataclass(frozen=True)
class Quorum:
    """What has to be there for a round to start.

    Attributes:
        needed: of the weights of all ranks, in their unit.
        weights: by rank; all 1 where ranks are counted.
    """

    needed: float
    weights: tuple[float, ...]

    @classmethod
    def of(cls, value: float, weights: Sequence[float]) -> Quorum:
        """Make the quorum of a setting: below 1 it is a share of the weights, from 1 on a number of ranks."""
        if value < 1:
            return cls(value * sum(weights), tuple(weights))
        return cls(value, (1.0,) * len(weights))

    def reached(self, arrived: Collection[int], training: Collection[int]) -> bool:
        """Tell whether those who arrived are enough: all are, where fewer than needed still train."""
        there = sum(self.weights[rank] for rank in arrived)
        wanted = min(self.needed, sum(self.weights[rank] for rank in training))
        return bool(arrived) and there >= wanted * (1 - ROUNDING)


def check_quorum(key: str, value: float | None, ranks: int, mode: str) -> None:
    """Refuse the setting of a quorum that does not fit the ranks or the mode.

    Raises:
        ConfigError: it is not set in mode quorum, is no whole number of ranks, or above all; or set in another mode.
    """
    if mode != QUORUM:
        if value is not None:
            remedy = f"leave it null, or set {key.partition('.')[0]}.mode={QUORUM}"
            raise ConfigError(key, value, f"means nothing in mode {mode}", remedy)
        return
    remedy = f"give a number of ranks from 1 to {ranks}, or a share of their weights below 1"
    if value is None:
        raise ConfigError(key, None, "nothing says how many ranks a round waits for", remedy)
    if value >= 1 and value != math.floor(value):
        raise ConfigError(key, value, "is no whole number of ranks", remedy)
    if value > ranks:
        raise ConfigError(key, value, f"is above the number of ranks, {ranks}", remedy)


def best_quorum(step_sec: NDArray[np.float64], noise: float) -> int:
    """Return m for which m-Synchronous SGD takes the least time: argmin_m E[T_(m)] (1 + s / m).

    Begunov and Tyurin, "Do We Need Asynchronous SGD?" (2026): T_(m) is when the m-th of n gradients arrives, and
    s = sigma^2 / eps the gradients over which a mean has to be taken until its noise is as large as what is looked for.

    Args:
        step_sec: seconds of a gradient, ``[draws, n]``.
        noise: s, of one rank's gradient.
    """
    arrival = np.sort(step_sec, axis=1).mean(axis=0)
    return int(np.argmin(arrival * (1 + noise / np.arange(1, len(arrival) + 1)))) + 1
