"""One rank of a quorum of models, beside others that do as they are told: whether what it waits for can come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from method_helpers import method
from torch import Tensor, nn

from hvd_hetero.algorithms.averaging import partial
from hvd_hetero.cluster.device_classes import DeviceClass
from hvd_hetero.comm.nonfinite import Exclusions
from hvd_hetero.comm.partial.coordinator import ARRIVED, FINAL, FINISHED, START, Coordinator
from hvd_hetero.comm.partial.rounds import Round
from hvd_hetero.planning.quorum import QUORUM, Quorum
from hvd_hetero.worker.factories import optimizer_maker, per_sample_loss
from hvd_hetero.worker.worker import Worker

pytestmark = pytest.mark.horovod


class Beside:
    """Rank 0's end. Ranks 1 and 2 begin a round with its second step, and end the epoch while it waits for another."""

    closing = False

    def __init__(self) -> None:
        self._coordinator = Coordinator([(0,), (1,), (2,)], QUORUM, seed=0, quorum=Quorum.of(2, [1.0] * 3))
        self._buffer: list[Tensor] = []
        self._flying: Round | None = None
        self.version = self.steps = 0

    def _hear(self, rank: int, what: int) -> None:
        for _, order, number in self._coordinator.handle(rank, what, self.version):
            if order in (START, FINAL):
                mine, self._buffer = self._buffer, []
                total = sum(mine) if mine else torch.zeros(())
                own = total if mine else None
                self._flying = Round(number, total.clone(), float(bool(mine)), own, len(mine), 0.0, order == FINAL)

    @property
    def has_started(self) -> bool:
        return self._flying is not None

    def contribute(self, vector: Tensor, steps: float, *, arrived: bool) -> None:
        self._buffer.append(vector)
        self.steps += 1
        if arrived:
            self._hear(0, ARRIVED)
        if self.steps == 2:
            self._hear(1, ARRIVED)
            self._hear(2, ARRIVED)

    def pop(self, patience_sec: float | None) -> list[Round]:
        if patience_sec is not None:
            return []  # the result takes longer
        if self._flying is None:
            self._hear(1, FINISHED)
            self._hear(2, FINISHED)
        assert self._flying is not None, "it waits for a round that nobody begins"
        taken, self._flying = [self._flying], None
        self.version += 1
        return taken

    def finish(self) -> Iterator[list[Round]]:
        self._hear(0, FINISHED)
        yield self.pop(None)

    def release(self, rounds: Sequence[Round]) -> None:
        pass


def test_a_rank_that_may_go_no_further_ahead_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round began with two of its four steps, two more are beside that: at max_lag=1 it waits after the next two."""
    other = Beside()
    monkeypatch.setattr(partial, "PartialAllreduce", lambda *args, **options: other)
    classes = tuple(DeviceClass(name, "cpu", (rank,)) for rank, name in enumerate("abc"))
    policy: Any = method({
        "algorithm.name": "biased_local_sgd", "aggregation.mode": QUORUM, "aggregation.quorum": 2,
        "aggregation.max_lag": 1, "train.tau": {"a": 4, "b": 4, "c": 4},
    }, classes)  # fmt: skip
    policy.start(policy.make_plan(None))
    torch.manual_seed(0)
    worker = Worker(nn.Linear(3, 2), per_sample_loss("cross_entropy", {}), optimizer_maker("SGD", 0.1, {}), None)
    comm: Any = SimpleNamespace(rank=0, size=3, excluded=Exclusions(0, False))
    averaging = partial.PartialAveraging(policy, worker, comm)
    batches = ((torch.randn(4, 3), torch.arange(4) % 2) for _ in range(8))
    segment: Any = SimpleNamespace(
        rounds=2, batches=lambda: batches, start_round=lambda number: None, finish_round=lambda: None,
        record=lambda steps, number: None, is_stopping=lambda: False,
    )
    averaging.run_segment(segment, policy.plan.of_rank(0))
    assert other.steps == 8 and segment.averages == other.version > 2
