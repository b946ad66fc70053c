"""Policies: who takes how many steps on which samples in a round, by each method. No torch, no Horovod."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from hvd_hetero.algorithms.server_rule import Rule
from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.comm.paths import paths_of
from hvd_hetero.config.load import per_class
from hvd_hetero.config.schema import AUTO, AlgorithmConfig, Config
from hvd_hetero.errors import ConfigError, nearest
from hvd_hetero.planning.groups import Group
from hvd_hetero.planning.plan import Plan
from hvd_hetero.planning.quorum import Quorum

SOLO, MAJORITY = "solo", "majority"
FLOAT32, INT8 = "float32", "int8"
WIRE_BYTES = {FLOAT32: 4, "float16": 2, INT8: 1}
MOST_INT8 = 127
"""Ranks: of the numbers from -127 to 127 that a sum may come to, each has its share."""


class Policy:
    """Decide what every rank does in a round, from settings and step times alone.

    First comes :meth:`check`, then :meth:`make_plan`; :meth:`start` follows a plan, and :meth:`replan` makes the next
    epoch's. All ranks do so with the same figures, and so agree. The ranks' work itself is the executor's.

    Args:
        samples: n, size of the training set.
        min_batch: samples that the model needs in a step.

    Attributes:
        executor: import path of the executor, a subclass of :class:`hvd_hetero.algorithms.execution.base.Executor`.
        Options: the keys under ``algorithm`` in the configuration.
        defaults: what the method means by ``sampling.scheme`` and ``aggregation.weights`` where they are not set.
        modes: what ``algorithm.mode`` may be, where the method has variants.
        claims_samples: whether ranks get the samples of an epoch bit by bit, so that no class has a part of its own.
        drops_late: whether what comes too late for its round is dropped; else it goes with the next one.
        flat_gradients: whether gradients are views into flat vectors, and sparse ones are added up in there.
        sends_at_once: whether each gradient is sent as soon as the backward pass has made it, dense and in one piece.
        pushes_gradients: whether ranks give nothing but gradients to a server, which holds the model.
        follows_rate: whether the plan depends on the learning rate, which :meth:`follow_rate` tells.
        unused: keys of ``aggregation`` that mean nothing to the method, and the values that they are left at;
            ``unused_train``, of ``train``.
        needs_fixed_losses: whether a sample's loss may depend on nothing but the model and chance, as with BatchNorm.
        gradients_of_step: that a local step computes, and ``collectives_of_round``, as large as the model.
        batch_varies: whether a rank's batch may become smaller than it is set to be.
        micro_batches: by class, parts that a batch is cut into; 0: as few as fit in memory.
        average_sec: of one average that nobody is late for; to be set before :meth:`make_plan` where
            :attr:`needs_average_sec`, the same on all ranks.
        fraction_done: of the run, in this round; set where weights go by it (``aggregation.anneal_from``).
        plan: the one followed now, from :meth:`start` on.
        reason: why :meth:`replan` last changed it, for a person to read.
    """

    executor: ClassVar[str]
    Options: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig
    defaults: ClassVar[Mapping[str, str]] = {"sampling.scheme": "uniform", "aggregation.weights": "uniform"}
    modes: ClassVar[Sequence[str]] = ()
    claims_samples: ClassVar[bool] = False
    drops_late: ClassVar[bool] = False
    flat_gradients: ClassVar[bool] = False
    sends_at_once: ClassVar[bool] = False
    batch_varies: ClassVar[bool] = False
    pushes_gradients: ClassVar[bool] = False
    follows_rate: ClassVar[bool] = False
    unused: ClassVar[Mapping[str, Any]] = {}
    unused_train: ClassVar[Mapping[str, Any]] = {}
    needs_fixed_losses: ClassVar[bool] = False
    gradients_of_step: ClassVar[int] = 1
    collectives_of_round: ClassVar[int] = 1
    reason: str = ""
    average_sec: float = 0.0
    fraction_done: float = 0.0

    @classmethod
    def defaults_for(cls, settings: Mapping[str, Any]) -> Mapping[str, str]:
        """Return what the method means by settings left null, beside these, which are not checked yet."""
        return cls.defaults

    def __init__(self, config: Config, cluster: Cluster, samples: int, min_batch: int = 1) -> None:
        self.options, self.train, self.aggregation = config.algorithm, config.train, config.aggregation
        self.cluster, self.samples, self.min_batch = cluster, samples, min_batch
        self.seed, self.too_slow = config.run.seed, config.cluster.too_slow
        names = [c.name for c in cluster.classes]
        self.batch_size = per_class("train.batch_size", self.train.batch_size, names)
        self.micro_batches = per_class("train.micro_batches", self.train.micro_batches, names, word=AUTO)

    @property
    def executor_path(self) -> str:
        """Import path of what executes the method with these settings."""
        return self.executor

    @property
    def needs_speeds(self) -> bool:
        """Whether the plan depends on measured step times."""
        return False

    @property
    def needs_average_sec(self) -> bool:
        """Whether the plan depends on how long an average takes."""
        return False

    def few_rounds(self, plan: Plan) -> str | None:
        """Tell that the epoch alone has ended the choice of longer rounds, and what to set; None: it has not."""
        return None

    @property
    def derives_tau(self) -> bool:
        """Whether local steps, and so an epoch's rounds, follow from measured step times."""
        return self.needs_speeds

    def check(self) -> None:
        """Refuse settings that are wrong at any speed.

        Raises:
            ConfigError: there can be no plan, or a setting means nothing to this method.
        """
        mode, name = self.options.mode, self.options.name
        if mode is not None and mode not in self.modes:
            remedy = nearest(mode, self.modes) if self.modes else "leave it null"
            raise ConfigError("algorithm.mode", mode, f"is no variant of {name}", remedy)
        for part, count in self.micro_batches.items():
            if (size := self.batch_size[part]) < count * self.min_batch > self.min_batch:
                problem = f"a batch of class {part} has {size} samples, and a micro-batch {self.min_batch} at least"
                remedy = f"set {max(1, size // self.min_batch)} or less"
                raise ConfigError("train.micro_batches", self.train.micro_batches, problem, remedy)
        if self.aggregation.wire == INT8 and self.cluster.size > MOST_INT8:
            problem = f"{self.cluster.size} ranks share the numbers up to {MOST_INT8}, which leaves none to some"
            raise ConfigError("aggregation.wire", INT8, problem, "set float16")
        paths_of(self.aggregation, self.cluster)
        if not self.needs_speeds:
            self.make_plan(None)

    @property
    def has_blocking_average(self) -> bool:
        """Whether all ranks meet to average their models, on either path."""
        return False

    @property
    def process_sets(self) -> tuple[Group, ...]:
        """Ranks that meet among themselves, beside the classes: known before the job starts."""
        return ()

    def partial_mode(self, step_sec: Mapping[str, float]) -> str | None:
        """Return how partial collectives are started at these speeds; None if each waits for all ranks."""
        return None

    def quorum(self) -> Quorum | None:
        """Return what a round waits for, by the plan that is followed; None in all modes but that one."""
        return None

    def server_rule(self) -> Rule | None:
        """Return what a server does with what ranks push to it; None for the methods without one."""
        return None

    @property
    def steps_of_push(self) -> int | None:
        """Local steps that go into one push to a server; None: those of a round."""
        return None

    @property
    def micro_batch_count(self) -> int:
        """Parts of a batch that are contributed to partial sums one by one."""
        return 1

    @property
    def sync_every(self) -> int:
        """Every so many partial rounds all ranks are waited for."""
        return self.aggregation.sync_every

    def is_blocking(self, step_sec: Mapping[str, float]) -> bool:
        """Tell whether a round waits for the slowest class, at these speeds."""
        return self.partial_mode(step_sec) is None

    @property
    def needs_quiesce(self) -> bool:
        """Whether ranks run apart in an epoch, so that they must come to rest before all of them meet."""
        return self.claims_samples

    @property
    def follows_plan(self) -> bool:
        """Whether each rank takes the steps of the plan, no more and no less."""
        return not self.claims_samples

    def make_plan(self, step_sec: Mapping[str, float] | None) -> Plan:
        """Plan what every class does in a round; the same on every rank, from the same measured times.

        Args:
            step_sec: seconds of one local step, by class, where :attr:`needs_speeds`.
        """
        raise NotImplementedError(type(self).__name__)

    def start(self, plan: Plan) -> None:
        """Follow the first plan of a job."""
        self.plan = plan

    @property
    def rebalances(self) -> bool:
        """Whether :meth:`replan` may come within an epoch too, from :meth:`start` on; batches stay as large then."""
        return False

    def follow_rate(self, rate: float) -> None:
        """Learn the learning rate of the epoch that is about to be planned."""

    def replan(self, step_sec: Sequence[float], rounds: int | None = None) -> Plan:
        """Plan the next epoch, or the rest of this one where it :attr:`rebalances`, and follow that plan.

        Args:
            step_sec: what a local step took lately, waiting excluded, by rank; NaN where there was none.
            rounds: in which it did; None: in the last epoch.
        """
        return self.plan

    def note_average(self, seconds: float) -> None:
        """Take note of what an average took in the last epoch; the same on all ranks."""

    @property
    def rhythm(self) -> Any:
        """What else than the plan decides what ranks do in a round, and may change where an epoch ends."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what the policy carries from epoch to epoch, beside its plan."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what :meth:`state_dict` gave; comes after :meth:`start`."""
        assert not state
