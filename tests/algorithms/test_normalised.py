"""Averages in which every local gradient counts the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_hetero.cluster.device_classes import assign
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.config.load import device_classes
from hvd_hetero.planning.plan import Plan, make_plan, progress_factors, round_way

CLASSES = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40), st.sampled_from([4, 8])), min_size=1, max_size=3)


def plan(classes: list[tuple[int, int, int]]) -> Plan:
    """Of ranks, tau and batch by class; whole batches are of 8."""
    names, first, given = [f"c{i}" for i in range(len(classes))], 0, {}
    for name, (ranks, _, _) in zip(names, classes, strict=True):
        given[name] = {"ranks": list(range(first, first := first + ranks))}
    facts = [RankFacts(rank, "here", rank, (), "cpu", (0,)) for rank in range(first)]
    return make_plan(
        assign(device_classes(given), facts), 10**6, {n: c[1] for n, c in zip(names, classes, strict=True)},
        {n: c[2] for n, c in zip(names, classes, strict=True)}, weights="normalised",
        whole_batch=dict.fromkeys(names, 8),
    )  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(CLASSES)
def test_every_sample_counts_the_same_and_a_round_moves_as_far_as_the_longest_alone(
    classes: list[tuple[int, int, int]]
) -> None:
    made = plan(classes)
    factors = progress_factors(made, most=1e9)
    longest = max(c.tau for c in made.classes)
    largest = {c.batch_size for c in made.classes if c.tau == longest}
    coefficient = {c.name: c.weight * factors[c.name] for c in made.classes}
    a_sample = {coefficient[c.name] / c.batch_size for c in made.classes}
    assert max(a_sample) == pytest.approx(min(a_sample))
    # were all gradients the same, each rank would move by its steps
    moved = sum(len(c.ranks) * coefficient[c.name] * c.tau for c in made.classes)
    assert moved == pytest.approx(longest) and largest


@settings(max_examples=200, deadline=None)
@given(CLASSES, st.floats(1, 3))
def test_coefficients_add_up_to_no_more_than_they_may(classes: list[tuple[int, int, int]], most: float) -> None:
    made = plan(classes)
    factors = progress_factors(made, most)
    total = sum(len(c.ranks) * c.weight * factors[c.name] for c in made.classes)
    longest = max(c.tau for c in made.classes)
    assert total <= 1 + (most - 1) * min(1.0, 8 / longest) + 1e-9
    assert all(factor >= 1 - 1e-9 for factor in factors.values()), "no rank's progress counts less than by steps"
    by_steps, alike = (round_way(made, name, most) for name in ("steps", "normalised"))
    assert alike >= by_steps - 1e-9, "nor does a round move less"


@pytest.mark.parametrize("taus", [(2, 1), (4, 1), (8, 2), (32, 8), (128, 16)])
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 1.0])
def test_it_is_stable_on_a_quadratic_where_each_rank_alone_is(taus: tuple[int, int], rate: float) -> None:
    """Of f(x) = h x^2 / 2, h <= 1: x becomes 1 - sum c_i (1 - (1 - rate h)^tau_i) of what it was."""
    made = plan([(2, taus[0], 8), (2, taus[1], 8)])
    factors = progress_factors(made, 2.0)
    for curvature in np.geomspace(1e-3, 1.0, 30):
        left = 1.0
        for c in made.classes:
            left -= len(c.ranks) * c.weight * factors[c.name] * (1 - (1 - rate * curvature) ** c.tau)
        assert abs(left) < 1, (curvature, left)
    unbounded = progress_factors(made, 1e9)
    assert sum(len(c.ranks) * c.weight * unbounded[c.name] for c in made.classes) >= 1
