"""The rules of the asynchronous methods against scripted orders of arrival: who is used, with what weight, how old."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from hvd_hetero.algorithms.asgd import ASGDRule
from hvd_hetero.algorithms.async_diloco import DelayedNesterov
from hvd_hetero.algorithms.malenia_sgd import MaleniaRule
from hvd_hetero.algorithms.omnilearn_asp import ProgressRule
from hvd_hetero.algorithms.rennala_sgd import RennalaRule
from hvd_hetero.algorithms.ringleader_asgd import RingleaderRule
from hvd_hetero.algorithms.ringmaster_asgd import RingmasterRule
from hvd_hetero.algorithms.server_rule import Rule

LR = 0.1
CURVATURE = np.array([1.0, 3.0])


class Made(Counter[Any]):
    """A symbolic gradient, or a combination of some: the coefficient of each (rank, its number, version of its x)."""

    def __iadd__(self, other: Any) -> Made:
        return self + other

    def __add__(self, other: Any) -> Made:
        return Made({key: self[key] + other[key] for key in {**self, **other}})

    def __radd__(self, other: int) -> Made:
        assert other == 0
        return self

    def __sub__(self, other: Any) -> Made:
        return self + other * -1

    def __mul__(self, factor: float) -> Made:
        return Made({key: value * factor for key, value in self.items()})

    def __truediv__(self, divisor: float) -> Made:
        return self * (1 / divisor)


class Course:
    """A server that notes its updates, and ranks that push in a given order."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.updates, self.used = rule, list[dict[Any, float]](), list[bool]()
        self._made = Counter[int]()
        rule.step = lambda direction, factor: self.updates.append(
            {key: pytest.approx(value * factor) for key, value in direction.items() if abs(value) > 1e-12}
        )

    def push(self, *ranks: int) -> Course:
        for rank in ranks:
            self._made[rank] += 1
            self.used.append(self.rule.arrive(rank, Made({(rank, self._made[rank], self.rule.made_at[rank]): 1.0})))
        return self


def trained(rule: Rule, order: Sequence[int]) -> np.ndarray[Any, Any]:
    """x after these arrivals, on f(x) = x^T diag(CURVATURE) x / 2 with exact gradients."""
    x = np.array([1.0, -2.0])
    models = {rank: x.copy() for rank in range(rule.size)}

    def step(direction: Any, factor: float) -> None:
        nonlocal x
        x = x - LR * factor * direction

    rule.step = step
    for rank in order:
        before = rule.made_at[rank]
        rule.arrive(rank, CURVATURE * models[rank])
        if rule.made_at[rank] != before or rule.version == before:
            models[rank] = x.copy()
    return x


# ---- gradients as they come -----------------------------------------------------------------------------------------


def test_asgd_takes_every_gradient_and_an_adaptive_one_makes_old_ones_small() -> None:
    course = Course(ASGDRule(2)).push(0, 0, 0, 1, 0)
    assert course.updates == [{(0, 1, 0): 1}, {(0, 2, 1): 1}, {(0, 3, 2): 1}, {(1, 1, 0): 1}, {(0, 4, 3): 1}]
    adaptive = Course(ASGDRule(2, adaptive=True)).push(0, 0, 0, 1, 0)
    assert adaptive.updates[3] == {(1, 1, 0): 2 / 3}, "n / delta, with a delay of 3"
    assert adaptive.updates[4] == {(0, 4, 3): 1}, "one that is not older than n is not made smaller"


def test_asgd_on_a_quadratic_by_hand() -> None:
    """x1 = x0 - lr A x0 from rank 0, then rank 1's gradient of x0, then rank 0's of x1."""
    x0 = np.array([1.0, -2.0])
    x1 = x0 - LR * CURVATURE * x0
    expected = x1 - LR * CURVATURE * x0 - LR * CURVATURE * x1
    assert trained(ASGDRule(2), [0, 1, 0]) == pytest.approx(expected, rel=1e-12)


def test_ringmaster_ignores_what_is_r_updates_old() -> None:
    course = Course(RingmasterRule(2, max_delay=2)).push(0, 0, 1, 1, 0)
    assert course.used == [True, True, False, True, True]
    assert course.updates == [{(0, 1, 0): 1}, {(0, 2, 1): 1}, {(1, 2, 2): 1}, {(0, 3, 2): 1}]


def test_ringmaster_without_a_bound_is_asgd_and_with_1_the_first_gradient_of_each_model() -> None:
    order = random.Random(5).choices(range(3), (6, 3, 1), k=60)
    assert trained(RingmasterRule(3, 10**9), order) == pytest.approx(trained(ASGDRule(3), order), rel=1e-12)
    first = Course(RingmasterRule(3, 1)).push(*order)
    assert all(version == number for number, update in enumerate(first.updates) for _, _, version in update)
    assert first.rule.version == sum(first.used) < len(order)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_no_delay_of_ringmaster_reaches_r(most: int) -> None:
    course = Course(RingmasterRule(4, most)).push(*random.Random(0).choices(range(4), (8, 4, 2, 1), k=300))
    delays = [number - version for number, update in enumerate(course.updates) for _, _, version in update]
    assert max(delays) == most - 1


@pytest.mark.parametrize("adaptive", [False, True])
def test_ordered_momentum_gives_each_gradient_the_effect_of_its_place(adaptive: bool) -> None:
    """After every update each gradient has moved x by 1 + b + ... + b^a, a blocks after its own, late or not."""
    b, n = 0.9, 3
    plain = Course(ASGDRule(n, adaptive)).push(*(order := random.Random(3).choices(range(n), (5, 2, 1), k=60)))
    course, moved, weight = Course(ASGDRule(n, adaptive, b)), Counter[Any](), dict[Any, float]()
    for iteration, rank in enumerate(order):
        course.push(rank)
        ((new, factor),) = plain.updates[iteration].items()
        weight[new] = factor.expected
        for key, value in course.updates[-1].items():
            moved[key] += value.expected
        for key in weight:
            late = -(-iteration // n) + -key[2] // n  # ceil(t / n) - ceil(j / n)
            assert moved[key] == pytest.approx(weight[key] * sum(b**k for k in range(late + 1))), (iteration, key)


def test_ordered_momentum_of_one_rank_is_sgd_with_momentum() -> None:
    x, u = np.array([1.0, -2.0]), np.zeros(2)
    for _ in range(30):
        u = 0.9 * u + CURVATURE * x
        x = x - LR * u
    assert trained(ASGDRule(1, momentum=0.9), [0] * 30) == pytest.approx(x, abs=1e-12)


def test_ringmaster_keeps_what_it_ignores_out_of_its_momentum() -> None:
    course = Course(RingmasterRule(2, 2, momentum=0.5)).push(0, 0, 1)
    assert course.used == [True, True, False]
    course.push(1)
    assert (1, 1, 0) not in course.updates[2] and (1, 2, 2) in course.updates[2]
    assert course.rule.velocity == {(0, 1, 0): 0.5, (0, 2, 1): 1.0, (1, 2, 2): 1.0}


def test_progress_of_omnilearn_is_added_whoever_else_has_written() -> None:
    """The published server would keep the last writer's model alone."""
    course = Course(ProgressRule(2)).push(0, 1, 0)
    assert course.rule.is_outer and course.used == [True] * 3
    assert course.updates == [{(0, 1, 0): 1}, {(1, 1, 0): 1}, {(0, 2, 1): 1}]


# ---- gradients of one model -----------------------------------------------------------------------------------------


def test_rennala_takes_the_mean_of_the_next_gradients_of_one_model() -> None:
    course = Course(RennalaRule(3, gradients=3)).push(0, 0, 1, 2, 0, 0, 2, 1)
    assert course.updates == [{(0, 1, 0): 1 / 3, (0, 2, 0): 1 / 3, (1, 1, 0): 1 / 3},
                              {(0, 4, 1): 1 / 3, (2, 2, 1): 1 / 3, (1, 2, 1): 1 / 3}]
    assert course.used == [True, True, True, False, False, True, True, True], "late"


def test_rennala_with_one_gradient_of_each_is_synchronous_sgd() -> None:
    course = Course(RennalaRule(3, 3)).push(0, 1, 2)
    assert course.updates == [{(rank, 1, 0): 1 / 3 for rank in range(3)}]
    once = trained(RennalaRule(3, 3), [0, 1, 2])
    assert once == pytest.approx(np.array([1.0, -2.0]) * (1 - LR * CURVATURE), rel=1e-12)


def test_malenia_waits_for_every_rank_and_takes_the_mean_of_means() -> None:
    course = Course(MaleniaRule(2)).push(0, 0, 0, 1)
    assert course.updates == [{**{(0, i, 0): 1 / 6 for i in (1, 2, 3)}, (1, 1, 0): 1 / 2}]
    more = Course(MaleniaRule(2, harmonic_mean=1.5)).push(0, 0, 1)
    assert more.updates == [], "2 / (1/2 + 1) = 4/3"
    assert len(more.push(0).updates) == 1, "2 / (1/3 + 1) = 3/2"


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_ringleader_serves_every_rank_once_a_round() -> None:
    """Rank 0 is three times as fast."""
    course = Course(RingleaderRule(2)).push(0, 0, 0)
    assert course.updates == [] and course.rule.made_at == [0, 0], "it goes on at the same x"
    course.push(1)
    first = {(0, i, 0): 1 / 6 for i in (1, 2, 3)} | {(1, 1, 0): 1 / 2}
    assert course.updates == [first] and course.rule.made_at == [0, 1]
    course.push(0)
    assert course.updates[1] == {(0, i, 0): 1 / 8 for i in (1, 2, 3, 4)} | {(1, 1, 0): 1 / 2}
    assert course.rule.made_at == [2, 1]
    course.push(0, 0, 1)
    assert course.updates[2] == {(0, 5, 2): 1 / 4, (0, 6, 2): 1 / 4, (1, 2, 1): 1 / 2}, "a new table"
    course.push(1)
    assert len(course.updates) == 3, "it was served; its gradient goes into the next table"
    course.push(0)
    assert course.updates[3] == {(0, i, 2): 1 / 6 for i in (5, 6, 7)} | {(1, 2, 1): 1 / 2}
    course.push(0)
    assert course.updates[4] == {(0, 8, 4): 1 / 2, (1, 3, 3): 1 / 2}


@pytest.mark.parametrize("n", [2, 3, 5])
def test_ringleader_loses_nothing_and_its_delays_stay_below_their_bound(n: int) -> None:
    worst = 0
    for seed in range(40):
        chance = random.Random(seed)
        speeds = [chance.uniform(0.1, 3) for _ in range(n)]
        course = Course(RingleaderRule(n)).push(*chance.choices(range(n), speeds, k=200))
        for number, update in enumerate(course.updates):
            shares = Counter[int]()
            for (rank, _, version), share in update.items():
                worst = max(worst, number - version)
                shares[rank] += share.expected
            assert shares == pytest.approx({rank: 1 / n for rank in range(n)})
        applied = {key for update in course.updates for key in update}
        table = {key for entry in course.rule.current + course.rule.next if entry for key in entry[0]}
        assert len(applied | table) == 200 and all(course.used)
    assert worst == 2 * n - 2


# ---- the outer step -------------------------------------------------------------------------------------------------


def outer(rule: DelayedNesterov, pushes: Sequence[float]) -> float:
    x = 0.0

    def step(direction: float, factor: float) -> None:
        nonlocal x
        x -= factor * direction

    rule.step = step
    for number, g in enumerate(pushes):
        rule.arrive(number % rule.size, g)
    return x


def test_delayed_momentum_acts_with_every_nth_push() -> None:
    rule = DelayedNesterov(2, lr=0.7, momentum=0.9, buffer=4)
    assert outer(rule, [2.0] * 4) == pytest.approx(-0.7 * (3 * 2 / 4 + 0.9 * 2 + 2 / 4))
    assert rule.velocity == pytest.approx(2.0)


def test_without_a_buffer_it_is_nesterov_momentum() -> None:
    pushes, x, m = [1.0, -0.5, 2.0, 0.25], 0.0, 0.0
    for g in pushes:
        m = 0.9 * m + g
        x -= 0.7 * (g + 0.9 * m)
    assert outer(DelayedNesterov(1, 0.7, 0.9, 1), pushes) == pytest.approx(x)


def test_activation_spreads_momentum_over_the_pushes() -> None:
    """By the equations: m is 1 after the second push and 1.9 after the fourth."""
    c, b, n = 0.5, 0.9, 2
    expected = -(1 / n + ((1 - c * n + c) * b * 1 + 1 / n) + (c * b * 1 + 1 / n) + ((1 - c * n + c) * b * 1.9 + 1 / n))
    assert outer(DelayedNesterov(2, 1.0, b, n, c), [1.0] * 4) == pytest.approx(expected)


# ---- all of them ----------------------------------------------------------------------------------------------------

EVERY: dict[str, Callable[[], Rule]] = {
    "asgd": lambda: ASGDRule(3), "ordered": lambda: ASGDRule(3, True, 0.9),
    "adaptive": lambda: ASGDRule(3, True), "ringmaster": lambda: RingmasterRule(3, 2),
    "rennala": lambda: RennalaRule(3, 4), "malenia": lambda: MaleniaRule(3), "ringleader": lambda: RingleaderRule(3),
    "diloco": lambda: DelayedNesterov(3, 0.7, 0.5, 3),
}


@pytest.mark.parametrize("name", EVERY)
def test_a_rule_that_is_saved_goes_on_as_if_nothing_had_happened(name: str) -> None:
    order = random.Random(1).choices(range(3), (5, 2, 1), k=40)
    whole = Course(EVERY[name]()).push(*order)
    before = Course(EVERY[name]()).push(*order[:17])
    after = Course(EVERY[name]())
    after.rule.load_state_dict(before.rule.state_dict())
    after._made = before._made
    after.push(*order[17:])
    assert before.updates + after.updates == whole.updates and before.used + after.used == whole.used
