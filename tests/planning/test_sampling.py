"""Which samples each class trains on: properties of every scheme, frequencies, and the loss table."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_hetero.planning.sampling import SCHEMES, Sampler, _some

FAST, SLOW, THIRD = "quick", "slow", "third"


@st.composite
def drawings(draw: Any) -> tuple[int, str, float, dict[str, int], np.ndarray, int]:
    """n, scheme, p, counts of one to three classes that fit into n together, losses with ties and inf, seed."""
    n = draw(st.integers(1, 60))
    first = draw(st.integers(0, n))
    second = draw(st.integers(0, n - first))
    counts = {SLOW: second, FAST: first, THIRD: draw(st.integers(0, n - first - second))}
    losses = draw(st.lists(st.sampled_from([0.0, 0.5, 0.5, 1.0, 2.5, 7.0, math.inf]), min_size=n, max_size=n))
    ratio = draw(st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.9, 1.0]) | st.floats(0, 1))
    scheme = draw(st.sampled_from(sorted(SCHEMES)))
    return n, scheme, ratio, counts, np.array(losses, np.float32), draw(st.integers(0, 1000))


def sampler(scheme: str, ratio: float, losses: Any, seed: int = 0, biased: str = FAST) -> Sampler:
    made = Sampler(len(losses), scheme, ratio, biased, seed)
    made.losses[:] = losses
    return made


# ---- every scheme ---------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(drawings())
def test_what_every_drawing_keeps_to(case: tuple[int, str, float, dict[str, int], np.ndarray, int]) -> None:
    """Exact counts, nothing twice within a class, and what each scheme promises beyond that."""
    n, scheme, ratio, counts, losses, seed = case
    drawn = sampler(scheme, ratio, losses, seed).draw(counts)
    assert list(drawn) == list(counts)
    for name, count in counts.items():
        assert len(drawn[name]) == count
        assert len(set(drawn[name].tolist())) == count
        assert set(drawn[name].tolist()) <= set(range(n))
    if scheme in ("separate", "unified"):
        high = math.floor(ratio * counts[FAST] + 1e-9)
        wanted = sorted(losses, reverse=True)[:high]
        got = sorted(losses[drawn[FAST]], reverse=True)[:high]
        assert got == wanted, "the floor(p N) highest losses are in"
    if scheme != "separate":
        together = np.concatenate(list(drawn.values())).tolist()
        assert len(set(together)) == len(together), "no sample goes to two classes"
    again = sampler(scheme, ratio, losses, seed).draw(counts)
    assert all((drawn[name] == again[name]).all() for name in counts), "the same seed, the same drawing"


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_seeds_and_epochs_differ(scheme: str) -> None:
    counts = {FAST: 40, SLOW: 20}
    one, other = sampler(scheme, 0.5, np.zeros(100), 1), sampler(scheme, 0.5, np.zeros(100), 2)
    drawings = [one.draw(counts), one.draw(counts), other.draw(counts)]
    for name in counts:
        texts = {drawing[name].tobytes() for drawing in drawings}
        assert len(texts) == 3


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_a_class_may_take_everything(scheme: str) -> None:
    drawn = sampler(scheme, 0.5, np.arange(10.0)).draw({FAST: 10, SLOW: 0})
    assert sorted(drawn[FAST].tolist()) == list(range(10)) and len(drawn[SLOW]) == 0


@pytest.mark.parametrize("scheme", ["separate", "unified"])
@pytest.mark.parametrize(("ratio", "total", "high"), [
    (0.0, 50, 0), (1.0, 50, 50), (0.29, 100, 29), (0.5, 7, 3), (0.999, 10, 9), (0.1, 9, 0),
])
def test_how_many_are_of_the_highest_losses(scheme: str, ratio: float, total: int, high: int) -> None:
    """floor(p N), although 0.29 * 100 is 28.999999999999996; the rest come from anywhere else."""
    losses = np.random.default_rng(0).permutation(10_000).astype(np.float32)
    drawn = sampler(scheme, ratio, losses).draw({FAST: total})[FAST]
    assert int((losses[drawn] >= 10_000 - high).sum()) == high
    assert 10_000 - high - 1 not in losses[drawn], "one more would be no floor (by chance it is in once in 100 seeds)"


def test_p_of_one_draws_the_hardest_and_no_others() -> None:
    losses = np.random.default_rng(1).permutation(100).astype(np.float32)
    assert set(losses[sampler("separate", 1.0, losses).draw({FAST: 30})[FAST]]) == set(range(70, 100))


def test_the_bias_goes_where_it_is_sent() -> None:
    losses = np.arange(100.0)
    drawn = sampler("separate", 1.0, losses, biased=SLOW).draw({FAST: 30, SLOW: 20})
    assert sorted(drawn[SLOW]) == list(range(80, 100))
    assert sorted(drawn[FAST]) != list(range(70, 100))


def test_small_indices_travel_as_int32() -> None:
    assert sampler("uniform", 0.5, np.zeros(5)).draw({FAST: 5})[FAST].dtype == np.int32


# ---- frequencies ----------------------------------------------------------------------------------------------------

DRAWS = 3000


def frequencies(scheme: str, ratio: float, losses: np.ndarray, counts: dict[str, int], name: str) -> np.ndarray:
    """How often each sample came to a class in many drawings of one seed."""
    made = sampler(scheme, ratio, losses, seed=5)
    seen = np.zeros(len(losses))
    for _ in range(DRAWS):
        seen[made.draw(counts)[name]] += 1
    return seen


def assert_uniform(seen: np.ndarray, chance: float) -> None:
    """Within five standard deviations everywhere."""
    five = 5 * math.sqrt(DRAWS * chance * (1 - chance))
    assert np.abs(seen - DRAWS * chance).max() <= five


def test_the_rest_of_the_biased_class_is_uniform() -> None:
    """4 of 8 are the hardest; the others come from the other 16 alike, easy ones no less than harder ones."""
    losses = np.random.default_rng(2).permutation(20).astype(np.float32)
    seen = frequencies("separate", 0.5, losses, {FAST: 8, SLOW: 5}, FAST)
    assert (seen[losses >= 16] == DRAWS).all()
    assert_uniform(seen[losses < 16], 4 / 16)


def test_separate_leaves_the_other_classes_unbiased() -> None:
    seen = frequencies("separate", 1.0, np.arange(20.0), {FAST: 8, SLOW: 5, THIRD: 3}, SLOW)
    assert_uniform(seen, 5 / 20)


def test_unified_gives_the_others_what_is_left() -> None:
    seen = frequencies("unified", 1.0, np.arange(20.0), {SLOW: 5, FAST: 8, THIRD: 3}, SLOW)
    assert (seen[12:] == 0).all()
    assert_uniform(seen[:12], 5 / 12)


def test_uniform_does_not_look_at_losses() -> None:
    for name, count in (counts := {SLOW: 5, FAST: 8}).items():
        assert_uniform(frequencies("uniform", 1.0, np.arange(20.0), counts, name), count / 20)


def test_ties_are_broken_evenly() -> None:
    """Two of the hardest are wanted, and five samples share that loss."""
    losses = np.array([1, 9, 9, 0, 9, 9, 9, 2], np.float32)
    seen = frequencies("separate", 1.0, losses, {FAST: 2}, FAST)
    assert (seen[losses < 9] == 0).all()
    assert_uniform(seen[losses == 9], 2 / 5)


def test_at_first_every_sample_is_as_hard() -> None:
    assert np.isposinf(Sampler(8, "separate", 1.0, FAST, 0).losses).all()
    assert_uniform(frequencies("separate", 0.5, np.full(20, np.inf), {FAST: 8}, FAST), 8 / 20)


class Tied(np.random.Generator):
    """Draws that tie: all bytes are the same."""

    def bytes(self, length: int) -> bytes:
        return b"x" * length


def test_ties_of_random_bytes_are_broken_evenly() -> None:
    rng = Tied(np.random.PCG64(6))
    among = np.arange(12) != 3
    seen = np.sum([_some(rng, among, 4) for _ in range(DRAWS)], axis=0)
    assert seen[3] == 0
    assert_uniform(np.delete(seen, 3), 4 / 11)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_a_class_comes_in_random_order(scheme: str) -> None:
    """Every sample that is drawn comes first as often as any other."""
    made = sampler(scheme, 0.5, np.zeros(10), seed=8)
    firsts = np.bincount([made.draw({FAST: 10})[FAST][0] for _ in range(DRAWS)], minlength=10)
    assert_uniform(firsts, 1 / 10)


@pytest.mark.parametrize("scheme", ["separate", "unified"])
def test_hard_samples_are_dealt_evenly(scheme: str) -> None:
    """Every position holds one of the hardest as often, so that any cut into ranks is even."""
    losses = np.arange(30.0)
    made = sampler(scheme, 0.5, losses, seed=3)
    at = np.zeros(12)
    for _ in range(DRAWS):
        at += losses[made.draw({FAST: 12})[FAST]] >= 24
    assert_uniform(at, 6 / 12)


# ---- the loss table -------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 6), st.floats(width=32)), max_size=60))
def test_the_newest_loss_stays(entries: list[tuple[int, float]]) -> None:
    made = Sampler(7, "separate", 0.5, FAST, 0)
    without = {index for index, loss in entries if loss == -math.inf}  # it did not count
    expected = [-math.inf if index in without else math.inf for index in range(7)]
    for index, loss in entries:
        if loss != -math.inf:
            expected[index] = math.inf if math.isnan(loss) else loss
    made.record(np.array([i for i, _ in entries], np.int32), np.array([x for _, x in entries], np.float32))
    assert made.losses.tolist() == expected


def test_a_newer_lower_loss_replaces_a_higher_one_and_the_other_way_round() -> None:
    made = Sampler(3, "separate", 1.0, FAST, 0)
    made.record(np.array([0, 1, 2]), np.array([5.0, 1.0, 3.0], np.float32))
    made.record(np.array([0, 1]), np.array([0.5, 4.0], np.float32))
    assert made.losses.tolist() == [0.5, 4.0, 3.0]
    assert made.draw({FAST: 1})[FAST].tolist() == [1]


def test_a_sample_that_does_not_count_keeps_its_loss_and_is_none_of_the_hard_ones() -> None:
    made = Sampler(6, "separate", 1.0, FAST, 0)
    made.record(np.array([0, 1]), np.array([0.5, 0.75], np.float32))
    made.record(np.array([2, 1, 3, 0, 3]), np.array([-np.inf, 0.25, 2.0, -np.inf, -np.inf], np.float32))
    assert made.losses.tolist() == [0.5, 0.25, -np.inf, 2.0, np.inf, np.inf]
    assert set(made.draw({FAST: 5})[FAST].tolist()) == {0, 1, 3, 4, 5}
    made.record(np.array([2]), np.array([0.125], np.float32))
    assert made.losses[2] == 0.125


def test_a_loss_that_blew_up_is_a_hard_sample() -> None:
    made = Sampler(3, "separate", 1.0, FAST, 0)
    made.record(np.array([0, 1, 2]), np.array([5.0, np.nan, 1e30], np.float32))
    assert made.draw({FAST: 1})[FAST].tolist() == [1]


def test_state_continues_the_drawing() -> None:
    counts = {FAST: 8, SLOW: 5}
    one = sampler("separate", 0.5, np.arange(20.0), seed=4)
    one.draw(counts)
    saved = one.state_dict()
    saved = {"losses": saved["losses"].copy(), "rng": saved["rng"]}
    other = Sampler(20, "separate", 0.5, FAST, seed=99)
    other.load_state_dict(saved)
    assert all((a == b).all() for a, b in zip(one.draw(counts).values(), other.draw(counts).values(), strict=True))
    assert (other.losses == one.losses).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_epoch_drawn_in_the_background_is_the_one_that_would_have_been_drawn(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if another one is wanted in the end, or the state was saved before."""
    monkeypatch.setattr("hvd_hetero.planning.sampling.WORTH_A_THREAD", 1)
    courses = []
    for ahead in (False, True):
        one, drawn = Sampler(50, scheme, 0.5, FAST, seed=3), []
        for slow in (20, 20, 10, 10):
            drawn.append(one.draw({FAST: 30, SLOW: slow}))
            if ahead:
                one.begin({FAST: 30, SLOW: slow})
                assert (one._begun is not None) == (scheme == "uniform")
            if slow == 10:
                saved, one = one.state_dict(), Sampler(50, scheme, 0.5, FAST, seed=4)
                one.load_state_dict(saved)
        courses.append(drawn)
    for plain, ahead_of_it in zip(*courses, strict=True):
        assert all((plain[name] == ahead_of_it[name]).all() for name in plain)


# ---- the rest of an epoch, dealt anew -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["separate", "uniform", "unified"])
@pytest.mark.parametrize("rest", [{"fast": 40, "slow": 20}, {"fast": 50, "slow": 5}, {"fast": 10, "slow": 50}])
def test_the_rest_of_an_epoch_for_other_counts(scheme: str, rest: dict[str, int]) -> None:
    """Of 100 samples the classes have used 30 and 10 of 80 and 20."""
    sampler = Sampler(100, scheme, 0.5, "fast", 3)
    sampler.losses[:] = np.arange(100)
    drawn = sampler.draw({"fast": 80, "slow": 20})
    taken = {"fast": 30, "slow": 10}
    used = {name: drawn[name][:count] for name, count in taken.items()}
    left = {name: drawn[name][count:] for name, count in taken.items()}
    found = sampler.draw_rest(used, left, rest)
    whole = {name: np.concatenate([used[name], found[name]]) for name in rest}
    for name, count in rest.items():
        assert len(found[name]) == count and len(set(whole[name])) == len(whole[name]), "none twice within a class"
        own = len(set(found[name]) & set(left[name]))
        assert own == min(count, len(left[name])) or scheme == "separate", "its own first"
    if scheme != "separate":
        assert not set(whole["fast"]) & set(whole["slow"])


def test_the_rest_is_in_random_order() -> None:
    """What a class had left does not come before what it is given."""
    sampler = Sampler(1000, "uniform", 0.5, "fast", 3)
    drawn = sampler.draw({"fast": 500, "slow": 100})
    left = {"fast": drawn["fast"][:100], "slow": drawn["slow"]}
    found = sampler.draw_rest({name: drawn[name][:0] for name in drawn}, left, {"fast": 300, "slow": 100})["fast"]
    own = np.isin(found, left["fast"])
    assert 20 <= np.count_nonzero(own[:100]) <= 50
