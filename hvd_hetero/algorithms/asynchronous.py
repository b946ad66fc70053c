"""The policies of the asynchronous methods: every rank pushes to a server on rank 0 when it is ready, and goes on.

No rank waits for another one within an epoch. What becomes of a push is the method's rule
(:mod:`hvd_hetero.algorithms.server_rule`). Running statistics of BatchNorm are each rank's own during an epoch and are
averaged at its end. A push that holds NaN or Inf is not made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from hvd_hetero.algorithms.local_sgd import LocalSGD
from hvd_hetero.algorithms.policy import Policy
from hvd_hetero.algorithms.server_rule import Rule
from hvd_hetero.algorithms.synchronous import Lockstep
from hvd_hetero.config.schema import AggregationConfig, AlgorithmConfig
from hvd_hetero.errors import ConfigError

EXECUTOR = "hvd_hetero.algorithms.execution.server.ServerExecutor"
WAITING = ("mode", "quorum", "sync_every", "max_lag", "patience_sec", "delayed", "delay_steps", "own_weight",
           "optimizer_state", "wire", "anneal_from")  # fmt: skip
OUTER = ("outer_lr", "outer_momentum", "outer_nesterov")


def neutral(*keys: str) -> dict[str, Any]:
    """Return keys of ``aggregation`` with the values at which they say nothing."""
    return {key: getattr(AggregationConfig(weights="uniform"), key) for key in keys}


def check_server(policy: Policy) -> None:
    """Refuse what means nothing where ranks push to a server.

    Raises:
        ConfigError: naming the key.
    """
    name = policy.options.name
    if policy.cluster.size == 1:
        remedy = "start more ranks, or choose sync_sgd"
        raise ConfigError("algorithm.name", name, "one rank has nobody to run ahead of", remedy)
    for key, value in policy.unused.items():
        if (found := getattr(policy.aggregation, key)) != value:
            problem = f"{name} has a server, to which ranks push when they are ready"
            raise ConfigError(f"aggregation.{key}", found, problem, f"leave it at {value}, or take another method")
    if policy.train.max_fast_steps is not None:
        problem = f"{name} does not know beforehand who takes how many steps"
        remedy = "set train.max_samples or train.max_train_sec"
        raise ConfigError("train.max_fast_steps", policy.train.max_fast_steps, problem, remedy)


class ServerPolicy(Policy):
    """Have a server, to which each rank pushes the gradient of each of its batches."""

    executor: ClassVar[str] = EXECUTOR
    flat_gradients: ClassVar[bool] = True
    pushes_gradients: ClassVar[bool] = True
    unused: ClassVar[Mapping[str, Any]] = neutral("weights", *WAITING, *OUTER)

    def server_rule(self) -> Rule:
        raise NotImplementedError(type(self).__name__)

    def check(self) -> None:
        check_server(self)
        super().check()

    def is_blocking(self, step_sec: Mapping[str, float]) -> bool:
        return False


class Asynchronous(ServerPolicy, Lockstep):
    """Let ranks claim the samples of an epoch, and push a gradient for each batch.

    Without ``pushes_gradients`` it is the progress of a local step.
    """

    Options: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig
    claims_samples: ClassVar[bool] = True


class AsynchronousLocal(ServerPolicy, LocalSGD):
    """Let each class have samples of its own, as many as its speed asks for; an epoch ends with the first that is done.

    By class, or by rank where the rule needs every rank.

    What is pushed is the gradient of each local step, or without ``pushes_gradients`` the progress of tau of them.
    """

    @property
    def steps_of_push(self) -> int | None:
        return 1 if self.pushes_gradients else None

    @property
    def has_blocking_average(self) -> bool:
        return False

    @property
    def needs_quiesce(self) -> bool:
        return True

    @property
    def follows_plan(self) -> bool:
        return False

    def partial_mode(self, step_sec: Mapping[str, float]) -> None:
        return None
