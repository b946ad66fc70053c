"""WAGMA-SGD: averages of models in changing groups, which nobody waits for (Li, Ben-Nun, Di Girolamo, Dryden, Alistarh
and Hoefler, "Breaking (Global) Barriers in Parallel Stochastic Optimization with Wait-Avoiding Group Averaging", 2020).

P ranks in groups of S, both powers of two. In iteration t a group is the ranks whose numbers differ only in the
log2 S bits from bit t log2 S on, modulo log2 P; so after log_S P iterations every model has reached every rank. On
each rank, with a send buffer s that begins with the model that all have::

    for t = 0, 1, ...:
        x' = x - lr * gradient of the next batch's mean loss at x      # a step of the configured optimizer
        s  = x';  say that this rank is there for iteration t, and wait for its sum T
        if it was there in time:  x = T / S
        else:                     x = (T + x') / (S + 1)               # its older model is in T
    in the background, when the first of all ranks is there for iteration t: T = sum of s over the group

In every tau-th iteration, tau = ``aggregation.sync_every``, all ranks are waited for, and x is the mean of all x'. So
nothing in a sum is older than tau iterations. Every rank takes all its steps, and the mean of the models is conserved
by each iteration in which nobody is late. An epoch ends with the mean of all models.

``algorithm.mode: code`` is what the authors' program does, which differs: s is the model before the step, x counts once
more whether it is in T or not, and the step follows the average, along the gradient at the old model::

        s = x;  W = (T + x) / (S + 1), every tau-th iteration the mean of all;  x = W - lr * gradient at x

The program's first sums hold zeros for ranks that have sent nothing yet; here they hold the model that all begin with.
Momentum is each rank's own. Running statistics are averaged with the model. A step to non-finite values is undone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Optional, final

from hvd_hetero.algorithms.grouped import Grouped
from hvd_hetero.algorithms.policy import SOLO
from hvd_hetero.config.schema import AlgorithmConfig
from hvd_hetero.planning.groups import Partition, by_bits, check_by_bits

PAPER, CODE = "paper", "code"


@dataclass(frozen=True)
class WAGMAOptions(AlgorithmConfig):
    """Options of WAGMA-SGD.

    Attributes:
        group_size: S; None: the power of two next to the root of the number of ranks, or all of them, where that is no
            power of two.
    """

    group_size: Optional[int] = field(default=None, metadata={"at_least": 2})  # noqa: UP045


@final
class WAGMASGD(Grouped):
    """Average models in groups, waiting for the first rank only."""

    options: WAGMAOptions
    executor: ClassVar[str] = "hvd_hetero.algorithms.execution.wagma_sgd.WAGMAExecutor"
    Options: ClassVar[type[AlgorithmConfig]] = WAGMAOptions
    modes: ClassVar[Sequence[str]] = (PAPER, CODE)
    unused: ClassVar[Mapping[str, Any]] = {**Grouped.unused, "max_lag": 32}

    @cached_property
    def group_size(self) -> int:
        """S."""
        if self.options.group_size is not None:
            return self.options.group_size
        size = self.cluster.size
        return size if size & (size - 1) else 1 << size.bit_length() // 2

    @property
    def group_value(self) -> object:
        return self.group_size

    def check_groups(self) -> None:
        check_by_bits(self.group_key, self.group_size, self.cluster.size)

    @cached_property
    def partitions(self) -> Sequence[Partition]:
        return by_bits(self.cluster.size, self.group_size)

    @property
    def steps_first(self) -> bool:
        """Whether a step is taken before the average, as the paper has it."""
        return self.options.mode != CODE

    def partial_mode(self, step_sec: Mapping[str, float]) -> str:
        return SOLO
