"""Which samples each device class trains on in an epoch: the loss table and the schemes. Pure numpy.

Source: the biased local SGD paper, section 4.2 (separate sampling) and appendix A.2 (uniform, unified). Everything is
done by numpy, without a Python loop over samples.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_hetero.cluster.hardware import usable_cores
from hvd_hetero.config.schema import SamplingConfig
from hvd_hetero.planning.weighted_sampling import IMPORTANCE, INFOBATCH, INFOBATCH_UNTIL, importance, pruned, resampled

Indices = NDArray[np.integer[Any]]
Losses = NDArray[np.float32]
Mask = NDArray[np.bool_]
Choose = Callable[[np.random.Generator, Losses, int], Mask]
WORTH_A_THREAD = 1_000_000
"""Samples, of which drawing an epoch takes tens of milliseconds."""
BUCKETS, WHOLE, BLOCK = 256, 1 << 21, 1 << 19
"""One for each value of a byte; up to so many indices are shuffled as they are, more are dealt in blocks of so many."""
PART = 1 << 16
"""Of many losses, at least so many say where the threshold of the highest ones lies."""


class Sampler:
    """Draws the index plan of an epoch and keeps the last known loss of every sample; lives on rank 0.

    Args:
        samples: n, size of the training set.
        scheme: one of :data:`SCHEMES`.
        high_loss_ratio: p, the share of the biased class's samples that are those of the highest losses.
        biased: name of the class that gets them.
        until: share of the run from which on sampling is uniform; with ``anneal`` p falls linearly to 0 until then.
        block: of the samples that are drawn, those whose numbers lie in one block of so many follow one another.
        soft: draw high losses by their rank, see :func:`_softly`, and not the very highest.
        smoothing: share of a sample's former loss that is kept.
        prune_ratio: of :func:`~hvd_hetero.planning.weighted_sampling.pruned`.
        sample_weights: ``[n]``, those of the data; None: all samples weigh the same.
        seed: of the draws; the same seed and the same losses give the same draws.

    Attributes:
        biased: name of the class that gets the hard samples.
        losses: ``[n]`` training loss of each sample when it was last trained on, +inf if it never was.
        fraction_done: of the run; to be set before each draw.
        weights: ``[n]`` of the samples in this epoch, from :meth:`prepare` on.
    """

    def __init__(
        self, samples: int, scheme: str, high_loss_ratio: float, biased: str, seed: int, *,
        until: float = 1.0, anneal: bool = False, soft: bool = False, smoothing: float = 0.0, prune_ratio: float = 0.5,
        sample_weights: Losses | None = None, block: int = 1,
    ) -> None:  # fmt: skip
        self.losses: Losses = np.full(samples, np.inf, dtype=np.float32)
        self._draw = SCHEMES[scheme]
        self._ratio, self._until, self._anneal, self._smoothing = high_loss_ratio, until, anneal, smoothing
        self._choose, self._block = _softly if soft else _highest, block
        self.biased, self.fraction_done = biased, 0.0
        self._scheme, self._prune_ratio = scheme, prune_ratio
        self._sample_weights = np.ones(samples, dtype=np.float32) if sample_weights is None else sample_weights
        self.weights = self._sample_weights
        self._pool: Mask | None = None
        self._resamples = False
        self._rng = np.random.default_rng(seed)
        self._thread: ThreadPoolExecutor | None = None
        self._begun: tuple[dict[str, int], Any, Future[tuple[dict[str, Indices], Any]]] | None = None

    @classmethod
    def of(
        cls, spec: SamplingConfig, samples: int, biased: str, seed: int, sample_weights: Losses | None = None
    ) -> Sampler:
        """Make the sampler that a configuration asks for."""
        return cls(
            samples, str(spec.scheme), spec.high_loss_ratio, biased, seed, until=spec.until, anneal=spec.anneal,
            soft=spec.selection == "soft", smoothing=spec.smoothing, prune_ratio=spec.prune_ratio,
            sample_weights=sample_weights, block=spec.block,
        )  # fmt: skip

    def prepare(self, least: int) -> int:
        """Choose which samples the next epoch draws from, and their weights, where the scheme goes by weights.

        Args:
            least: samples that the epoch needs; with fewer than these nothing is left out.

        Returns:
            How many the epoch draws from.
        """
        self._pool, self.weights = None, self._sample_weights
        self._resamples = self._scheme == IMPORTANCE and self.fraction_done < self._until
        if self._scheme == INFOBATCH and self.fraction_done < min(self._until, INFOBATCH_UNTIL):
            pool, is_kept = pruned(self._rng, self.losses, self._prune_ratio)
            if np.count_nonzero(pool) >= least:
                self._pool, self.weights = pool, self._sample_weights * is_kept
        elif self._resamples:
            weights = 1 / (len(self.losses) * importance(self.losses))
            self.weights = (self._sample_weights * weights).astype(np.float32)
        return len(self.losses) if self._pool is None else int(np.count_nonzero(self._pool))

    def draw(self, counts: Mapping[str, int]) -> dict[str, Indices]:
        """Draws N_g sample indices for every class, in random order, none twice within a class.

        Args:
            counts: N_g by class name; each at most n.

        Returns:
            ``[N_g]`` indices by class name. Any even cut of them deals the class's samples evenly to its ranks.
        """
        begun, self._begun = self._begun, None
        if begun is not None and begun[:2] == (dict(counts), self._rng.bit_generator.state):
            drawn, self._rng.bit_generator.state = begun[2].result()
        elif self._resamples:
            drawn = resampled(self._rng, importance(self.losses), counts)
        elif self._pool is not None:
            drawn = _deal(self._rng, self._pool, counts)
        else:
            draw = _uniform if self.fraction_done >= self._until else self._draw
            drawn = draw(self._rng, self.losses, counts, self.biased, self.ratio, self._choose)
        return {name: self._by_block(drawn[name]) for name in counts}

    def _by_block(self, drawn: Indices) -> Indices:
        """The indices block by block: blocks in random order, and within each as they were drawn."""
        if self._block == 1:
            return drawn
        place = self._rng.permutation(-(-len(self.losses) // self._block))
        return drawn[np.argsort(place[drawn // self._block], kind="stable")]

    def draw_rest(
        self, used: Mapping[str, Indices], left: Mapping[str, Indices], counts: Mapping[str, int]
    ) -> dict[str, Indices]:
        """Draw the rest of an epoch for other counts: what a class has left, and others where it lacks any.

        Args:
            used: of the epoch so far, by class; ``left``: what was dealt to the class and not used.
            counts: samples of the rest, by class.

        Returns:
            ``[counts]`` indices by class, in random order, none twice within a class in the whole epoch.
        """
        if self._resamples:
            return resampled(self._rng, importance(self.losses), counts)
        kept = {name: left[name][:count] for name, count in counts.items()}
        drawn: dict[str, Indices] = {}
        for name, count in counts.items():
            apart = self._draw is _separate and self.fraction_done < self._until
            taken = np.zeros(len(self.losses), dtype=bool) if self._pool is None else ~self._pool
            for other in (name,) if apart else counts:
                for part in (used[other], kept[other], drawn.get(other, kept[other])):
                    taken[part] = True
            more = _places(_some(self._rng, ~taken, count - len(kept[name])))
            drawn[name] = self._by_block(_permuted(self._rng, np.concatenate([kept[name], more])))
        return drawn

    @property
    def ratio(self) -> float:
        """p as it is now."""
        return self._ratio * (max(0.0, 1 - self.fraction_done / self._until) if self._anneal else 1.0)

    def begin(self, counts: Mapping[str, int]) -> None:
        """Begins to draw the next epoch in a thread, where the scheme does not go by losses, and n makes it worth it.

        The draws stay the same ones, also if the next epoch turns out to be another one, or the job is saved meanwhile.
        """
        if self._scheme != "uniform" or len(self.losses) < WORTH_A_THREAD:
            return
        rng, counts = copy.deepcopy(self._rng), dict(counts)

        def draw() -> tuple[dict[str, Indices], Any]:
            return _uniform(rng, self.losses, counts, self.biased, 0.0), rng.bit_generator.state

        self._thread = self._thread or ThreadPoolExecutor(1, "hvd_hetero.sampling")
        self._begun = (counts, self._rng.bit_generator.state, self._thread.submit(draw))

    def record(self, indices: Indices, losses: Losses) -> None:
        """Enters losses in the order in which they were computed: of several for one sample the last one stays.

        Args:
            indices: ``[K]`` sample indices, ordered by (round, step, rank).
            losses: ``[K]`` their losses. NaN counts as +inf: a sample whose loss blew up is a hard one. -inf: the
                sample did not count, keeps the loss that it had, and is none of the hard ones if it never had one.
        """
        counted = ~np.isneginf(losses)
        if not counted.all():
            without = indices[~counted]
            self.losses[without] = np.where(np.isposinf(self.losses[without]), -np.inf, self.losses[without])
            indices, losses = indices[counted], losses[counted]
        if self._smoothing:
            former = self.losses[indices]
            mixed = self._smoothing * former + (1 - self._smoothing) * losses
            losses = np.where(np.isfinite(former) & np.isfinite(losses), mixed, losses)
        # numpy assigns repeated indices one after the other, so the newest loss is the one left behind
        self.losses[indices] = np.where(np.isnan(losses), np.float32(np.inf), losses)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "rng": self._rng.bit_generator.state, "biased": self.biased,
                "share": self.fraction_done, "weights": self.weights, "pool": self._pool,
                "resamples": self._resamples}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses = np.asarray(state["losses"], dtype=np.float32)
        self._rng.bit_generator.state = state["rng"]
        self.biased, self.fraction_done = state.get("biased", self.biased), state.get("share", self.fraction_done)
        self.weights, self._pool = state.get("weights", self.weights), state.get("pool")
        self._resamples = state.get("resamples", False)


def newest_last(at: Sequence[NDArray[Any]], batch: Sequence[int]) -> NDArray[Any]:
    """The order (round, step, rank) of what ranks worked on, where each took steps as it could.

    Args:
        at: ``[steps]`` by rank, the round of each of its steps, ascending.
        batch: B, samples of a step, by rank.

    Returns:
        ``[K]``, places in the samples of all ranks put one after the other.
    """
    rounds, steps, ranks = [], [], []
    for rank, mine in enumerate(at):
        within = np.arange(len(mine)) - np.searchsorted(mine, mine)
        rounds.append(np.repeat(mine, batch[rank]))
        steps.append(np.repeat(within, batch[rank]))
        ranks.append(np.full(len(mine) * batch[rank], rank))
    return np.lexsort([np.concatenate(keys) for keys in (ranks, steps, rounds)])


def _permuted(rng: np.random.Generator, items: Indices) -> Indices:
    """The items in random order, each order as likely.

    Many are dealt to buckets at random first, which then are shuffled one by one (Rao, 1961; Sandelius, 1962): what is
    worked on stays in the core's cache, where a shuffle of everything would wait for memory at each step.
    """
    if len(items) <= WHOLE:
        return rng.permutation(items)
    blocks = [items[begin : begin + BLOCK] for begin in range(0, len(items), BLOCK)]
    # a generator each, so that the order does not depend on how many threads there are
    rngs = [np.random.default_rng(seed) for seed in rng.integers(1 << 63, size=len(blocks) + BUCKETS)]
    shuffled = np.empty_like(items)
    with ThreadPoolExecutor(_threads(), "hvd_hetero.shuffle") as threads:
        dealt = list(threads.map(_dealt, rngs[:-BUCKETS], blocks))
        ends = np.cumsum([sum(len(parts[i]) for parts in dealt) for i in range(BUCKETS)])

        def shuffle(bucket: int) -> None:
            place = shuffled[ends[bucket - 1] if bucket else 0 : ends[bucket]]
            np.concatenate([parts[bucket] for parts in dealt], out=place)
            rngs[len(blocks) + bucket].shuffle(place)

        list(threads.map(shuffle, range(BUCKETS)))
    return shuffled


def _threads() -> int:
    """One for each core that the process may use; in the background, where the rank trains meanwhile, one."""
    return usable_cores() if threading.current_thread() is threading.main_thread() else 1


def _dealt(rng: np.random.Generator, items: Indices) -> list[Indices]:
    """The items in as many parts as there are buckets, each item in any of them with the same chance."""
    byte = np.frombuffer(rng.bytes(len(items)), np.uint8)
    order = np.argsort(byte, kind="stable")  # of bytes: a radix sort, one pass
    return np.split(items[order], np.cumsum(np.bincount(byte, minlength=BUCKETS))[:-1])


def _places(marked: Mask) -> Indices:
    """Where something is marked, ascending; in 32 bits where they hold it. In blocks, as numpy's are of 64 bits."""
    dtype = np.int32 if len(marked) <= np.iinfo(np.int32).max else np.int64
    places, end = np.empty(np.count_nonzero(marked), dtype=dtype), 0
    for begin in range(0, len(marked), BLOCK):
        found = np.flatnonzero(marked[begin : begin + BLOCK])
        np.add(found, begin, out=places[end : end + len(found)], casting="same_kind")
        end += len(found)
    return places


def _some(rng: np.random.Generator, among: Mask, count: int) -> Mask:
    """Marks ``count`` of those that are marked, any with the same chance.

    Each gets a random byte, and the lowest bytes win; of the last byte that wins, as many as it takes. A few are drawn
    as they are.
    """
    candidates = int(np.count_nonzero(among))
    if count == candidates:
        return among
    if candidates * BUCKETS < len(among):  # too few for that to be worth it
        chosen = np.zeros(len(among), dtype=bool)
        chosen[rng.permutation(_places(among))[:count]] = True
        return chosen
    byte = np.frombuffer(rng.bytes(len(among)), np.uint8)
    last = min(count * BUCKETS // candidates, BUCKETS - 1)  # bytes are as good as equally often: a step off at most
    while last and np.count_nonzero(among & (byte < last)) >= count:
        last -= 1
    while np.count_nonzero(among & (byte <= last)) < count:
        last += 1
    chosen = among & (byte < last)
    undecided = _permuted(rng, _places(among & (byte == last)))
    chosen[undecided[: count - np.count_nonzero(chosen)]] = True
    return chosen


def _smallest(losses: Losses, place: int) -> np.float32:
    """The loss that would be at this place if they were sorted.

    Of many, only those are looked at between which it lies by what a part of them says, if it does lie there.
    """
    if len(losses) > WHOLE:
        part = np.sort(losses[:: len(losses) // PART])
        near = len(part) * place // len(losses)
        spread = 4 * math.isqrt(len(part))  # 8 standard deviations at least
        low = part[near - spread] if near >= spread else -np.inf
        high = part[near + spread] if near + spread < len(part) else np.inf
        between = losses[(losses >= low) & (losses <= high)]
        within = place - int(np.count_nonzero(losses < low))
        if 0 <= within < len(between):
            between.partition(within)
            return np.float32(between[within])
    return np.float32(np.partition(losses, place)[place])


def _highest(rng: np.random.Generator, losses: Losses, count: int) -> Mask:
    """Marks the ``count`` samples of highest loss; ties are broken at random."""
    if count == 0:
        return np.zeros(len(losses), dtype=bool)
    threshold = _smallest(losses, len(losses) - count)
    above = losses > threshold
    above |= _some(rng, losses == threshold, count - int(np.count_nonzero(above)))
    return above


def _softly(rng: np.random.Generator, losses: Losses, count: int) -> Mask:
    """Draw ``count`` samples without replacement, each in proportion to ((r + 1/2) / n)^(n / count - 1), r its rank.

    The probability of Composer's selective backpropagation; the draw is that of Efraimidis and Spirakis (2006).
    """
    n, chosen = len(losses), np.zeros(len(losses), dtype=bool)
    if count in (0, n):
        return np.full(n, count == n)
    order = np.lexsort((rng.random(n), losses))  # ties at random
    log_weight = (n / count - 1) * np.log((np.arange(n) + 0.5) / n)
    keys = np.log(-np.log(rng.random(n))) - log_weight  # the smallest are drawn
    chosen[order[np.argpartition(keys, count)[:count]]] = True
    return chosen


def _biased_draw(rng: np.random.Generator, losses: Losses, total: int, ratio: float, choose: Choose) -> Mask:
    """floor(p N) samples of the highest losses, the rest of N uniformly from the others."""
    count = math.floor(ratio * total + 1e-9)  # 0.29 * 100 is a little less than 29 in floating point
    hard = choose(rng, losses, count)
    hard |= _some(rng, ~hard, total - count)
    return hard


def _uniform(
    rng: np.random.Generator, losses: Losses, counts: Mapping[str, int], biased: str, ratio: float,
    choose: Choose = _highest,
) -> dict[str, Indices]:  # fmt: skip
    """One joint permutation, dealt to the classes without replacement; losses do not matter."""
    return _deal(rng, np.ones(len(losses), dtype=bool), counts)


def _separate(
    rng: np.random.Generator, losses: Losses, counts: Mapping[str, int], biased: str, ratio: float,
    choose: Choose = _highest,
) -> dict[str, Indices]:  # fmt: skip
    """The biased class gets hard samples; every other class draws from all samples, independently of it."""
    drawn: dict[str, Indices] = {}
    for name, count in counts.items():
        pool = _biased_draw(rng, losses, count, ratio, choose) if name == biased else np.ones(len(losses), dtype=bool)
        drawn |= _deal(rng, pool, {name: count})
    return drawn


def _unified(
    rng: np.random.Generator, losses: Losses, counts: Mapping[str, int], biased: str, ratio: float,
    choose: Choose = _highest,
) -> dict[str, Indices]:  # fmt: skip
    """The biased class draws first; the others draw without replacement from what is left."""
    first = _biased_draw(rng, losses, counts[biased], ratio, choose)
    others = {name: count for name, count in counts.items() if name != biased}
    return _deal(rng, first, {biased: counts[biased]}) | _deal(rng, ~first, others)


def _deal(rng: np.random.Generator, among: Mask, counts: Mapping[str, int]) -> dict[str, Indices]:
    """Deals those that are marked, in random order, none twice."""
    ends = np.cumsum(list(counts.values()))
    order = _permuted(rng, _places(_some(rng, among, sum(counts.values()))))
    return {name: order[end - count : end] for (name, count), end in zip(counts.items(), ends, strict=True)}


Scheme = Callable[[np.random.Generator, Losses, Mapping[str, int], str, float, Choose], dict[str, Indices]]
SCHEMES: dict[str, Scheme] = {
    "separate": _separate, "uniform": _uniform, "unified": _unified, INFOBATCH: _uniform, IMPORTANCE: _uniform,
}  # fmt: skip
"""The last two draw as ``uniform`` does where they are not prepared for, and when they have ended."""
