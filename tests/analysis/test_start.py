"""What so many ranks cost before their first step and in a round: predicted, beside what was measured."""

from __future__ import annotations

import pytest

from hvd_hetero.analysis.predict.link import Link
from hvd_hetero.analysis.predict.start import INIT, TRY_SEC, Start, start_of
from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.cluster.hardware import RankFacts

MIN, DAY = 60.0, 86400.0


def start(ranks: int, hosts: int = 1, cores: int = 2, link: Link | None = None, model_bytes: float = 0.0) -> Start:
    facts = [RankFacts(rank, f"host{rank % hosts}", rank // hosts, (), "", ()) for rank in range(ranks)]
    return start_of(Cluster((), tuple(facts)), cores, link or Link(), model_bytes)


MEASURED = {2: 4.7, 4: 6.4, 8: 13.2, 16: 29.2, 32: 63.8}
"""Seconds from horovodrun to the first step on two cores, beside other processes; see docs/performance.md."""


@pytest.mark.parametrize("ranks", MEASURED)
def test_it_is_about_what_was_measured(ranks: int) -> None:
    """On a machine that had about two thirds of its cores to give."""
    assert start(ranks).seconds - TRY_SEC == pytest.approx(0.7 * MEASURED[ranks], rel=0.2)


def test_ranks_take_turns_on_the_cores_of_their_host() -> None:
    alone, crowded, spread = (start(*counts).phases["imports, data, model"] for counts in ((2, 1), (8, 1), (8, 4)))
    assert alone == spread == crowded / 4
    assert start(8, cores=8).phases["imports, data, model"] == alone
    assert start(8, cores=64).bookkeeping_sec == start(8, 4).bookkeeping_sec < start(8).bookkeeping_sec


def test_what_grows_fastest_is_named() -> None:
    """As docs/performance.md has it: three quarters of an hour of 1 000 ranks, and days of 10 000."""
    found = start(16, hosts=8)
    assert found.fastest == INIT and found.power == pytest.approx(2.0, abs=0.1)
    assert found.projected[1000] == pytest.approx(46 * MIN, rel=0.02)
    assert 3 * DAY < found.projected[10000] < 4 * DAY
    slow = start(16, hosts=8, link=Link(bytes_per_sec=1.25e8))
    assert slow.projected[10000] > 100 * DAY, "lists of addresses are as long as there are ranks"
    said = " ".join(found.sentences(round_sec=1.0))
    assert "hvd.init grows fastest" in said and "46 min with 1000 ranks, 3 days with 10000 ranks" in said


def test_a_model_travels_and_a_round_meets_on_the_link() -> None:
    link = Link(latency_sec=0.01, bytes_per_sec=1e6)
    assert start(4, 4, link=link, model_bytes=2e6).phases["model to all"] == pytest.approx(0.02 + 3.0)
    assert start(4, 4, link=link).bookkeeping_sec == pytest.approx(start(4, 4).bookkeeping_sec + 0.02)
