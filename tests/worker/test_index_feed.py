"""How the samples of an epoch are dealt to the ranks."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hvd_hetero.cluster.device_classes import assign
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.comm.helper_channel import Scores
from hvd_hetero.config.load import device_classes
from hvd_hetero.planning.plan import make_plan
from hvd_hetero.planning.sampling import Sampler
from hvd_hetero.worker.index_feed import Feed, StreamFeed

pytestmark = pytest.mark.horovod

FAST, SLOW, SAMPLES = "quick", "slow", 1000


class Alone:
    """The communication of a rank that nobody listens to."""

    rank = 0
    timed = staticmethod(nullcontext)

    @staticmethod
    def broadcast(tensor: Any, name: str) -> Any:
        return tensor

    @staticmethod
    def max(numbers: list[float], name: str) -> list[float]:
        return numbers


def test_an_epoch_that_is_cut_short_is_the_beginning_of_a_whole_one() -> None:
    """Drawn for itself it would be half of the very hardest samples."""
    facts = [RankFacts(rank, "here", rank, (), "cpu", (0, 1)) for rank in range(2)]
    cluster = assign(device_classes({FAST: {"ranks": [0]}, SLOW: {"ranks": [1]}}), facts)
    whole = make_plan(cluster, SAMPLES, {FAST: 8, SLOW: 1}, {FAST: 4, SLOW: 4})
    rows = {}
    for rounds in (whole.rounds, 2):
        sampler = Sampler(SAMPLES, "separate", 0.5, FAST, 0)
        sampler.losses[:] = np.arange(SAMPLES)
        feed = Feed(Alone(), SAMPLES, sampler)  # type: ignore[arg-type]
        rows[rounds] = feed.deal(replace(whole, rounds=rounds), whole)
        assert rows[rounds].shape == (rounds * 8, 4) and rows[rounds].dtype == np.int32
    first = rows[2].reshape(-1)
    assert (first == rows[whole.rounds].reshape(-1)[: len(first)]).all()
    assert np.count_nonzero(first >= SAMPLES - len(first) // 2) < len(first) // 4


def test_places_in_a_stream_follow_one_another_whatever_the_plan_becomes() -> None:
    """Two rounds of one plan, then the rest of the epoch and another epoch by another one; a rank's state between."""
    facts = [RankFacts(rank, "here", rank, (), "cpu", (0, 1)) for rank in range(2)]
    cluster = assign(device_classes({FAST: {"ranks": [0]}, SLOW: {"ranks": [1]}}), facts)
    old, new = (make_plan(cluster, 120, {FAST: tau, SLOW: 1}, {FAST: 4, SLOW: 2}) for tau in (3, 2))
    taken: list[int] = []
    for rank in range(2):
        comm = Alone()
        comm.rank = rank
        feed = StreamFeed(comm, None, is_shared=True)  # type: ignore[arg-type]
        first = feed.deal(old, old)
        assert first.shape == (old.rounds * (3 if rank == 0 else 1), 4 if rank == 0 else 2)
        steps = 2 * old.of_rank(rank).tau
        again = StreamFeed(comm, None, is_shared=True)  # type: ignore[arg-type]
        again.load_state_dict(feed.state_dict())
        rest = again.deal_rest(replace(new, rounds=5), first, steps)
        taken += [*first[:steps].reshape(-1), *rest.reshape(-1), *again.deal(new, new).reshape(-1)]
    assert sorted(taken) == list(range(2 * 14 + 5 * 10 + new.rounds * 10))
    own = StreamFeed(Alone(), None, is_shared=False)  # type: ignore[arg-type]
    assert own.deal(old, old).reshape(-1).tolist() == list(range(old.rounds * 12))


def test_a_rank_that_had_no_steps_learns_where_in_a_stream_the_others_are() -> None:
    """The slow rank was left out, and takes part in the rest of the epoch."""
    facts = [RankFacts(rank, "here", rank, (), "cpu", (0, 1)) for rank in range(2)]
    cluster = assign(device_classes({FAST: {"ranks": [0]}, SLOW: {"ranks": [1]}}), facts)
    old, new = (make_plan(cluster, 120, {FAST: 3, SLOW: tau}, {FAST: 4, SLOW: 2}) for tau in (0, 1))
    places, taken = [0.0], list[int]()

    class Both(Alone):
        def max(self, numbers: list[float], name: str) -> list[float]:  # type: ignore[override]
            places.extend(numbers)
            return [max(places)]

    for rank in range(2):
        comm = Both()
        comm.rank = rank
        feed = StreamFeed(comm, None, is_shared=True)  # type: ignore[arg-type]
        first = feed.deal(old, old)
        steps = 2 * old.of_rank(rank).tau
        taken += [*first[:steps].reshape(-1), *feed.deal_rest(new, first, steps).reshape(-1)]
    assert sorted(taken) == list(range(2 * 12 + new.rounds * 14))


def test_losses_by_helpers_count_where_no_step_was_taken_since_their_model() -> None:
    """A loss of the step in round q is by the model of q rounds or a later one."""

    class Gathering(Alone):
        @staticmethod
        def gather(tensor: Any, name: str, sizes: Any) -> Any:
            return [tensor]

    sampler = Sampler(8, "separate", 0.5, FAST, 0)
    sampler.losses[:] = 9.0
    feed = Feed(Gathering(), 8, sampler)  # type: ignore[arg-type]
    scored = [Scores(1, 2, torch.tensor([0, 2, 4]), torch.tensor([20.0, 22.0, 24.0])),
              Scores(1, 0, torch.tensor([4, 0, 6]), torch.tensor([4.0, 0.0, 6.0])),
              Scores(1, 1, torch.tensor([1, 0, 7]), torch.tensor([11.0, 10.0, 17.0]))]  # fmt: skip
    rows, at = np.array([[0, 1], [2, 3], [4, 0]]), np.array([0, 1, 2])
    feed.collect(rows, at, torch.tensor([0.0, 0.1, 1.2, 1.3, 2.4, 2.0]), [(3, 2)], scored)
    assert sampler.losses.tolist() == pytest.approx([2.0, 11.0, 22.0, 1.3, 2.4, 9.0, 6.0, 17.0])
