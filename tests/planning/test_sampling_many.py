"""Drawing where there are many samples: buckets, blocks, threads, thresholds. What counts as many is set to a few."""

from __future__ import annotations

import numpy as np
import pytest
from test_sampling import DRAWS, FAST, SLOW, assert_uniform, sampler

from hvd_hetero.planning.sampling import BUCKETS, SCHEMES, _permuted, _smallest, _some


@pytest.fixture(autouse=True)
def all_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_hetero.planning.sampling.WHOLE", 0)
    monkeypatch.setattr("hvd_hetero.planning.sampling.BLOCK", 300)


def test_so_many_that_they_are_dealt_to_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tenth of the samples comes to each tenth of the places as often, however many threads there are."""
    rng = np.random.default_rng(7)
    table, draws = np.zeros((10, 10), dtype=int), 60
    for _ in range(draws):
        order = _permuted(rng, np.arange(1000))
        assert np.array_equal(np.sort(order), np.arange(1000))
        np.add.at(table, (np.arange(1000) // 100, order // 100), 1)
    assert np.abs(table - draws * 10).max() < 5 * (draws * 10) ** 0.5
    found = []
    for cores in ({0}, {0, 1, 2}):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: cores)
        found.append(_permuted(np.random.default_rng(9), np.arange(1000)))
    assert np.array_equal(*found)


def test_within_a_bucket_any_order_is_as_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    """All come to one bucket."""
    monkeypatch.setattr("hvd_hetero.planning.sampling.BUCKETS", 1)
    monkeypatch.setattr("hvd_hetero.planning.sampling._dealt", lambda rng, items: [items])
    rng = np.random.default_rng(6)
    firsts = np.bincount([_permuted(rng, np.arange(10))[0] for _ in range(DRAWS)], minlength=10)
    assert_uniform(firsts, 1 / 10)


def test_blocks_and_buckets_have_seeds_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, made, seeds = np.random.default_rng(6), np.random.default_rng, []

    def default_rng(seed: int) -> np.random.Generator:
        seeds.append(seed)
        return made(seed)

    monkeypatch.setattr("numpy.random.default_rng", default_rng)
    first, second = _permuted(rng, np.arange(1000)), _permuted(rng, np.arange(1000))
    assert len(seeds) == len(set(seeds)) == 2 * (4 + BUCKETS)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_classes_of_many(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_hetero.planning.sampling.PART", 64)
    drawn = sampler(scheme, 0.5, np.arange(1000.0), seed=8).draw({FAST: 600, SLOW: 300})
    assert [len(drawn[name]) for name in (FAST, SLOW)] == [600, 300]
    assert all(len(np.unique(indices)) == len(indices) for indices in drawn.values())
    if scheme in ("separate", "unified"):
        assert set(range(700, 1000)) <= set(drawn[FAST].tolist())


def test_a_few_of_a_few_among_many() -> None:
    """So few that no bytes are drawn for them."""
    rng, among = np.random.default_rng(6), np.zeros(3000, dtype=bool)
    among[[3, 500, 501, 2998, 2999]] = True
    seen = np.sum([_some(rng, among, 2) for _ in range(DRAWS)], axis=0)
    assert seen[~among].sum() == 0 and seen.sum() == 2 * DRAWS
    assert_uniform(seen[among], 2 / 5)


@pytest.mark.parametrize("place", [0, 1, 99_999, 150_000, 199_999])
@pytest.mark.parametrize("kind", ["random", "ties", "unknown", "misleading"])
def test_the_threshold_of_many_losses(kind: str, place: int) -> None:
    """It is the one that sorting would give, also if the part that is looked at says nothing of the others."""
    rng, n = np.random.default_rng(3), 200_000
    losses = {"random": rng.random(n), "ties": rng.integers(3, size=n), "unknown": np.full(n, np.inf),
              "misleading": np.where(np.arange(n) % (n >> 16) == 0, n, np.arange(n))}[kind].astype(np.float32)
    assert _smallest(losses, place) == np.sort(losses)[place]
