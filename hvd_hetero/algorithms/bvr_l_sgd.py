"""BVR-L-SGD: local steps along a gradient whose noise is taken out (Murata and Suzuki, "Bias-Variance Reduced Local SGD
for Less Heterogeneous Federated Learning", ICML 2021).

Each step needs two gradients on the same samples, at the model that it is made from and at the one before; their
difference corrects an estimate that all ranks began the round with. In a stage of T rounds, with K = ``train.tau``::

    first round:  v = mean over ranks of g_i(x)                               # g_i: on A batches of rank i
    other rounds: v = v + mean over ranks of (g_i(x) - g_i(x of the round before))
    rank i:       y = x;  u = v;  y' = y;  y = y - lr u
                  repeat K - 1 times, on the next batch:
                      u = u + gradient(y) - gradient(y')
                      y' = y;  y = y - lr u
    x = y of one rank, drawn anew for each round                              # sent to all, no average

One exchange of gradients and one model a round, and twice the computing of local SGD for its samples: a round of a
rank has A + K - 1 batches, ``tau`` of the plan, and K steps. ``algorithm.anchor_batches`` is A; null: K. A large one is
the paper's big batch. ``algorithm.stage_rounds`` is T. With all data in one batch and K = 1 it is gradient descent; one
rank alone is SARAH. It pays where ranks' data are alike and rounds are dear; all ranks take the same K, and wait.

Both gradients see the same augmented samples, and the same random numbers (dropout). Batch normalization is refused:
its statistics would be of two models. There is no momentum. A rank with non-finite values is not drawn. Corrections of
small batches add up noise for as long as a stage lasts: rates that plain SGD takes may be too high, and then shorter
stages or larger batches help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional, final

import numpy as np

from hvd_hetero.algorithms.asynchronous import OUTER, WAITING, neutral
from hvd_hetero.algorithms.balanced_local_sgd import BalancedLocalSGD
from hvd_hetero.config.schema import AlgorithmConfig
from hvd_hetero.errors import ConfigError

NO_MOMENTUM = {"optimizer": "SGD", "optimizer_args": {}}


@dataclass(frozen=True)
class BVROptions(AlgorithmConfig):
    """Options of BVR-L-SGD.

    Attributes:
        anchor_batches: A, of each rank, that a round's common estimate is made from; None: K.
        stage_rounds: T, after which it is made anew and not corrected.
    """

    anchor_batches: Optional[int] = field(default=None, metadata={"at_least": 1})  # noqa: UP045
    stage_rounds: int = field(default=16, metadata={"at_least": 1})


@final
class BVRLSGD(BalancedLocalSGD):
    """Give each rank K steps, and the batches of their gradients and of the common one."""

    executor: ClassVar[str] = "hvd_hetero.algorithms.execution.bvr_l_sgd.BVRLSGDExecutor"
    options: BVROptions
    Options: ClassVar[type[AlgorithmConfig]] = BVROptions
    needs_fixed_losses: ClassVar[bool] = True
    gradients_of_step: ClassVar[int] = 2
    collectives_of_round: ClassVar[int] = 2
    unused: ClassVar[Mapping[str, Any]] = neutral("weights", *WAITING, *OUTER)
    unused_train: ClassVar[Mapping[str, Any]] = NO_MOMENTUM

    def check(self) -> None:
        name = self.options.name
        for key, value in self.unused.items():
            if (found := getattr(self.aggregation, key)) != value:
                problem = f"{name} has the model of one rank after each round, and no average"
                raise ConfigError(f"aggregation.{key}", found, problem, f"leave it at {value}, or take another method")
        if self.train.optimizer != "SGD" or self.train.optimizer_args.get("momentum"):
            is_sgd = self.train.optimizer == "SGD"
            key = "train.optimizer_args.momentum" if is_sgd else "train.optimizer"
            found = self.train.optimizer_args["momentum"] if is_sgd else self.train.optimizer
            raise ConfigError(key, found, f"{name} takes plain steps of its own", "set SGD without momentum")
        super().check()

    def taus(self, step_sec: Mapping[str, float] | None) -> dict[str, int]:
        return {name: tau and (self.options.anchor_batches or tau) + tau - 1
                for name, tau in super().taus(step_sec).items()}  # fmt: skip

    def _longest(self, step_sec: Mapping[str, float]) -> int:
        longest, anchor = super()._longest(step_sec), self.options.anchor_batches  # of all batches of a round
        return max(1, (longest + 1) // 2 if anchor is None else longest + 1 - anchor)

    def anchor_of(self, tau: int) -> int:
        """Return A, of the batches of a round."""
        return self.options.anchor_batches or (tau + 1) // 2

    def drawn(self, number: int, ranks: list[int]) -> int:
        """Return the rank whose model the round's is; the same on all ranks."""
        return ranks[int(np.random.default_rng((self.seed, number)).integers(len(ranks)))]
