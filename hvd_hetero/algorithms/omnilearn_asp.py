"""OmniLearn, its asynchronous form: ranks step on their own, with batches by speed (Tyagi and Sharma, "OmniLearn: A
Framework for Distributed Deep Learning over Heterogeneous Clusters", IEEE TPDS 2025; "ASP" there).

A server has the model x. Rank i has a batch b_i and an optimizer of its own::

    repeat until the samples of the epoch are used up:
        rank i: take the next b_i samples that no rank has taken
                x_i = x;  one step of its optimizer on x_i;  push x - x_i
        server: x = x - (x - x_i);  give rank i the current x           # at once, without waiting for anybody
    after the epoch, with t_i the mean time of rank i's steps in it:
        c_i = b_i mean_j(t_j) / t_i
        c_i = b_i where |c_i - b_i| < deadband c_i                      # small differences are noise
        b_i = ceil(c_i), no less than the least nor more than the most

The published server stores the model that comes, and the last writer wins: what others have pushed meanwhile is lost.
Here a push is a rank's progress, so all of it counts; alone, or where nobody else has pushed meanwhile, both are the
same. As published, batches are not brought back to a common sum, which has no meaning here: their sum may change. A
rank whose batch is small steps as often as the others, along noisier gradients. Batches stay where a rank had no step.

``train.batch_size`` is what all begin with; ``algorithm.min_local_batch`` and ``algorithm.max_local_batch`` bound it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, final

from hvd_hetero.algorithms.asgd import ASGDRule
from hvd_hetero.algorithms.asynchronous import Asynchronous
from hvd_hetero.algorithms.server_rule import Rule
from hvd_hetero.config.schema import AlgorithmConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.plan import Plan, controlled


@dataclass(frozen=True)
class OmniLearnOptions(AlgorithmConfig):
    """Options of OmniLearn's asynchronous form.

    Attributes:
        deadband: changes of a batch that are a smaller share of the new one are not made.
        min_local_batch: samples of a step that no rank gets less of; two where the model cannot train on one.
        max_local_batch: what none gets more of.
    """

    deadband: float = field(default=0.2, metadata={"at_least": 0, "at_most": 1})
    min_local_batch: int = field(default=16, metadata={"at_least": 1})
    max_local_batch: int = field(default=96, metadata={"at_least": 1})


class ProgressRule(ASGDRule):
    """Add the progress of each push to the model."""

    is_outer = True


@final
class OmniLearnASP(Asynchronous):
    """Push the progress of single steps, and let batches follow speed."""

    options: OmniLearnOptions
    Options: ClassVar[type[AlgorithmConfig]] = OmniLearnOptions
    batch_varies: ClassVar[bool] = True
    flat_gradients: ClassVar[bool] = False
    pushes_gradients: ClassVar[bool] = False

    @property
    def least(self) -> int:
        """Samples of a step that no rank gets less of."""
        return max(self.options.min_local_batch, self.min_batch)

    def check(self) -> None:
        if (most := self.options.max_local_batch) < self.least:
            problem = f"is below the least, {self.least}"
            raise ConfigError("algorithm.max_local_batch", most, problem, f"set {self.least} or more")
        super().check()

    @cached_property
    def sizes(self) -> list[int]:
        """b, samples of a step by rank."""
        return [min(max(batch, self.least), self.options.max_local_batch) for batch in super().batches().values()]

    def batches(self) -> dict[int, int]:
        return dict(zip(self.ranks, self.sizes, strict=True))

    def replan(self, step_sec: Sequence[float], rounds: int | None = None) -> Plan:
        times, options = [step_sec[rank] for rank in self.ranks], self.options
        if any(math.isnan(sec) for sec in times):
            return self.plan
        wanted = controlled(self.sizes, times, options.deadband)
        sizes = [min(max(math.ceil(size - 1e-9), self.least), options.max_local_batch) for size in wanted]
        if sizes != self.sizes:
            self.sizes = sizes
            self.plan = self.make_plan(None)
        return self.plan

    def server_rule(self) -> Rule:
        return ProgressRule(len(self.ranks))

    def state_dict(self) -> dict[str, Any]:
        return {"sizes": self.sizes}

    def load_state_dict(self, state: Any) -> None:
        self.sizes = list(state["sizes"])
        self.plan = self.make_plan(None)
