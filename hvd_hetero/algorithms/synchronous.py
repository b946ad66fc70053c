"""The policy of the synchronous methods: a round is one step, which all training ranks take along one gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from hvd_hetero.algorithms.policy import Policy
from hvd_hetero.cluster.device_classes import Cluster, DeviceClass
from hvd_hetero.config.schema import AUTO, AggregationConfig, AlgorithmConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.plan import IDLE, Plan, lockstep_plan

ALL, FAST = "all", "fast"
FLAT_GRADIENTS = "hvd_hetero.algorithms.execution.flat_gradients.FlatGradientExecutor"
"""What executes methods that send gradients in one piece."""


@dataclass(frozen=True)
class LockstepOptions(AlgorithmConfig):
    """Options of the synchronous methods.

    Attributes:
        participants: which ranks train: ``all``, the ``fast`` class, or a class by its name.
    """

    participants: str = ALL


class Lockstep(Policy):
    """Give each training rank one step a round, and its gradient a weight in proportion to its batch.

    Attributes:
        others: role of the ranks that do not train.
    """

    Options: ClassVar[type[AlgorithmConfig]] = LockstepOptions
    others: ClassVar[str] = IDLE
    unused: ClassVar[Mapping[str, Any]] = {key: getattr(AggregationConfig(weights="uniform"), key) for key in (
        "weights", "optimizer_state", "outer_lr", "outer_momentum", "outer_nesterov", "delayed", "delay_steps",
        "own_weight", "mode", "quorum", "anneal_from")}  # fmt: skip

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that train."""
        chosen = choose(self.cluster, self.options.participants if isinstance(self.options, LockstepOptions) else ALL)
        return tuple(sorted(rank for c in chosen for rank in c.ranks))

    def check(self) -> None:
        for key, neutral in self.unused.items():
            if (value := getattr(self.aggregation, key)) != neutral:
                raise ConfigError(f"aggregation.{key}", value, *self.why_unused(key, neutral))
        super().check()

    def why_unused(self, key: str, neutral: Any) -> tuple[str, str]:
        """Return why a key of ``aggregation`` means nothing to the method, and the remedy."""
        name = self.options.name
        problem, remedy = f"{name} averages gradients, not models", f"leave it at {neutral}, or take a local-SGD method"
        if key == "wire":
            return f"{name} sends gradients as they are", f"set {neutral}, or sync_sgd"
        if key in ("mode", "quorum") and self.claims_samples:
            return "models are not averaged here, gradients are", f"set algorithm.{key}"
        if key == "mode":
            return f"{name} goes in lockstep", f"{remedy}, or algorithm.name=eager_sgd"
        return problem, remedy

    def batches(self) -> dict[int, int]:
        """Return the samples of one step, by training rank."""
        return {rank: self.batch_size[self.cluster.class_of(rank).name] for rank in self.ranks}

    def make_plan(self, step_sec: Mapping[str, float] | None) -> Plan:
        tau = self.train.tau
        length = self.train.epoch_length
        if tau == AUTO and length == "fast_steps":
            problem = f"{self.options.name} measures no tau, which that many steps of an epoch are counted by"
            raise ConfigError("train.tau", tau, problem, "give a number, or set train.epoch_length=dataset")
        steps = 1 if tau == AUTO else max(tau.values()) if isinstance(tau, Mapping) else tau
        return lockstep_plan(
            self.cluster, self.samples, self.batches(), others=self.others, epoch_length=length, tau=steps)  # fmt: skip


def choose(cluster: Cluster, participants: str) -> tuple[DeviceClass, ...]:
    """Choose the classes that train.

    ``fast``, where no class is called that, is told from what is known without measuring: GPUs before CPUs, then the
    class that is slowed down the least.

    Raises:
        ConfigError: there is no such class, or nothing says which one is the fastest.
    """
    key, names = "algorithm.participants", [c.name for c in cluster.classes]
    if participants == ALL:
        return cluster.classes
    if participants in names:
        return (cluster.classes[names.index(participants)],)
    if participants != FAST:
        raise ConfigError(key, participants, "names no device class", f"give all, fast or one of {', '.join(names)}")
    order = [(c.device != "cuda", c.slowdown) for c in cluster.classes]
    first = [c for c, place in zip(cluster.classes, order, strict=True) if place == min(order)]
    if len(first) > 1:
        problem = f"the classes {', '.join(c.name for c in first)} may be equally fast"
        raise ConfigError(key, participants, problem, f"name one, {key}={first[0].name}")
    return (first[0],)
