"""Dealing an epoch: rank 0 draws, one broadcast, each rank takes its slice; afterwards the losses go back to rank 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.helper_channel import Scores
from hvd_hetero.errors import ConfigError, Unquoted
from hvd_hetero.planning.plan import Plan
from hvd_hetero.planning.sampling import Sampler, newest_last

EVERYBODY = "everybody"
"""Under this name an epoch is drawn that ranks are handed out bit by bit."""



class Feed:
    """The indices that each rank trains on, epoch by epoch.

    Args:
        samples: n, size of the training set; it decides the index type, the same on all ranks.
        sampler: on rank 0, None elsewhere.
        is_weighted: whether samples have weights.
    """

    def __init__(self, comm: Comm, samples: int, sampler: Sampler | None, is_weighted: bool = False) -> None:
        self._comm, self.sampler, self._samples, self._is_weighted = comm, sampler, samples, is_weighted
        self._weights: NDArray[np.float32] | None = None
        self._dtype = torch.int32 if samples < 2**31 else torch.int64

    def begin_epoch(self, plan: Plan) -> Plan:
        """Return the plan with no more rounds than there are samples for, once their weights are known everywhere."""
        if not self._is_weighted:
            return plan
        in_round = sum(c.round_samples for c in plan.classes)
        size = 0 if self.sampler is None else self.sampler.prepare(in_round)
        with self._comm.timed():
            size = int(self._comm.broadcast(torch.tensor([size]), "epoch.size"))
        self._share_weights()
        return replace(plan, rounds=min(plan.rounds, size // in_round))

    def _share_weights(self) -> None:
        weights = (torch.empty(self._samples, dtype=torch.float32) if self.sampler is None
                   else torch.from_numpy(self.sampler.weights))  # fmt: skip
        with self._comm.timed():
            self._weights = self._comm.broadcast(weights, "epoch.weights").numpy()

    def weights_of(self, indices: NDArray[Any]) -> NDArray[np.float32] | None:
        """Return the weights of samples in this epoch, None where all weigh the same."""
        return None if self._weights is None else self._weights[indices]

    def deal(self, plan: Plan, full: Plan) -> NDArray[Any]:
        """This rank's indices for one epoch, ``[rounds * tau, B]``, a row a step.

        Args:
            full: the plan of an epoch that is not cut short. Of one that is, the first rounds are dealt: drawn for
                itself, a short epoch would have the biased class train on nothing but the very hardest samples.
        """
        drawn: Mapping[str, NDArray[Any]] = {}
        if self.sampler is not None:
            drawn = self.sampler.draw(full.epoch_samples())
        mine = self._slice(plan, drawn)
        if self.sampler is not None:
            self.sampler.begin(full.epoch_samples())
        return mine

    def deal_rest(
        self, plan: Plan, indices: NDArray[Any], steps: int, gone: Mapping[str, Sequence[NDArray[Any]]] | None = None
    ) -> NDArray[Any]:
        """Deal what is left of an epoch anew: this rank's indices of all rounds of a plan that begins now.

        Args:
            indices: what this rank was dealt, ``[rows, B]``, of which it has taken ``steps`` rows.
            gone: on rank 0, by class, what ranks have taken that are not there any more.
        """
        with self._comm.timed():
            shapes = [row.tolist() for row in self._comm.gather(torch.tensor([steps, *indices.shape]), "rest.sizes")]
            rest = torch.from_numpy(np.ascontiguousarray(indices.reshape(-1))).to(self._dtype)
            dealt = self._comm.gather(rest, "rest.indices", [rows * batch for _, rows, batch in shapes])
        if self._is_weighted and self._weights is None:  # the epoch was begun by an earlier job
            self._share_weights()
        drawn: Mapping[str, NDArray[Any]] = {}
        if self.sampler is not None:
            pieces = [part.split([taken * batch, (rows - taken) * batch])
                     for part, (taken, rows, batch) in zip(dealt, shapes, strict=True)]  # fmt: skip
            used, left = ({c.name: np.concatenate([pieces[rank][i].numpy() for rank in c.ranks]) for c in plan.classes}
                          for i in (0, 1))  # fmt: skip
            for name, others in (gone or {}).items():
                home = name if name in used else next(iter(used))  # where its class is gone, any
                used[home] = np.concatenate([used[home], *(rows.reshape(-1) for rows in others)])
            drawn = self.sampler.draw_rest(used, left, plan.epoch_samples())
        return self._slice(plan, drawn)

    def _slice(self, plan: Plan, drawn: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """This rank's part of what rank 0 has drawn for each class, as far as the plan goes."""
        sizes = self._sizes(plan)
        everything = torch.empty(sum(sizes), dtype=self._dtype)
        if self.sampler is not None:
            counts, dealt = plan.epoch_samples(), dict[int, NDArray[Any]]()
            for c in plan.classes:
                ends = np.cumsum([sizes[rank] for rank in c.ranks])
                dealt |= dict(zip(c.ranks, np.split(drawn[c.name][: counts[c.name]], ends[:-1]), strict=True))
            everything = torch.from_numpy(np.concatenate([dealt[rank] for rank in range(len(sizes))])).to(self._dtype)
        with self._comm.timed():
            everything = self._comm.broadcast(everything, "epoch.indices")
        mine = everything.split(sizes)[self._comm.rank].numpy()
        class_plan = plan.of_rank(self._comm.rank)
        return mine.reshape(plan.rounds * class_plan.tau, class_plan.batch_size)

    def deal_all(self, plan: Plan) -> NDArray[Any]:
        """Everybody's indices for one epoch, ``[N]``, in random order."""
        drawn = torch.empty(sum(plan.epoch_samples().values()), dtype=self._dtype)
        if self.sampler is not None:
            drawn = torch.from_numpy(self.sampler.draw({EVERYBODY: len(drawn)})[EVERYBODY])
        with self._comm.timed():
            drawn = self._comm.broadcast(drawn, "epoch.indices")
        return drawn.numpy()

    def collect(
        self, indices: NDArray[Any], at: NDArray[Any], losses: Tensor, shapes: Sequence[tuple[int, int]] | None = None,
        scored: Sequence[Scores] = (),
    ) -> None:  # fmt: skip
        """Take what this rank trained on into rank 0's table of losses.

        Args:
            indices: ``[steps, B]``, the samples of each step.
            at: ``[steps]``, the round of each step.
            losses: ``[steps * B]``, in training order; -inf for samples that do not count.
            shapes: steps and B by rank, where they are as planned.
            scored: on rank 0, losses by helpers; they count where no step was taken on the sample since their model.
        """
        steps, batch = indices.shape
        check_number(len(losses), steps * batch)
        if shapes is None:
            rows = self._comm.gather(torch.tensor([steps, batch]), "epoch.shapes")
            shapes = [(int(row[0]), int(row[1])) for row in rows]
        buffers = (torch.from_numpy(np.ascontiguousarray(at, dtype=np.int32)),
                 torch.from_numpy(np.ascontiguousarray(indices.reshape(-1))).to(self._dtype).view(torch.int32),
                 losses.float().view(torch.int32))  # fmt: skip
        words = self._dtype.itemsize // 4  # in one collective, whatever the types
        sizes = [steps * (1 + batch * (words + 1)) for steps, batch in shapes]
        gathered = self._comm.gather(torch.cat(buffers), "epoch.results", sizes)
        if self.sampler is None:
            return
        cut = [part.split([steps, steps * batch * words, steps * batch])
               for part, (steps, batch) in zip(gathered, shapes, strict=True)]  # fmt: skip
        rounds, sizes = [at.numpy() for at, _, _ in cut], [batch for _, batch in shapes]
        order = newest_last(rounds, sizes)
        rows = torch.cat([rows for _, rows, _ in cut]).view(self._dtype).numpy()[order]
        self.sampler.record(rows, torch.cat([values for _, _, values in cut]).view(torch.float32).numpy()[order])
        if scored:
            steps_at = np.concatenate([np.repeat(at, size) for at, size in zip(rounds, sizes, strict=True)])[order]
            self._record_scores(scored, rows, steps_at)

    def _record_scores(self, scored: Sequence[Scores], rows: NDArray[Any], at: NDArray[Any]) -> None:
        """Take losses by helpers into the table, where they are newer than what it has.

        Args:
            rows: samples that steps were taken on in this epoch, ``at``, the round of each, ascending.
        """
        assert self.sampler is not None
        last = np.full(self._samples, -1, dtype=np.int32)
        last[rows] = at
        for rounds, indices, losses in sorted(((s.rounds, s.indices.numpy(), s.losses.numpy()) for s in scored),
                                              key=lambda one: one[0]):  # fmt: skip
            newer = rounds > last[indices]  # a step of round 0 comes after the model of 0 rounds
            self.sampler.record(indices[newer], losses[newer])

    @staticmethod
    def _sizes(plan: Plan) -> list[int]:
        return [plan.rounds * c.tau * c.batch_size for c in plan.by_rank()]


class StreamFeed(Feed):
    """Deals places in a stream: in each round, each rank takes as many as its steps need, next to those of the others.

    No losses come back.

    Attributes:
        is_shared: all ranks read the same stream; else each has one of its own, and takes all of it.
    """

    def __init__(self, comm: Comm, sampler: Sampler | None, is_shared: bool) -> None:
        super().__init__(comm, 0, sampler)
        self.is_shared, self._next, self._before = is_shared, 0, 0

    def deal(self, plan: Plan, full: Plan) -> NDArray[Any]:
        """This rank's places for one epoch, ``[rounds * tau, B]``, a row a step."""
        rank, mine = self._comm.rank, plan.of_rank(self._comm.rank)
        sizes = [c.tau * c.batch_size for c in plan.by_rank()]
        self._before, all_ranks = (sum(sizes[:rank]), sum(sizes)) if self.is_shared else (0, sizes[rank])
        first, self._next = self._next, self._next + plan.rounds * all_ranks
        rounds = first + self._before + all_ranks * np.arange(plan.rounds)[:, None]
        return (rounds + np.arange(sizes[rank])).reshape(plan.rounds * mine.tau, mine.batch_size)

    def deal_rest(
        self, plan: Plan, indices: NDArray[Any], steps: int, gone: Mapping[str, Sequence[NDArray[Any]]] | None = None
    ) -> NDArray[Any]:
        """Deal the places from the round on that begins now, as :meth:`Feed.deal_rest` does."""
        self.go_back(indices, steps)
        if self.is_shared:  # one that has taken no steps does not know where the others are
            place = self._next if steps < len(indices) else 0
            with self._comm.timed():
                self._next = int(self._comm.max([float(place)], "rest.place")[0])
        return self.deal(plan, plan)

    def go_back(self, indices: NDArray[Any], steps: int) -> None:
        """Go back to where the round begins that comes after so many steps of what was dealt last."""
        if steps < len(indices):
            self._next = int(indices[steps, 0]) - self._before

    def collect(
        self, indices: NDArray[Any], at: NDArray[Any], losses: Tensor, shapes: Sequence[tuple[int, int]] | None = None,
        scored: Sequence[Scores] = (),
    ) -> None:  # fmt: skip
        """Do nothing: there is no table of losses."""

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next, "before": self._before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._next, self._before = state["next"], state["before"]


def check_number(losses: int, samples: int) -> None:
    """Refuse losses of another number than there were samples: batches do not always tell how many they have.

    Raises:
        ConfigError: with both numbers.
    """
    if losses != samples:
        remedy = "return one number for each sample of a batch"
        problem = f"there were {samples} samples in the epoch"
        raise ConfigError("train.loss", Unquoted(f"{losses} losses"), problem, remedy)
