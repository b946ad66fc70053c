"""What a training method is: a plan made from measured speeds, and what a rank does in a round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from hvd_hetero.cluster import Cluster
from hvd_hetero.comm.horovod import Comm
from hvd_hetero.config import AlgorithmConfig, TrainConfig, per_class
from hvd_hetero.data import Batch
from hvd_hetero.plan import Plan, check_least_round, derive_tau, make_plan
from hvd_hetero.worker import Worker


class Algorithm:
    """One rank's part in a method. A method is a file with a subclass, a registry line and a YAML file.

    Attributes:
        Options: the keys under ``algorithm`` in the configuration.
        defaults: what the method means by ``sampling.scheme`` and ``aggregation.weights`` where they are not set.
    """

    Options: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig
    defaults: ClassVar[Mapping[str, str]] = {"sampling.scheme": "uniform", "aggregation.weights": "uniform"}

    def __init__(self, options: AlgorithmConfig, plan: Plan, rank: int) -> None:
        self.options, self.plan, self.rank = options, plan, rank
        self.mine = plan.of_rank(rank)

    @classmethod
    def needs_speeds(cls, train: TrainConfig) -> bool:
        """Whether the plan depends on measured step times."""
        return False

    @classmethod
    def check(cls, cluster: Cluster, samples: int, train: TrainConfig, weights: str) -> None:
        """Finds what can be found wrong with the settings before any speed is measured.

        Raises:
            ConfigError: there can be no plan.
        """
        names = [c.name for c in cluster.classes]
        batch_size = per_class("train.batch_size", train.batch_size, names)
        if cls.needs_speeds(train):
            check_least_round(cluster, samples, train.tau, batch_size)
        else:
            cls.make_plan(cluster, samples, train, weights, None)

    @classmethod
    def make_plan(
        cls, cluster: Cluster, samples: int, train: TrainConfig, weights: str, step_sec: Mapping[str, float] | None
    ) -> Plan:
        """What every class does in a round; the same on every rank, from the same measured times."""
        raise NotImplementedError(cls.__name__)

    def run_round(self, worker: Worker, batches: Iterator[Batch], comm: Comm) -> None:
        """One round of this rank, all its collectives included."""
        raise NotImplementedError(type(self).__name__)

    def state_dict(self) -> dict[str, Any]:
        """What the method itself carries from round to round."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state


class LocalSGD(Algorithm):
    """tau_g local steps of every rank, then the weighted average of all models: what the local-SGD methods share."""

    @classmethod
    def needs_speeds(cls, train: TrainConfig) -> bool:
        return not isinstance(train.tau, Mapping)

    @classmethod
    def taus(cls, cluster: Cluster, train: TrainConfig, step_sec: Mapping[str, float] | None) -> dict[str, int]:
        """Local steps by class: as set, or derived from the fastest class's tau and the measured step times."""
        names = [c.name for c in cluster.classes]
        if isinstance(train.tau, Mapping):
            return per_class("train.tau", train.tau, names)
        assert step_sec is not None
        return derive_tau(train.tau, step_sec)

    @classmethod
    def make_plan(
        cls, cluster: Cluster, samples: int, train: TrainConfig, weights: str, step_sec: Mapping[str, float] | None
    ) -> Plan:
        names = [c.name for c in cluster.classes]
        return make_plan(
            cluster,
            samples,
            cls.taus(cluster, train, step_sec),
            per_class("train.batch_size", train.batch_size, names),
            weights=weights,
            epoch=train.epoch,
            step_sec=step_sec,
        )

    def run_round(self, worker: Worker, batches: Iterator[Batch], comm: Comm) -> None:
        worker.local_steps(batches, self.mine.tau)
        comm.average(worker.state, self.mine.weight)
        worker.watch.collective()
