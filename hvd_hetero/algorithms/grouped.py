"""The policy of methods whose ranks average their models in groups: a round is one step of every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from hvd_hetero.algorithms.policy import FLOAT32
from hvd_hetero.algorithms.synchronous import Lockstep
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.groups import Group, Partition, check_number, sets_of
from hvd_hetero.planning.plan import Plan


class Grouped(Lockstep):
    """Give each rank one step a round, and the same weight in its groups.

    Attributes:
        group_key: what the size of the groups follows from.
    """

    unused: ClassVar[Mapping[str, Any]] = {**Lockstep.unused, "wire": FLOAT32}
    group_key: ClassVar[str] = "algorithm.group_size"

    def check(self) -> None:
        if self.cluster.size == 1:
            remedy = "start more ranks, or choose sync_sgd"
            raise ConfigError("algorithm.name", self.options.name, "one rank has nobody to average with", remedy)
        self.check_groups()
        check_number(self.group_key, self.group_value, self.process_sets)
        super().check()

    def why_unused(self, key: str, neutral: Any) -> tuple[str, str]:
        problem = f"{self.options.name} averages models in groups, by rules of its own"
        return problem, f"leave it at {neutral}, or take a local-SGD method"

    def check_groups(self) -> None:
        """Refuse groups that cannot be made of these ranks."""

    @property
    def group_value(self) -> object:
        """What :attr:`group_key` is, or comes to."""
        raise NotImplementedError(type(self).__name__)

    @property
    def partitions(self) -> Sequence[Partition]:
        """Groups of all ranks, by phase."""
        raise NotImplementedError(type(self).__name__)

    @property
    def process_sets(self) -> tuple[Group, ...]:
        return sets_of(self.partitions, self.cluster.size)

    @property
    def needs_quiesce(self) -> bool:
        return True

    def make_plan(self, step_sec: Mapping[str, float] | None) -> Plan:
        plan = super().make_plan(step_sec)
        return replace(plan, classes=tuple(replace(c, weight=1 / self.cluster.size) for c in plan.classes))
