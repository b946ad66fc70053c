"""What the synchronous methods share: a round is one step, which all training ranks take along the same gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from hvd_hetero.algorithms.base import Algorithm
from hvd_hetero.cluster.device_classes import Cluster, DeviceClass
from hvd_hetero.comm.averaging import average_buffers, average_unlike_parameters
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.nonfinite import finite
from hvd_hetero.config.schema import AggregationConfig, AlgorithmConfig
from hvd_hetero.errors import ConfigError, NonFiniteError
from hvd_hetero.planning.plan import IDLE, Plan, lockstep_plan
from hvd_hetero.worker.epoch import Segment
from hvd_hetero.worker.worker import Worker

ALL, FAST = "all", "fast"


@dataclass(frozen=True)
class LockstepOptions(AlgorithmConfig):
    """Options of the synchronous methods.

    Attributes:
        participants: which ranks train: ``all``, the ``fast`` class, or a class by its name.
    """

    participants: str = ALL


class Lockstep(Algorithm):
    """Replicas that never differ in their parameters, because each step goes along the gradient of the joined batch.

    Running statistics of BatchNorm are each rank's own during an epoch, as in data-parallel training everywhere, and
    are averaged over the training ranks at its end, with the gradients' weights. A rank whose gradient has gone bad is
    left out of the step, which goes along the joined gradient of the others.

    Attributes:
        others: what the other ranks are meanwhile.
    """

    Options: ClassVar[type[AlgorithmConfig]] = LockstepOptions
    others: ClassVar[str] = IDLE

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Those that train."""
        chosen = choose(self.cluster, self.options.participants if isinstance(self.options, LockstepOptions) else ALL)
        return tuple(sorted(rank for c in chosen for rank in c.ranks))

    def check(self) -> None:
        plain = AggregationConfig(weights="uniform")
        for key in ("weights", "optimizer_state", "outer_lr", "outer_momentum", "outer_nesterov", "delayed", "mode"):
            value, neutral = getattr(self.aggregation, key), getattr(plain, key)
            if value != neutral:
                problem = f"{self.options.name} averages gradients, not models"
                remedy = f"leave it at {neutral}, or take a local-SGD method"
                if key == "mode" and self.claims_samples:
                    problem, remedy = "models are not averaged here, gradients are", "set algorithm.mode"
                elif key == "mode":
                    problem, remedy = f"{self.options.name} goes in lockstep", f"{remedy}, or algorithm.name=eager_sgd"
                raise ConfigError(f"aggregation.{key}", value, problem, remedy)
        super().check()

    def batches(self) -> dict[int, int]:
        """Samples of one step, by training rank."""
        return {rank: self.batch_size[self.cluster.class_of(rank).name] for rank in self.ranks}

    def make_plan(self, step_sec: Mapping[str, float] | None) -> Plan:
        tau = self.train.tau
        steps = max(tau.values()) if isinstance(tau, Mapping) else tau
        return lockstep_plan(
            self.cluster, self.samples, self.batches(), others=self.others,
            epoch_length=self.train.epoch_length, tau=steps,
        )

    def run_segment(self, segment: Segment, worker: Worker, comm: Comm) -> None:
        super().run_segment(segment, worker, comm)
        worker.state.refresh()
        if self.mine.tau and not finite(worker.state.parameters()):  # a step itself may have gone too far
            raise NonFiniteError(comm.excluded.round, self.ranks, everybody=True)

    def keep_buffers(self, worker: Worker) -> None:
        """Remembers running statistics, before a step."""
        self._kept = [buffers.clone() for buffers in worker.state.buffers()]

    def put_buffers_back(self, worker: Worker) -> None:
        worker.state.refresh()
        for buffers, kept in zip(worker.state.buffers(), self._kept, strict=True):
            buffers.copy_(kept)

    def leave_out(self, worker: Worker, comm: Comm) -> None:
        """Notes that this rank's gradient was left out, and undoes what its batch has made of running statistics."""
        self.put_buffers_back(worker)
        comm.excluded.note()

    def end_epoch(self, worker: Worker, comm: Comm) -> None:
        worker.rest()
        if comm.rank in self.ranks:
            average_buffers(comm, worker.state, self.mine.weight, self.ranks)
            average_unlike_parameters(comm, worker.state, self.mine.weight, self.ranks)
        if 0 not in self.ranks:
            comm.broadcast_state(worker.state, self.ranks[0])


def choose(cluster: Cluster, participants: str) -> tuple[DeviceClass, ...]:
    """The classes that train.

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
