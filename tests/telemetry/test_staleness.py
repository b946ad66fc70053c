"""The accounts of partial collectives: how they are gathered, and what they say of an epoch and of a run."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_hetero.telemetry.staleness import (
    AGES,
    KINDS,
    Counts,
    PartialAccounts,
    to_numbers,
)

pytestmark = pytest.mark.horovod

TIMES = st.integers(0, 1000)
STALENESS = st.dictionaries(st.integers(0, 2 * AGES), st.integers(1, 100), max_size=6).map(Counter)
COUNTS = st.builds(Counts, TIMES, TIMES, TIMES, TIMES, STALENESS, TIMES, TIMES)
EPOCHS = st.integers(1, 4).flatmap(lambda ranks: st.lists(
    st.lists(COUNTS, min_size=ranks, max_size=ranks), min_size=1, max_size=4))


def test_counts_as_numbers() -> None:
    numbers = to_numbers(Counts(5, 4, 3, 2, Counter({0: 6, 2: 3, 64: 1, 65: 10, 1000: 100}), 7, 28)).tolist()
    assert numbers[:6] == [5, 4, 3, 2, 7, 28] and len(numbers) == len(KINDS) + AGES
    assert numbers[6:9] == [6, 0, 3] and numbers[-1] == 111, "what is older than the oldest counts there"
    assert sum(numbers[6:]) == 120


def test_a_rank_that_has_sent_nothing() -> None:
    accounts = PartialAccounts()
    shares = accounts.enter([to_numbers(Counts()), to_numbers(Counts())])
    assert shares == {"fresh": 0.0, "late": 0.0, "empty": 0.0, "mean_staleness": 0.0}
    assert accounts.to_dict() == {"ranks": [dict.fromkeys(KINDS, 0)] * 2, "staleness": [0]}


def test_shares_are_those_of_the_epoch_and_the_rest_adds_up() -> None:
    accounts = PartialAccounts()
    accounts.enter([to_numbers(Counts(10, 0, 0, 0, Counter({0: 10}))), to_numbers(Counts(0, 0, 10, 1))])
    shares = accounts.enter([
        to_numbers(Counts(6, 0, 0, 0, Counter({0: 6}))),
        to_numbers(Counts(1, 3, 2, 1, Counter({0: 1, 2: 2, 5: 1}), 4, 16)),
    ])
    assert shares == {"fresh": 7 / 12, "late": 3 / 12, "empty": 2 / 12, "mean_staleness": 9 / 10}
    assert accounts.to_dict() == {
        "ranks": [
            {"fresh": 16, "late": 0, "empty": 0, "waited_for": 0, "dropped": 0, "lost_samples": 0},
            {"fresh": 1, "late": 3, "empty": 12, "waited_for": 2, "dropped": 4, "lost_samples": 16},
        ],
        "staleness": [17, 0, 2, 0, 0, 1],
    }


@settings(max_examples=100, deadline=None)
@given(EPOCHS)
def test_nothing_is_lost_over_epochs(epochs: list[list[Counts]]) -> None:
    """Of every rank and kind, and of every age up to the oldest."""
    accounts = PartialAccounts()
    for found in epochs:
        shares = accounts.enter([to_numbers(counts) for counts in found])
        rounds = sum(c.fresh + c.late + c.empty for c in found)
        assert shares["fresh"] + shares["late"] + shares["empty"] == pytest.approx(1.0 if rounds else 0.0)
    whole = accounts.to_dict()
    for rank, kinds in enumerate(whole["ranks"]):
        assert kinds == {kind: sum(getattr(found[rank], kind) for found in epochs) for kind in KINDS}
    ages: Counter[int] = Counter()
    for found in epochs:
        for counts in found:
            for age, times in counts.staleness.items():
                ages[min(age, AGES - 1)] += times
    assert {age: times for age, times in enumerate(whole["staleness"]) if times} == dict(ages)
    assert len(whole["staleness"]) == max(ages, default=0) + 1, "it ends with the oldest"
