"""What a training method is: a plan made from measured speeds, and what a rank does in a round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from numpy.typing import NDArray

from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.paths import paths_of
from hvd_hetero.config.load import per_class
from hvd_hetero.config.schema import AggregationConfig, AlgorithmConfig, TrainConfig
from hvd_hetero.data import Batch
from hvd_hetero.errors import ConfigError, nearest
from hvd_hetero.planning.local_steps import ERROR
from hvd_hetero.planning.plan import Plan
from hvd_hetero.telemetry.staleness import Counts
from hvd_hetero.worker.epoch import Segment
from hvd_hetero.worker.index_feed import Feed
from hvd_hetero.worker.worker import Worker


class Algorithm:
    """One rank's part in a method. A method is a file with a subclass, a registry line and a YAML file.

    It is made from settings alone, so that planning needs no job: :meth:`check`, then :meth:`make_plan`. On the ranks
    follow :meth:`start`, then, epoch by epoch, :meth:`run_round` for every round, :meth:`end_epoch` and :meth:`replan`.

    Args:
        options: section ``algorithm`` of the configuration.
        train: section ``train``.
        aggregation: section ``aggregation``.
        samples: n, size of the training set.
        seed: of what the method draws at random, the same on all ranks.
        too_slow: ``cluster.too_slow``.
        min_batch: samples that the model needs in a step.

    Attributes:
        Options: the keys under ``algorithm`` in the configuration.
        defaults: what the method means by ``sampling.scheme`` and ``aggregation.weights`` where they are not set.
        modes: what ``algorithm.mode`` may be, where the method has variants.
        claims_samples: whether ranks get the samples of an epoch bit by bit, so that no class has a part of its own.
        flat_gradients: whether gradients are views into flat vectors, and sparse ones are added up in there.
        sends_at_once: whether each gradient is sent as soon as the backward pass has made it, dense and in one piece.
        batch_varies: whether a rank's batch may become smaller than it is set to be.
        plan: the one followed now, and ``mine``, this rank's part of it; both from :meth:`start` on.
        reason: why :meth:`replan` last changed it, for a person to read.
    """

    Options: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig
    defaults: ClassVar[Mapping[str, str]] = {"sampling.scheme": "uniform", "aggregation.weights": "uniform"}
    modes: ClassVar[Sequence[str]] = ()
    claims_samples: ClassVar[bool] = False
    flat_gradients: ClassVar[bool] = False
    sends_at_once: ClassVar[bool] = False
    batch_varies: ClassVar[bool] = False
    reason: str = ""

    def __init__(
        self,
        options: AlgorithmConfig,
        train: TrainConfig,
        aggregation: AggregationConfig,
        cluster: Cluster,
        samples: int,
        seed: int,
        too_slow: str = ERROR,
        min_batch: int = 1,
    ) -> None:
        self.options, self.train, self.aggregation = options, train, aggregation
        self.cluster, self.samples, self.seed, self.too_slow = cluster, samples, seed, too_slow
        self.min_batch = min_batch
        self.batch_size = per_class("train.batch_size", train.batch_size, [c.name for c in cluster.classes])

    @property
    def needs_speeds(self) -> bool:
        """Whether the plan depends on measured step times."""
        return False

    def check(self) -> None:
        """Finds what can be found wrong with the settings before any speed is measured.

        Raises:
            ConfigError: there can be no plan, or a setting means nothing to this method.
        """
        mode, name = self.options.mode, self.options.name
        if mode is not None and mode not in self.modes:
            remedy = nearest(mode, self.modes) if self.modes else "leave it null"
            raise ConfigError("algorithm.mode", mode, f"is no variant of {name}", remedy)
        paths_of(self.aggregation, self.cluster)
        if not self.needs_speeds:
            self.make_plan(None)

    @property
    def averages(self) -> bool:
        """Whether ranks meet to average their models, on either path."""
        return False

    def waits(self, step_sec: Mapping[str, float]) -> bool:
        """Whether a round waits for the slowest class, at these speeds."""
        return not self.claims_samples

    @property
    def needs_quiesce(self) -> bool:
        """Whether ranks are on their own in an epoch, so that meeting them all means to come to rest first."""
        return self.claims_samples

    @property
    def follows_plan(self) -> bool:
        """Whether each rank takes the steps of the plan, no more and no less."""
        return not self.claims_samples

    def make_plan(self, step_sec: Mapping[str, float] | None) -> Plan:
        """What every class does in a round; the same on every rank, from the same measured times.

        Args:
            step_sec: seconds of one local step, by class, where :attr:`needs_speeds`.
        """
        raise NotImplementedError(type(self).__name__)

    def start(self, plan: Plan, worker: Worker, comm: Comm) -> None:
        """Makes this rank ready for its first round."""
        self._rank = comm.rank
        self.follow(plan)

    def follow(self, plan: Plan) -> None:
        """Goes by this plan from now on."""
        self.plan, self.mine = plan, plan.of_rank(self._rank)

    def deal(self, feed: Feed, plan: Plan, whole: Plan) -> NDArray[Any]:
        """The samples of an epoch, as :class:`hvd_hetero.worker.epoch.Epoch` has them."""
        return feed.deal_whole(plan) if self.claims_samples else feed.deal(plan, whole)

    def run_segment(self, segment: Segment, worker: Worker, comm: Comm) -> None:
        """Go through the rounds of a segment, up to the last collective of the last one, and note each step."""
        batches = segment.batches()
        for number in range(segment.rounds):
            segment.start_round(number)
            self.run_round(worker, batches, comm)
            segment.note(self.mine.tau, number)
            segment.finish_round()
        segment.averages = segment.rounds

    def run_round(self, worker: Worker, batches: Iterator[Batch], comm: Comm) -> None:
        """One round of this rank, all its collectives included."""
        raise NotImplementedError(type(self).__name__)

    def end_epoch(self, worker: Worker, comm: Comm) -> None:
        """After the last round of an epoch; when it returns, rank 0 holds the model."""

    def replan(self, step_sec: Sequence[float]) -> Plan:
        """The plan of the next epoch; all ranks call it with the same figures, and so agree.

        Args:
            step_sec: what a local step took in the last epoch, waiting excluded, by rank; NaN where there was none.
        """
        return self.plan

    def counts(self) -> Counts | None:
        """What this rank sent in partial collectives since the last call, if the method has them."""
        return None

    def close(self) -> None:
        """Ends what the method runs in the background; called whatever has happened."""

    def state_dict(self) -> dict[str, Any]:
        """What the method itself carries from round to round."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state

    def carry_over(self, state: Mapping[str, Any]) -> None:
        """Takes what makes sense for other ranks too from what another job's :meth:`state_dict` gave."""
