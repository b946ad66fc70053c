"""The simulator against arithmetic: what rounds of unequal ranks take, and who waits for how long."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_hetero.algorithms.asgd import ASGDRule
from hvd_hetero.algorithms.rennala_sgd import RennalaRule
from hvd_hetero.algorithms.ringmaster_asgd import RingmasterRule
from hvd_hetero.analysis.predict.link import Link, fitted
from hvd_hetero.analysis.predict.simulator import (
    DISTRIBUTIONS,
    LOGNORMAL,
    MAJORITY,
    NORMAL,
    SOLO,
    Group,
    Outcome,
    blocking,
    partial,
    served,
)
from hvd_hetero.planning.quorum import Quorum


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---- blocking rounds ------------------------------------------------------------------------------------------------


def test_two_classes_without_jitter_are_arithmetic() -> None:
    found = blocking([Group("a", 3, 0.01, 32), Group("b", 2, 0.1, 4)], 50, 0.08, rng())
    a, b = found.classes["a"], found.classes["b"]
    assert found.seconds == pytest.approx(50 * (0.4 + 0.08))
    assert (a.compute, a.blocked, a.comm) == pytest.approx((50 * 0.32, 50 * 0.08, 50 * 0.08))
    assert (b.compute, b.blocked, b.comm) == pytest.approx((50 * 0.4, 0, 50 * 0.08))
    assert a.blocked_share == pytest.approx(0.08 / 0.48) and (a.steps, b.steps) == (1600, 200)


def test_three_classes_all_wait_for_the_slowest() -> None:
    found = blocking([Group("a", 1, 1.0, 8), Group("b", 4, 3.0, 3), Group("c", 2, 5.0, 2)], 7, 0.0, rng())
    assert found.seconds == pytest.approx(70)
    assert {name: s.blocked_share for name, s in found.classes.items()} == pytest.approx({"a": 0.2, "b": 0.1, "c": 0})


def test_who_takes_no_part_waits_and_a_server_waits_and_transfers() -> None:
    found = blocking([Group("works", 2, 1.0), Group("serves", 1, 9.0, tau=0), Group("idle", 1, 9.0, 0, joins=False)],
                     10, 0.5, rng())
    serves, idle = found.classes["serves"], found.classes["idle"]
    assert (serves.compute, serves.blocked, serves.comm) == pytest.approx((0, 10, 5))
    assert (idle.compute, idle.blocked, idle.comm) == pytest.approx((0, 15, 0))


def test_groups_of_one_name_are_one_class() -> None:
    found = blocking([Group("a", 1, 1.0), Group("a", 3, 2.0)], 1, 0.0, rng())
    assert found.classes["a"].compute == pytest.approx(1.75)


@pytest.mark.parametrize("distribution", [NORMAL, LOGNORMAL])
def test_the_wait_for_a_jittered_rank_is_its_expectation(distribution: str) -> None:
    """A steady rank of mean 1 beside one of mean 1 and deviation s waits s / sqrt(2 pi) on average."""
    found = blocking([Group("steady", 1, 1.0), Group("shaky", 1, 1.0, jitter=0.1)], 200_000, 0.0, rng(), distribution)
    assert found.classes["steady"].blocked / 200_000 == pytest.approx(0.1 / math.sqrt(2 * math.pi), rel=0.02)


@pytest.mark.parametrize("distribution", [NORMAL, LOGNORMAL])
def test_jitter_averages_out_over_the_steps_of_a_round(distribution: str) -> None:
    once = blocking([Group("a", 1, 1.0, 1, 0.2), Group("b", 1, 1.0, 1)], 50_000, 0.0, rng(), distribution)
    long = blocking([Group("a", 1, 1.0, 100, 0.2), Group("b", 1, 1.0, 100)], 50_000, 0.0, rng(), distribution)
    assert once.classes["b"].blocked / long.classes["b"].blocked == pytest.approx(0.1, rel=0.05)


def test_the_mean_of_a_step_is_what_was_asked_for() -> None:
    for distribution in DISTRIBUTIONS:
        found = blocking([Group("a", 1, 2.0, 3, 0.3)], 100_000, 0.0, rng(), distribution)
        assert found.seconds == pytest.approx(600_000, rel=5e-3)


# ---- partial rounds -------------------------------------------------------------------------------------------------


def test_solo_leaves_the_late_class_out() -> None:
    found = partial([Group("a", 1, 1.0, 8), Group("b", 1, 100.0)], 0.5, rng(), by_class=True, rounds=20, mode=SOLO)
    a, b = found.classes["a"], found.classes["b"]
    assert found.seconds == pytest.approx(20 * 8 + 19 * 0.5) and found.rounds == 19
    assert (a.compute, a.blocked, a.comm) == pytest.approx((160, 0, 9.5))
    assert (b.compute, b.blocked, b.steps) == pytest.approx((found.seconds, 0, 1))


def test_every_so_many_rounds_everybody_is_waited_for() -> None:
    """The last one of four rounds stands until the slow rank has something to give, at 100 s."""
    found = partial([Group("a", 1, 1.0), Group("b", 1, 100.0)], 0.0, rng(), rounds=5, by_class=True, sync_every=4)
    assert found.seconds == pytest.approx(101)


def test_a_rank_behind_by_the_greatest_lag_holds_the_round_up() -> None:
    found = partial([Group("a", 1, 1.0), Group("b", 1, 100.0)], 0.0, rng(), rounds=5, by_class=True, max_lag=3)
    assert found.seconds == pytest.approx(101), "round 3 stands until the slow rank has taken what there is"


def test_patience_ends_the_wait() -> None:
    """The steady rank goes on 2 s after each of its steps, until its contribution is taken."""
    groups = [Group("a", 1, 1.0), Group("b", 1, 10.0)]
    waits = partial(groups, 20.0, rng(), rounds=5, by_class=True)
    goes_on = partial(groups, 20.0, rng(), rounds=5, by_class=True, patience_sec=2.0)
    assert waits.seconds == pytest.approx(5 + 4 * 20.0)
    assert goes_on.seconds == pytest.approx(5 + 4 * 2.0)


def test_nobody_loses_patience_where_results_come_in_time() -> None:
    groups = [Group("a", 2, 1.0, 4, 0.1), Group("b", 1, 4.0, 1, 0.1)]
    found = [partial(groups, 0.1, rng(), rounds=30, by_class=True, patience_sec=sec) for sec in (50.0, math.inf)]
    assert found[0] == found[1]


def test_majority_waits_for_half_of_the_ranks_on_average() -> None:
    """m ranks whose steps end 1, 2, ... m after the round's begin: the one that is drawn comes (m + 1) / 2 after it."""
    m, rounds = 8, 4000
    groups = [Group(f"{i}", 1, 100.0 + i) for i in range(m)]
    found = partial(groups, 50.0, rng(), mode=MAJORITY, rounds=rounds)
    assert found.seconds / found.rounds == pytest.approx(150 + (m - 1) / 2, rel=0.003)
    assert partial(groups, 50.0, rng(), rounds=rounds).seconds / rounds == pytest.approx(150, rel=0.003)


def test_a_quorum_waits_for_the_mth_and_drops_the_rest_where_that_is_the_rule() -> None:
    """Steps of 2, 3 and 5 s, m = 2: rounds each 3 s; the third rank ends its step at 5, 11, ... s, too late."""
    groups = [Group(f"{sec:g}", 1, sec) for sec in (2.0, 3.0, 5.0)]
    found = partial(groups, 0.0, rng(), contributions=800, quorum=Quorum.of(2, (1, 1, 1)), drops_late=True,
                    sync_every=10**9)
    assert found.seconds / found.rounds == pytest.approx(3, rel=0.01)
    shares = {name: s.dropped / s.steps for name, s in found.classes.items()}
    assert shares == pytest.approx({"2": 0, "3": 0, "5": 1}, abs=0.01)
    kept = partial(groups, 0.0, rng(), contributions=800, quorum=Quorum.of(2, (1, 1, 1)), sync_every=10**9)
    assert kept.seconds == pytest.approx(found.seconds) and all(s.dropped == 0 for s in kept.classes.values())


def test_with_a_quorum_of_models_those_who_are_through_go_on() -> None:
    """tau 4: the round lasts until the second rank has its 4 steps, 8 s; the first takes 8, the third 1.6."""
    groups = [Group(f"{sec:g}", 1, sec, 4) for sec in (1.0, 2.0, 5.0)]
    found = partial(groups, 0.0, rng(), rounds=200, by_class=True, quorum=Quorum.of(2, (1, 1, 1)))
    assert found.seconds / found.rounds == pytest.approx(8, rel=0.02)
    steps = {name: s.steps / found.rounds for name, s in found.classes.items()}
    assert steps == pytest.approx({"1": 8, "2": 4, "5": 1.6}, rel=0.02)
    assert sum(s.blocked for s in found.classes.values()) == 0


def test_micro_batches_go_on_from_round_to_round() -> None:
    """Batches of 4 parts; b is four times as slow, so each of a's rounds has one part of it, and none is lost."""
    groups = [Group("a", 1, 1.0), Group("b", 1, 4.0)]
    found = partial(groups, 0.0, rng(), contributions=500, sync_every=10**9, micro_batches=4)
    assert found.seconds == pytest.approx(400, rel=0.01)
    assert {name: s.steps for name, s in found.classes.items()} == pytest.approx({"a": 400, "b": 100}, rel=0.01)
    assert found.rounds >= 400 and all(s.blocked == s.dropped == 0 for s in found.classes.values())


# ---- a server -------------------------------------------------------------------------------------------------------


def test_nobody_waits_for_a_server_that_takes_no_time() -> None:
    found = served([Group("a", 1, 1.0), Group("b", 1, 8.0)], ASGDRule(2), 0.0, rng(), pushes=900)
    a, b = found.classes["a"], found.classes["b"]
    assert found.seconds == pytest.approx(800) and found.rounds == 900 and found.pushes == 450
    assert (a.steps, b.steps, a.compute, b.compute) == pytest.approx((800, 100, 800, 800))
    assert a.blocked == b.blocked == a.comm == b.comm == 0


def test_a_server_makes_one_exchange_after_another() -> None:
    """Four ranks of 1 s each and exchanges of 0.5 s: a round of all takes 2 s, of which each waits half a second."""
    found = served([Group("a", 4, 1.0)], ASGDRule(4), 0.5, rng(), pushes=400)
    a = found.classes["a"]
    assert found.seconds == pytest.approx(200, rel=0.01)
    assert (a.compute, a.comm, a.blocked) == pytest.approx((100, 50, 50), rel=0.03)


def test_what_a_rule_drops_is_told() -> None:
    """Rank b's gradient is 8 updates old, which R = 3 does not take."""
    groups = [Group("a", 1, 1.0), Group("b", 1, 8.0)]
    found = served(groups, RingmasterRule(2, 3), 0.0, rng(), pushes=900)
    assert (found.classes["a"].dropped, found.rounds) == (0, 800)
    assert found.classes["b"].dropped == found.classes["b"].steps == 100


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.floats(0.1, 20), st.integers(1, 5)), min_size=2, max_size=3),
       st.floats(0, 2), st.integers(0, 99))
def test_no_second_is_lost_with_a_server(classes: list[tuple[int, float, int]], sec: float, seed: int) -> None:
    groups = [Group(f"{i}", ranks, step, tau, 0.3) for i, (ranks, step, tau) in enumerate(classes)]
    size = sum(g.ranks for g in groups)
    found = served(groups, RennalaRule(size, size), sec, rng(seed), pushes=60)
    assert sum(found.classes[g.name].steps * g.ranks / g.tau for g in groups) == pytest.approx(60)
    for spent in found.classes.values():
        assert min(spent.compute, spent.blocked, spent.comm) >= -1e-9 and spent.dropped <= spent.steps
        assert spent.compute + spent.blocked + spent.comm == pytest.approx(found.seconds)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.floats(0.1, 20), st.integers(1, 5)), min_size=2, max_size=3),
       st.sampled_from([SOLO, MAJORITY]), st.booleans(), st.integers(1, 6), st.integers(1, 6),
       st.sampled_from([0.0, 0.3, math.inf]), st.integers(0, 99))
def test_no_second_of_a_rank_is_lost_and_none_is_negative(
    classes: list[tuple[int, float, int]], mode: str, by_class: bool, sync_every: int, max_lag: int, patience: float,
    seed: int,
) -> None:
    groups = [Group(f"{i}", ranks, sec, tau, 0.3) for i, (ranks, sec, tau) in enumerate(classes)]
    found = partial(groups, 0.7, rng(seed), mode=mode, by_class=by_class, contributions=60, sync_every=sync_every,
                    max_lag=max_lag, patience_sec=patience)
    assert sum(found.classes[g.name].steps * g.ranks / g.tau for g in groups) == pytest.approx(60)
    for spent in found.classes.values():
        assert min(spent.compute, spent.blocked, spent.comm) >= 0
        assert spent.compute + spent.blocked + spent.comm == pytest.approx(found.seconds)


# ---- seeds and sizes ------------------------------------------------------------------------------------------------


def both(seed: int) -> tuple[Outcome, Outcome]:
    groups = [Group("a", 3, 1.0, 4, 0.2), Group("b", 2, 4.0, 1, 0.2)]
    return blocking(groups, 30, 0.1, rng(seed)), partial(groups, 0.1, rng(seed), mode=MAJORITY, contributions=99)


def test_the_seed_decides() -> None:
    assert both(5) == both(5)
    assert both(5)[0] != both(6)[0] and both(5)[1] != both(6)[1]


def test_ten_thousand_ranks() -> None:
    groups = [Group("a", 8000, 1.0, 32, 0.1), Group("b", 2000, 8.0, 4, 0.1)]
    found = blocking(groups, 100, 0.5, rng())
    assert found.classes["a"].steps == 3200 and 100 * 32.5 < found.seconds < 100 * 45
    solo = partial(groups, 0.5, rng(), by_class=True, rounds=10)
    assert solo.classes["a"].steps == 320 and solo.rounds >= 9
    eager = partial(groups, 0.5, rng(), mode=MAJORITY, contributions=50_000)
    assert sum(s.compute + s.blocked + s.comm for s in eager.classes.values()) == pytest.approx(2 * eager.seconds)


# ---- the link -------------------------------------------------------------------------------------------------------


def test_an_allreduce_costs_its_starts_and_its_bytes() -> None:
    link = Link(0.001, 1e6)
    assert link.sum_sec(1, 1e6) == 0
    assert link.sum_sec(2, 1e6) == pytest.approx(0.001 + 1)
    assert link.sum_sec(8, 1e6) == pytest.approx(0.003 + 2 * 7 / 8)
    assert link.sum_sec(9, 1e6) == pytest.approx(0.004 + 2 * 8 / 9)
    assert Link().sum_sec(64, 1e9) == 0


def test_servers_are_as_fast_as_the_busiest_rank() -> None:
    assert Link(0.0, 1e6).served_sec(2, 4, 1e6) == pytest.approx(2)
    assert Link(0.0, 1e6).served_sec(6, 2, 1e6) == pytest.approx(2 * 3)


@pytest.mark.parametrize(("latency", "rate"), [(None, None), (0.004, None), (None, 5e6)])
def test_a_fitted_link_gives_what_was_measured(latency: float | None, rate: float | None) -> None:
    assert fitted(0.5, 6, 1e6, latency, rate).sum_sec(6, 1e6) == pytest.approx(0.5)
