"""STL-SGD: stagewise local SGD, with longer rounds as the learning rate falls (Shen, Cheng, Liu and Xu, "STL-SGD:
Speeding Up Local SGD with Stagewise Communication Period", AAAI 2021).

The paper goes by stages: in stage s+1 the learning rate is half of that in stage s, or 1/(s+1) of the first one, and
the number k of local steps between two averages grows in the same measure; where workers draw from different data, by
the square root of it. Both rules are one, whatever the scheduler is. With eta the learning rate of an epoch, eta_1 the
largest so far, and q 1 or 0.5::

    before each epoch:
        g     = min((eta_1 / eta)^q, algorithm.max_growth)      # 1 as long as the rate only rises
        tau_i = max(1, round(g tau_i(1)))                       # tau_i(1) as for unbalanced local SGD
    a round, on worker i, from the common model x:
        x_i = x; tau_i local steps on x_i
        x   = (1/m) sum_i x_i

So averages become fewer where steps are small and models drift apart slowly. The bound is ours: a round is also where
non-finite values are found, and it has to fit into an epoch. The proximal term of the paper's non-convex version is
left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from hvd_hetero.algorithms.local_sgd import LocalSGD
from hvd_hetero.config.schema import AlgorithmConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.plan import Plan


@dataclass(frozen=True)
class STLSGDOptions(AlgorithmConfig):
    """Options of STL-SGD.

    Attributes:
        growth: q; 1 where all workers draw from the same data, 0.5 where they do not, 0: tau stays.
        max_growth: what tau is multiplied with at most.
    """

    growth: float = field(default=1.0, metadata={"at_least": 0, "at_most": 2})
    max_growth: float = field(default=8.0, metadata={"at_least": 1})


@final
class STLSGD(LocalSGD):
    """Multiply tau by what the learning rate has been divided by."""

    options: STLSGDOptions
    Options: ClassVar[type[AlgorithmConfig]] = STLSGDOptions
    follows_rate: ClassVar[bool] = True
    _highest, _factor = 0.0, 1.0

    def follow_rate(self, rate: float) -> None:
        self._highest = max(self._highest, rate)
        fallen = self._highest / rate if rate else math.inf if self._highest else 1.0
        self._factor = min(fallen**self.options.growth, self.options.max_growth)

    def note_average(self, seconds: float) -> None:
        """Leave the length of the first rounds as it was chosen: from then on it goes by the rate."""

    def taus(self, step_sec: Mapping[str, float] | None) -> dict[str, int]:
        return {name: tau and max(1, math.floor(self._factor * tau + 0.5))
                for name, tau in super().taus(step_sec).items()}  # fmt: skip

    def replan(self, step_sec: Sequence[float], rounds: int | None = None) -> Plan:
        before, plan = self.plan, super().replan(step_sec, rounds)
        times = self.step_times()
        wanted = self.taus(times)
        if plan is before and wanted != {c.name: c.tau for c in plan.classes}:
            try:
                longer = self.make_plan(times)
            except ConfigError:  # so long a round takes more samples than there are
                return plan
            is_timed = any(c.step_sec is not None for c in plan.classes)
            self.plan = longer if is_timed else longer.without_step_times()
            self.reason = f"the learning rate has fallen, and rounds are {self._factor:.3g} times as long as at first"
        return self.plan

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "highest": self._highest, "factor": self._factor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._highest, self._factor = state["highest"], state["factor"]
