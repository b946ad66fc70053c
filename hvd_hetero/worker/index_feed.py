"""Dealing an epoch: rank 0 draws, one broadcast, each rank takes its slice; afterwards the losses go back to rank 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_hetero.comm.communicator import Comm
from hvd_hetero.data import Batch
from hvd_hetero.errors import ConfigError, Plain
from hvd_hetero.planning.plan import Plan
from hvd_hetero.planning.sampling import Sampler, in_order, newest_last

Dealt = dict[int, NDArray[Any]]
EVERYBODY = "everybody"
"""Under this name an epoch is drawn that ranks are handed out bit by bit."""


@dataclass(frozen=True)
class Segment:
    """What a rank is given of one epoch: all of it, or a segment.

    Attributes:
        plan: with the rounds of this segment.
        rows: this rank's samples ``[rounds * tau, B]``, a row a step; ``[N]``, everybody's, where a method hands them
            out itself.
        read: gives the batches of some rows.
        begin_round: to be called before each round with its number in this segment, and ``end_round`` after it.
        stopping: whether this rank was asked to stop; a method that goes in lockstep need not ask.
    """

    plan: Plan
    rows: NDArray[Any]
    read: Callable[[NDArray[Any]], Iterator[Batch]]
    begin_round: Callable[[int], None]
    end_round: Callable[[], None]
    stopping: Callable[[], bool]


@dataclass(frozen=True)
class SegmentResult:
    """What a rank did in an epoch.

    Attributes:
        rounds: averages that were made, the same on all ranks.
        steps: of this rank.
        rows: ``[steps, B]``, the samples it trained on, where that was not fixed beforehand; and
        at: ``[steps]``, the round that it was in.
        used: how many of the samples that were handed out are used up, as far as this rank knows.
    """

    rounds: int
    steps: int
    rows: NDArray[Any] | None = None
    at: NDArray[Any] | None = None
    used: int = 0


class Feed:
    """The indices that each rank trains on, epoch by epoch.

    Args:
        samples: n, size of the training set; it decides the index type, the same on all ranks.
        sampler: on rank 0, None elsewhere.
    """

    def __init__(self, comm: Comm, samples: int, sampler: Sampler | None) -> None:
        self._comm, self.sampler = comm, sampler
        self._dtype = torch.int32 if samples < 2**31 else torch.int64
        self._dealt: Dealt = {}

    def state_dict(self) -> dict[str, Any]:
        """On rank 0: who was dealt what in the epoch that is under way."""
        return {"dealt": [self._dealt[rank] for rank in sorted(self._dealt)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._dealt = {rank: np.asarray(rows) for rank, rows in enumerate(state["dealt"])}

    def deal(self, plan: Plan, whole: Plan) -> NDArray[Any]:
        """This rank's indices for one epoch, ``[rounds * tau, B]``, a row a step.

        Args:
            whole: the plan of an epoch that is not cut short. Of one that is, the first rounds are dealt: drawn for
                itself, a short epoch would have the biased class train on nothing but the very hardest samples.
        """
        sizes = self._sizes(plan)
        everything = torch.empty(sum(sizes), dtype=self._dtype)
        if self.sampler is not None:
            drawn, counts = self.sampler.draw(whole.epoch_samples()), plan.epoch_samples()
            self._dealt = {}
            for c in plan.classes:
                ends = np.cumsum([sizes[rank] for rank in c.ranks])
                self._dealt |= dict(zip(c.ranks, np.split(drawn[c.name][: counts[c.name]], ends[:-1]), strict=True))
            everything = torch.from_numpy(np.concatenate([self._dealt[rank] for rank in range(len(sizes))]))
        everything = self._comm.broadcast(everything, "epoch.indices")
        if self.sampler is not None:
            self.sampler.begin(whole.epoch_samples())
        mine = everything.split(sizes)[self._comm.rank].numpy()
        own = plan.of_rank(self._comm.rank)
        return mine.reshape(plan.rounds * own.tau, own.batch_size)

    def deal_whole(self, plan: Plan) -> NDArray[Any]:
        """Everybody's indices for one epoch, ``[N]``, in random order."""
        whole = torch.empty(sum(plan.epoch_samples().values()), dtype=self._dtype)
        if self.sampler is not None:
            whole = torch.from_numpy(self.sampler.draw({EVERYBODY: len(whole)})[EVERYBODY])
        whole = self._comm.broadcast(whole, "epoch.indices")
        return whole.numpy()

    def collect_as_worked(self, worked: SegmentResult, losses: Tensor) -> None:
        """As :meth:`collect`, where each rank says itself what it trained on, and when.

        Args:
            losses: ``[steps * B]``, in training order; -inf for samples that do not count.
        """
        assert worked.rows is not None and worked.at is not None
        shape = torch.tensor([worked.steps, worked.rows.shape[1]])
        shapes = [row.tolist() for row in self._comm.gather(shape, "epoch.shapes")]
        sizes = [steps * batch for steps, batch in shapes]
        rows = torch.from_numpy(np.ascontiguousarray(worked.rows.reshape(-1))).to(self._dtype)
        indices = self._comm.gather(rows, "epoch.rows", sizes)
        check_number(len(losses), sizes[self._comm.rank])
        at = self._comm.gather(torch.from_numpy(worked.at), "epoch.at", [steps for steps, _ in shapes])
        gathered = self._comm.gather(losses, "epoch.losses", sizes)
        if self.sampler is not None:
            order = newest_last([a.numpy() for a in at], [batch for _, batch in shapes])
            self.sampler.record(torch.cat(indices).numpy()[order], torch.cat(gathered).numpy()[order])

    def collect(self, plan: Plan, losses: Tensor) -> None:
        """Takes this rank's losses ``[rounds * tau * B]`` of the epoch, in training order, into rank 0's table."""
        sizes = self._sizes(plan)
        check_number(len(losses), sizes[self._comm.rank])
        gathered = self._comm.gather(losses, "epoch.losses", sizes)
        if self.sampler is not None:
            tau = {rank: c.tau for rank, c in enumerate(plan.by_rank())}
            values = {rank: part.numpy() for rank, part in enumerate(gathered)}
            self.sampler.record(in_order(self._dealt, plan.rounds, tau), in_order(values, plan.rounds, tau))

    @staticmethod
    def _sizes(plan: Plan) -> list[int]:
        return [plan.rounds * c.tau * c.batch_size for c in plan.by_rank()]


def check_number(losses: int, samples: int) -> None:
    """Refuse losses of another number than there were samples: batches do not always tell how many they have.

    Raises:
        ConfigError: with both numbers.
    """
    if losses != samples:
        remedy = "return one number for each sample of a batch"
        raise ConfigError("train.loss", Plain(f"{losses} losses"), f"there were {samples} samples in the epoch", remedy)
