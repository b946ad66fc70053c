"""DecentLaM: decentralised momentum SGD whose bias does not grow with the momentum (Yuan, Chen, Huang, Zhang, Pan, Xu
and Yin, "DecentLaM: Decentralized Momentum SGD for Large-batch Deep Training", ICCV 2021).

Each rank averages with its neighbours only. On rank i, with weights w_ij of a symmetric, doubly stochastic matrix::

    m_i = 0
    for t = 0, 1, ...:
        y_i = x_i - lr * gradient of the next batch's mean loss at x_i     # weight decay included
        exchange y with the neighbours of step t
        g_i = (x_i - sum_j w_ij y_j) / lr                                  # the decentralised gradient
        m_i = beta m_i + g_i
        x_i = x_i - lr * m_i

With beta = 0 that is decentralised SGD, x_i = sum_j w_ij y_j. Momentum is in units of gradients: lr is that of the same
step, so that a schedule does no harm. The mean of all x_i follows momentum SGD along the mean gradient.

``algorithm.topology: one_peer_exponential``: in step t the neighbour is the rank whose number differs in bit t modulo
log2 n alone, w = 1/2, n a power of two. ``complete``: all ranks, w = 1/n; that is synchronous SGD with momentum.
null: the first, where n is a power of two, else the second.

Neighbours wait for each other in every step, so this is for ranks of one speed. An epoch ends with the mean of all
models, as in Gossip-PGA (Chen et al. 2021), since one model is evaluated and saved; momentum stays each rank's own.
Running statistics are averaged with y. A rank with non-finite values is left out of the exchange, and takes the mean
of its neighbours. The optimizer is torch's SGD, without Nesterov momentum and dampening.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Optional, final

from hvd_hetero.algorithms.grouped import Grouped
from hvd_hetero.config.schema import AlgorithmConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.groups import Partition, by_bits

ONE_PEER, COMPLETE = "one_peer_exponential", "complete"
UNFIT = ("nesterov", "dampening", "maximize")
"""Of torch's SGD, what makes another step of a gradient and its momentum."""


@dataclass(frozen=True)
class DecentLaMOptions(AlgorithmConfig):
    """Options of DecentLaM.

    Attributes:
        topology: who are neighbours.
    """

    topology: Optional[str] = field(default=None, metadata={"choices": (ONE_PEER, COMPLETE)})  # noqa: UP045


@final
class DecentLaM(Grouped):
    """Average with one neighbour after another, or with all."""

    options: DecentLaMOptions
    executor: ClassVar[str] = "hvd_hetero.algorithms.execution.decentlam.DecentLaMExecutor"
    Options: ClassVar[type[AlgorithmConfig]] = DecentLaMOptions
    group_key: ClassVar[str] = "algorithm.topology"

    @cached_property
    def topology(self) -> str:
        """The one that is set, or that fits."""
        is_power = self.cluster.size & (self.cluster.size - 1) == 0
        return self.options.topology or (ONE_PEER if is_power else COMPLETE)

    @property
    def group_value(self) -> object:
        return self.topology

    def check(self) -> None:
        name, args = self.train.optimizer, self.train.optimizer_args
        if name.removeprefix("torch.optim.") != "SGD":
            problem = "decentlam has momentum of its own, which is that of SGD"
            raise ConfigError("train.optimizer", name, problem, "set SGD, or take sync_sgd")
        for key in UNFIT:
            if args.get(key):
                problem = f"decentlam's momentum knows no {key}"
                raise ConfigError("train.optimizer_args", dict(args), problem, f"leave {key} out, or take sync_sgd")
        super().check()

    def check_groups(self) -> None:
        size = self.cluster.size
        if self.topology == ONE_PEER and size & (size - 1):
            low = 1 << (size.bit_length() - 1)
            problem = f"neighbours by bits of the ranks' numbers take a power of two of ranks, and there are {size}"
            raise ConfigError(self.group_key, ONE_PEER, problem, f"start {low} or {2 * low} ranks, or set {COMPLETE}")

    @cached_property
    def partitions(self) -> Sequence[Partition]:
        size = self.cluster.size
        return by_bits(size, 2 if self.topology == ONE_PEER else size)
