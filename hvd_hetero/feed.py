"""Dealing a pass: rank 0 draws, one broadcast, each rank takes its slice; afterwards the losses go back to rank 0."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_hetero.comm.horovod import Comm
from hvd_hetero.plan import Plan
from hvd_hetero.sampling import Sampler, in_order

Dealt = dict[int, NDArray[Any]]


class Feed:
    """The indices that each rank trains on, pass by pass.

    Args:
        samples: n, size of the training set; it decides the index type, the same on all ranks.
        sampler: on rank 0, None elsewhere.
    """

    def __init__(self, comm: Comm, samples: int, sampler: Sampler | None) -> None:
        self._comm, self.sampler = comm, sampler
        self._dtype = torch.int32 if samples < 2**31 else torch.int64
        self._dealt: Dealt = {}

    def deal(self, plan: Plan) -> NDArray[Any]:
        """This rank's indices for one pass, ``[rounds * tau, B]``, a row a step."""
        sizes = self._sizes(plan)
        everything = torch.empty(sum(sizes), dtype=self._dtype)
        if self.sampler is not None:
            drawn = self.sampler.draw(plan.pass_samples())
            self._dealt = {}
            for c in plan.classes:
                ends = np.cumsum([sizes[rank] for rank in c.ranks])
                self._dealt |= dict(zip(c.ranks, np.split(drawn[c.name], ends[:-1]), strict=True))
            everything = torch.from_numpy(np.concatenate([self._dealt[rank] for rank in range(len(sizes))]))
        everything = self._comm.broadcast(everything, "pass.indices")
        mine = everything.split(sizes)[self._comm.rank].numpy()
        own = plan.of_rank(self._comm.rank)
        return mine.reshape(plan.rounds * own.tau, own.batch_size)

    def collect(self, plan: Plan, losses: Tensor) -> None:
        """Takes this rank's losses ``[rounds * tau * B]`` of the pass, in training order, into rank 0's table."""
        gathered = self._comm.gather(losses, "pass.losses", self._sizes(plan))
        if self.sampler is not None:
            tau = {rank: c.tau for rank, c in enumerate(plan.by_rank())}
            values = {rank: part.numpy() for rank, part in enumerate(gathered)}
            self.sampler.record(in_order(self._dealt, plan.rounds, tau), in_order(values, plan.rounds, tau))

    @staticmethod
    def _sizes(plan: Plan) -> list[int]:
        return [plan.rounds * c.tau * c.batch_size for c in plan.by_rank()]
