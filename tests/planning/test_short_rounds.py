"""``train.tau=auto``: the shortest round that is affordable, by arithmetic and as policies take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from method_helpers import TWO, method

from hvd_hetero.algorithms.local_sgd import LocalSGD
from hvd_hetero.errors import ConfigError
from hvd_hetero.planning.local_steps import LONGEST, derive_tau, round_overhead, shortest_round, slower_share

EIGHTH, HALF = {"fast": 0.001, "slow": 0.008}, {"fast": 0.001, "slow": 0.002}
ONE_EACH, THREE_SLOW = {"fast": 4.0, "slow": 4.0}, {"fast": 4.0, "slow": 12.0}


def auto(overrides: dict[str, Any] | None = None, average_sec: float = 0.0, **settings: Any) -> LocalSGD:
    """A policy for two fast and three slow ranks."""
    settings = {"algorithm.name": "biased_local_sgd", "train.batch_size": 4, "train.tau": "auto"} | settings
    made = method({**settings, **(overrides or {})}, TWO)
    assert isinstance(made, LocalSGD)
    made.samples, made.average_sec = 100_000, average_sec
    return made


def test_what_a_round_costs() -> None:
    """Rounds of 8 and 1 steps take 8 ms; with an average of 2 ms a fifth of the time is transfer."""
    fitting = {"fast": 8, "slow": 1}
    assert round_overhead(fitting, EIGHTH, ONE_EACH) == pytest.approx(0)
    assert round_overhead(fitting, EIGHTH, ONE_EACH, 0.002) == pytest.approx(0.2)
    assert round_overhead(fitting, EIGHTH, ONE_EACH, 0.002, delayed=True) == pytest.approx(0)
    assert round_overhead(fitting, EIGHTH, ONE_EACH, 0.016, delayed=True) == pytest.approx(0.5)
    # 12 ms: of 12 and 1.5 steps, the slow class takes 1
    assert round_overhead({"fast": 12, "slow": 1}, EIGHTH, ONE_EACH) == pytest.approx(1 - 13 / 13.5)
    waiting, transfer = 1 - 13 / 13.5, 2 / 14
    both = round_overhead({"fast": 12, "slow": 1}, EIGHTH, ONE_EACH, 0.002)
    assert both == pytest.approx(waiting * (1 - transfer) + transfer)


@pytest.mark.parametrize(("step_sec", "samples", "average_sec", "expected"), [
    (EIGHTH, ONE_EACH, 0.0, 8),
    ({"fast": 0.001, "slow": 0.0087}, ONE_EACH, 0.0, 9),
    (HALF, THREE_SLOW, 0.0, 2),
    ({"fast": 0.001, "same": 0.001}, {"fast": 4.0, "same": 4.0}, 0.0, 1),
    ({"only": 0.001}, {"only": 4.0}, 0.0002, 10),  # 0.2 of 10.2 ms
    (HALF, THREE_SLOW, 0.0002, 10),
    (EIGHTH, ONE_EACH, 0.0002, 16),
    (EIGHTH, ONE_EACH, 1.0, 512),  # nothing is affordable: the cheapest
    ({"fast": 0.001, "slow": 0.6}, ONE_EACH, 0.0, 600),  # one step of the slow class at least
])  # fmt: skip
def test_the_shortest_affordable_round(
    step_sec: dict[str, float], samples: dict[str, float], average_sec: float, expected: int
) -> None:
    assert shortest_round(step_sec, samples, average_sec, 0.02) == expected


def test_a_tighter_budget_makes_longer_rounds_and_delay_shorter_ones() -> None:
    found = [shortest_round(EIGHTH, ONE_EACH, 0.0005, share) for share in (0.05, 0.02, 0.005)]
    assert found == sorted(found) and found[0] < found[-1] <= LONGEST
    assert shortest_round(EIGHTH, ONE_EACH, 0.0005, 0.02, delayed=True) == 8


def test_the_share_of_the_slower_classes() -> None:
    assert slower_share(EIGHTH, ONE_EACH) == pytest.approx(1 / 9)
    assert slower_share(HALF, THREE_SLOW) == pytest.approx(3 / 5)
    assert slower_share({"only": 1.0}, {"only": 4.0}) == 0


def test_a_policy_takes_it_and_the_other_classes_follow() -> None:
    assert auto().taus(EIGHTH) == {"fast": 8, "slow": 1}
    longer = auto(average_sec=0.001).taus(EIGHTH)
    assert longer["fast"] >= 50 and longer == derive_tau(longer["fast"], EIGHTH, margin=0.1 * (1 - 2 * 3 / 19))
    assert auto(average_sec=0.001, **{"aggregation.delayed": True}).taus(EIGHTH)["fast"] == 8
    assert auto(average_sec=0.001, **{"train.tau_overhead": 0.2}).taus(EIGHTH)["fast"] == 8
    assert auto().needs_average_sec and not auto(**{"train.tau": 8}).needs_average_sec


def test_balanced_ranks_wait_anyway_and_only_transfer_counts() -> None:
    balanced = auto(average_sec=0.001, **{"algorithm.name": "balanced_local_sgd"})
    assert balanced.taus(EIGHTH) == {"fast": 7, "slow": 7}, "1 of 57 ms"


@pytest.mark.parametrize("limit", ["train.max_samples", "train.max_fast_steps", "data"])
def test_no_round_is_longer_than_the_run(limit: str) -> None:
    made = auto(average_sec=1.0, **({} if limit == "data" else {limit: 300}))
    made.samples = 600 if limit == "data" else 100_000
    plan = made.make_plan(EIGHTH)
    in_round = plan.classes[0].tau if limit == "train.max_fast_steps" else sum(c.round_samples for c in plan.classes)
    assert (400 < in_round <= 600 and plan.rounds == 1) if limit == "data" else 200 < in_round <= 300


def test_an_epoch_that_ends_the_choice_of_rounds_is_told() -> None:
    """At 1 s an average a round would be as long as it may."""
    made = auto(average_sec=1.0)
    made.samples = 600
    plan = made.make_plan(EIGHTH)
    told, tau = made.few_rounds(plan) or "", plan.classes[0].tau
    assert "an epoch of 600 samples has only 1 round," in told and f"set train.tau={tau // 4} for more averages" in told
    as_told = auto(**{"train.tau": tau // 4})
    as_told.samples = 600
    assert as_told.make_plan(EIGHTH).rounds == 4
    made.samples = 100
    assert "train.tau=" not in (made.few_rounds(made.make_plan(EIGHTH)) or ""), "the slow class needs 8 steps"
    cheap = auto()
    cheap.samples = 300
    few = cheap.make_plan(EIGHTH)
    assert few.rounds < 4 and few.classes[0].tau == 8 and cheap.few_rounds(few) is None, "chosen, not cut off"


def test_a_class_too_slow_even_for_the_longest_round() -> None:
    speeds = {"fast": 0.001, "slow": 0.6}
    with pytest.raises(ConfigError, match=r"train\.tau.*slow is 600\.0 times slower.*cluster\.too_slow"):
        auto(**{"train.tau_overhead": 0.5}).make_plan(speeds)
    assert auto(**{"cluster.too_slow": "leave_out"}).taus(speeds) == {"fast": 1, "slow": 0}
    shrunk = auto(**{"cluster.too_slow": "shrink_batch"}).make_plan(speeds)
    assert shrunk.classes[1].tau == 1 and shrunk.classes[1].batch_size == 3


def drive(made: LocalSGD, epochs: Sequence[Sequence[float]]) -> list[int]:
    """tau of the fast class after each epoch of so long steps."""
    found = []
    for fast, slow in epochs:
        for _ in range(1000):  # until there is something to judge
            made.replan([fast, fast, slow, slow, slow])
        found.append(made.plan.classes[0].tau)
    return found


def test_noise_changes_no_round_and_new_speeds_do() -> None:
    made = auto(average_sec=0.0005)
    made.start(made.make_plan(EIGHTH))
    first = made.plan.classes[0].tau
    noise = [(0.001 * f, 0.008 * g) for f, g in ((1.01, 1.0), (1.0, 1.01), (0.98, 0.97), (1.01, 1.0))]
    assert drive(made, noise) == [first] * 4
    assert drive(made, [(0.004, 0.032)])[-1] <= first / 2, "an average is little of such long steps"
    assert drive(made, [(0.001, 0.008)])[-1] > first / 2


def test_an_average_that_was_measured_too_long_makes_shorter_rounds_later() -> None:
    made = auto(average_sec=0.002)
    made.start(made.make_plan(EIGHTH))
    first = made.plan.classes[0].tau
    for _ in range(6):
        made.note_average(0.0002)
    assert drive(made, [(0.001, 0.008)])[-1] <= first / 2
    given = auto(**{"train.tau": 8})
    given.note_average(1.0)
    assert given.average_sec == 0


def test_rounds_are_saved_with_the_time_of_an_average() -> None:
    made, again = auto(average_sec=0.001), auto()
    made.start(made.make_plan(EIGHTH))
    again.start(made.plan)
    again.load_state_dict(made.state_dict())
    assert again.make_plan(EIGHTH) == made.plan
