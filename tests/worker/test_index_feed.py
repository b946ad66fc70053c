"""How the samples of an epoch are dealt to the ranks."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hvd_hetero.cluster.device_classes import assign
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.config.load import device_classes
from hvd_hetero.planning.plan import make_plan
from hvd_hetero.planning.sampling import Sampler
from hvd_hetero.worker.index_feed import Feed

pytestmark = pytest.mark.horovod

FAST, SLOW, SAMPLES = "quick", "slow", 1000


class Alone:
    """The communication of a rank that nobody listens to."""

    rank = 0
    booked = staticmethod(nullcontext)

    @staticmethod
    def broadcast(tensor: Any, name: str) -> Any:
        return tensor


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
