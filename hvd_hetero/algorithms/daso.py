"""DASO: hosts average among themselves now and then, and take it in late (Coquelin, Debus, Götz, von der Lehr, Kahn,
Siggel and Streit, "Accelerating neural network training with the distributed asynchronous and selective optimization
(DASO) method", Journal of Big Data 2022).

N hosts of L ranks each. Within a host gradients are averaged, step by step; group j, the j-th rank of every host,
averages the hosts' models, one group after another. With gs batches between two such averages, ls batches between
two averages of gradients, btw batches that the hosts work on while models travel; b counts an epoch's batches::

    every ls-th batch and the last one: g = mean of the host's gradients;  x = x - lr * g     # else with g of its own
    gs = 0 or b the last one:  x = mean of the group's x, for all ranks of the host
    b mod gs = 0:              s = x of this group's rank begins to travel
    btw batches later:         x = (W x + sum of the group's s) / (W + N),  W = 2 btw, for all ranks of the host
    after each epoch, of ``warmup_epochs`` first ones and ``cooldown_epochs`` last ones:
        warm-up, cool-down: gs = 0, ls = 1;  after the warm-up: gs = 4, ls = btw = 1
        the loss is stuck:  gs, ls = gs / 2, ls / 2, btw - 1, not below 1;  from gs = 1: gs = G, ls = btw = G / 4

``algorithm.max_global_skips`` is G. The loss is stuck when in ``patience`` + 1 epochs it has not fallen below
(1 - ``stability_level``) of the best one. Four things differ from the authors' program: with gs = 1 it never takes in
what travels, here it does in the next batch; where ls > 1 it takes one rank's model and loses what the host's others
did since, here the host's models are averaged before they travel and before what has travelled is taken in; W goes by
the batches that were worked on meanwhile, fewer at the end of an epoch; where all ranks meet to save, the rule for an
epoch's last batch holds. Running statistics travel with the model. Models travel as they are, through the host's
memory.

``algorithm.group_size`` is L, of ranks that follow one another; null: those of a host, or, on one host, 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Optional, final

from hvd_hetero.algorithms.grouped import Grouped
from hvd_hetero.config.schema import AlgorithmConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.groups import Partition, across, check_divides, consecutive
from hvd_hetero.planning.plan import Plan

FIRST_SKIPS = 4
"""gs after the warm-up, or G, where that is less."""


@dataclass(frozen=True)
class DASOOptions(AlgorithmConfig):
    """Options of DASO.

    Attributes:
        group_size: L; None: the ranks of a host.
        max_global_skips: G, the most batches between two averages of the hosts.
        warmup_epochs: first epochs with a blocking average after every batch, and ``cooldown_epochs`` last ones.
        stability_level: share by which the loss has to fall; ``patience``: epochs in which it may not.
    """

    group_size: Optional[int] = field(default=None, metadata={"at_least": 1})  # noqa: UP045
    max_global_skips: int = field(default=8, metadata={"at_least": 1})
    warmup_epochs: int = field(default=4, metadata={"at_least": 0})
    cooldown_epochs: int = field(default=4, metadata={"at_least": 0})
    stability_level: float = field(default=0.05, metadata={"at_least": 0, "at_most": 1})
    patience: int = field(default=2, metadata={"at_least": 0})


@dataclass(frozen=True)
class Cadence:
    """How often ranks meet.

    Attributes:
        skips: gs, batches between two averages of the hosts; 0: after each, and they are waited for.
        local_skips: ls, batches between two averages of the host's gradients.
        wait: btw, batches that are worked on while models travel.
    """

    skips: int
    local_skips: int = 1
    wait: int = 0

    def next(self, most: int) -> Cadence:
        """Return what follows when the loss is stuck."""
        if self.skips > 1:
            return Cadence(self.skips // 2, max(1, self.local_skips // 2), max(1, self.wait - 1))
        return Cadence(most, max(1, most // 4), max(1, most // 4))

    def averages_gradients(self, batch: int, last: int) -> bool:
        """Tell whether the host's gradients are averaged in this batch of an epoch."""
        return batch == last or (batch + 1) % self.local_skips == 0

    def delay(self, batch: int, last: int) -> int | None:
        """Return in how many batches what is sent after this batch is taken in; 0: at once; None: nothing is sent."""
        if batch < last and self.skips and batch % self.skips:
            return None
        return min(self.wait, last - batch)


BLOCKING = Cadence(0)


@final
class DASO(Grouped):
    """Let hosts run apart, for a number of batches that follows the loss.

    Attributes:
        cadence: of the epoch that is worked on.
        loss: mean of the last epoch over all ranks; None: it falls, as far as anybody knows.
    """

    options: DASOOptions
    executor: ClassVar[str] = "hvd_hetero.algorithms.execution.daso.DASOExecutor"
    Options: ClassVar[type[AlgorithmConfig]] = DASOOptions
    loss: float | None = None
    _epochs, _stuck, _best = 0, 0, float("inf")

    @cached_property
    def group_size(self) -> int:
        """L."""
        if self.options.group_size is not None:
            return self.options.group_size
        return max(self._on_hosts.values()) if len(self._on_hosts) > 1 else 1

    @property
    def _on_hosts(self) -> Counter[str]:
        """Ranks of each host, helpers left out."""
        return Counter(fact.host for fact in self.cluster.facts[: self.cluster.size])

    @property
    def hosts(self) -> int:
        """N."""
        return self.cluster.size // self.group_size

    @property
    def group_value(self) -> object:
        return self.group_size

    def check_groups(self) -> None:
        size, facts = self.group_size, self.cluster.facts
        if self.options.group_size is None and len(set(self._on_hosts.values())) > 1:
            problem = "the hosts have different numbers of ranks"
            raise ConfigError(self.group_key, None, problem, "start as many on each, or set a number that divides all")
        check_divides(self.group_key, size, self.cluster.size)
        if size == self.cluster.size:
            problem = "makes one group of all ranks, which has no other one to average with"
            raise ConfigError(self.group_key, size, problem, "set less, or choose sync_sgd")
        for group in self.local_groups:
            if len({facts[rank].host for rank in group}) > 1:
                problem = f"ranks {', '.join(map(str, group))} are not on one host"
                raise ConfigError(self.group_key, size, problem, "set a divisor of the ranks of each host")
        if self.train.epochs is None and self.options.cooldown_epochs:
            problem = "nobody knows which epochs are the last ones: train.epochs is null"
            raise ConfigError("algorithm.cooldown_epochs", self.options.cooldown_epochs, problem, "set it to 0")

    @cached_property
    def local_groups(self) -> Partition:
        """The ranks of each host."""
        return consecutive(self.cluster.size, self.group_size)

    @cached_property
    def global_groups(self) -> Partition:
        """The ranks that have the same place on every host."""
        return across(self.cluster.size, self.group_size)

    @property
    def partitions(self) -> Sequence[Partition]:
        return self.local_groups, self.global_groups

    @property
    def cadence(self) -> Cadence:
        total, options = self.train.epochs, self.options
        is_last = total is not None and self._epochs >= total - options.cooldown_epochs
        return BLOCKING if is_last or self._epochs < options.warmup_epochs else self._apart

    @property
    def rhythm(self) -> Cadence:
        return self.cadence

    def start(self, plan: Plan) -> None:
        super().start(plan)
        self._apart = Cadence(min(FIRST_SKIPS, self.options.max_global_skips), 1, 1)

    def replan(self, step_sec: Sequence[float], rounds: int | None = None) -> Plan:
        """Take the end of an epoch into account, and its :attr:`loss`."""
        self._epochs += 1
        if self._epochs > self.options.warmup_epochs and self.cadence is not BLOCKING and self.loss is not None:
            if self.loss < self._best * (1 - self.options.stability_level):
                self._best, self._stuck = self.loss, 0
            else:
                self._stuck += 1
            if self._stuck > self.options.patience:
                self._stuck, self._apart = 0, self._apart.next(self.options.max_global_skips)
        return self.plan

    def state_dict(self) -> dict[str, Any]:
        apart = (self._apart.skips, self._apart.local_skips, self._apart.wait)
        return {"epochs": self._epochs, "stuck": self._stuck, "best": self._best, "cadence": apart}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epochs, self._stuck, self._best = state["epochs"], state["stuck"], state["best"]
        self._apart = Cadence(*state["cadence"])
