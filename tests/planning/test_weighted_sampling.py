"""InfoBatch and importance sampling: what is drawn, and the weights by which it stays unbiased."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hvd_hetero.planning.sampling import Sampler
from hvd_hetero.planning.weighted_sampling import UNIFORM_SHARE, importance, pruned, resampled

N, FAST = 1000, "fast"


def sampler(scheme: str, **options: Any) -> Sampler:
    """Half of the samples have the loss 0, the others 1."""
    made = Sampler(N, scheme, 0.5, FAST, 0, **options)
    made.losses[:] = np.arange(N) >= N // 2
    return made


def test_infobatch_leaves_out_half_of_the_easy_ones_and_doubles_the_others() -> None:
    kept, weights = pruned(np.random.default_rng(0), sampler("infobatch").losses, 0.5)
    assert np.count_nonzero(kept[: N // 2]) == N // 4 and kept[N // 2 :].all()
    assert set(weights[: N // 2]) == {2} and set(weights[N // 2 :]) == {1}
    assert (weights * kept).sum() == N, "nothing is lost"
    third, heavier = pruned(np.random.default_rng(0), sampler("infobatch").losses, 0.7)
    assert np.count_nonzero(third[: N // 2]) == 150 and heavier[0] == pytest.approx(1 / 0.3)


def test_infobatch_is_unbiased_over_its_choices() -> None:
    losses = np.random.default_rng(1).exponential(size=200).astype(np.float32)
    values = np.arange(200.0)
    found = [(values * w * k).sum() for k, w in (pruned(np.random.default_rng(s), losses, 0.5) for s in range(400))]
    assert np.mean(found) == pytest.approx(values.sum(), rel=0.02)


def test_infobatch_knows_nothing_of_samples_not_seen() -> None:
    losses = np.full(10, np.inf, dtype=np.float32)
    assert pruned(np.random.default_rng(0), losses, 0.5)[0].all(), "in the first epoch"
    losses[:6] = [0, 0, 0, 0, 9, 9]
    kept, weights = pruned(np.random.default_rng(0), losses, 0.5)
    assert np.count_nonzero(kept) == 8 and set(weights[4:]) == {1}


def test_an_epoch_of_infobatch() -> None:
    made = sampler("infobatch")
    assert made.prepare(least=10) == 750
    drawn = made.draw({FAST: 500, "slow": 250})
    both = np.concatenate([drawn[FAST], drawn["slow"]])
    assert len(set(both)) == 750 and made.weights[both].sum() == N
    used = {name: rows[:100] for name, rows in drawn.items()}
    left = {name: rows[100:] for name, rows in drawn.items()}
    rest = made.draw_rest(used, left, {FAST: 300, "slow": 250})
    assert set(np.concatenate([*rest.values(), *used.values()])) == set(both), "of those that the epoch draws from"


def test_infobatch_ends_and_leaves_a_round_its_samples() -> None:
    made = sampler("infobatch")
    assert made.prepare(least=751) == N and set(made.weights) == {1}
    made.fraction_done = 0.88
    assert made.prepare(least=10) == N and set(made.weights) == {1}
    made.fraction_done, made._until = 0.5, 0.4
    assert made.prepare(least=10) == N


def test_importance_goes_by_the_bound_of_the_gradient() -> None:
    losses = np.array([0, np.log(2), np.inf, -np.inf], dtype=np.float32)  # p(true) is 1, 1/2, 0; one did not count
    probability = importance(losses)
    expected = (1 - UNIFORM_SHARE) * np.array([0, 0.5, 1, 0]) / 1.5 + UNIFORM_SHARE / 4
    assert probability == pytest.approx(expected)
    assert importance(np.zeros(4, dtype=np.float32)) == pytest.approx(np.full(4, 0.25))


def test_importance_draws_as_often_as_it_says() -> None:
    losses = np.random.default_rng(0).exponential(size=50).astype(np.float32)
    probability = importance(losses)
    drawn = resampled(np.random.default_rng(1), probability, {FAST: 300, "slow": 100})
    assert [len(drawn[FAST]), len(drawn["slow"])] == [300, 100]
    counts = np.bincount(np.concatenate([*drawn.values()]), minlength=50)
    assert (np.abs(counts - 400 * probability) < 1).all()
    assert np.bincount(drawn["slow"], minlength=50).max() < counts.max(), "in random order"


def test_an_epoch_of_importance_sampling_is_unbiased() -> None:
    made = sampler("importance")
    assert made.prepare(least=10) == N
    drawn = np.concatenate([*made.draw({FAST: 600, "slow": 400}).values()])
    values = np.arange(N, dtype=np.float64)
    assert (made.weights[drawn] * values[drawn]).mean() == pytest.approx(values.mean(), rel=0.05)
    assert made.weights.max() <= 1 / UNIFORM_SHARE * (1 + 1e-6) and len(set(drawn)) < N
    made.fraction_done, made._until = 0.9, 0.8
    assert made.prepare(least=10) == N and set(made.weights) == {1}
    assert len(set(made.draw({FAST: N})[FAST])) == N, "uniform from then on"


@pytest.mark.parametrize("scheme", ["separate", "uniform", "infobatch", "importance"])
def test_weights_of_the_data_count_in_every_scheme(scheme: str) -> None:
    own = np.where(np.arange(N) % 2, 1.5, 0.5).astype(np.float32)
    plain, made = sampler(scheme), sampler(scheme, sample_weights=own)
    plain.prepare(10), made.prepare(10)
    assert made.weights == pytest.approx(plain.weights * own)


@pytest.mark.parametrize("scheme", ["infobatch", "importance"])
def test_an_epoch_is_saved(scheme: str) -> None:
    made, again = sampler(scheme), Sampler(N, scheme, 0.5, FAST, 9)
    made.fraction_done = 0.1
    made.prepare(10)
    made.draw({FAST: 300, "slow": 300})
    again.load_state_dict(made.state_dict())
    nothing = {FAST: np.arange(0), "slow": np.arange(0)}
    one, other = (s.draw_rest(nothing, nothing, {FAST: 200, "slow": 100}) for s in (made, again))
    assert all((one[name] == other[name]).all() for name in one) and (made.weights == again.weights).all()
