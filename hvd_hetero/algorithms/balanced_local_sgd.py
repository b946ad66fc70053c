"""Balanced local SGD (Stich, "Local SGD Converges Fast and Communicates Little", 2019): all workers do the same.

A round, on each of the m workers, from the common model x::

    x_i = x
    repeat tau times:                   # the same tau on every class: the fast ones wait for the slow ones
        draw a mini-batch from the worker's share of the epoch
        x_i = x_i - lr * gradient(x_i)
    x = (1/m) sum_i x_i

Samples are drawn uniformly, without replacement over all classes.
"""

from __future__ import annotations

from collections.abc import Mapping

from hvd_hetero.algorithms.local_sgd import LocalSGD
from hvd_hetero.config.schema import AUTO
from hvd_hetero.errors import ConfigError


class BalancedLocalSGD(LocalSGD):
    """Give all classes the same number of local steps, and all models the same weight."""

    @property
    def needs_speeds(self) -> bool:
        return self.train.tau == AUTO

    def taus(self, step_sec: Mapping[str, float] | None) -> dict[str, int]:
        if step_sec is not None and self.train.tau == AUTO:  # all wait for the slowest class: averages alone count
            slowest = max(step_sec, key=step_sec.__getitem__)
            return dict.fromkeys(step_sec, self.tau_fastest(dict.fromkeys(step_sec, step_sec[slowest])))
        if not isinstance(self.train.tau, Mapping):
            return {c.name: self.train.tau for c in self.cluster.classes}
        taus = super().taus(step_sec)
        if len(set(taus.values())) > 1:
            problem = f"{self.options.name} takes the same number of local steps on all classes"
            raise ConfigError("train.tau", self.train.tau, problem, "give one number, or use unbalanced_local_sgd")
        return taus
