"""Simulate rounds on unequal ranks by discrete events. Pure (numpy alone; no torch, no Horovod).

**A rank's work.** A local step takes ``step_sec`` on average; ``jitter`` is the standard deviation of one step over its
mean. Steps are independent, so tau of them are drawn as one number, with the mean and the variance of their sum:
exact for ``normal`` (cut off at 0), nearly so for ``lognormal``; ``none`` draws nothing at all.

**A collective** takes ``comm_sec``, from when the last rank is there: see hvd_hetero/analysis/predict/link.py.

**Rounds.** In blocking ones everybody waits for the slowest; what follows is arithmetic on arrays. Partial ones
(docs/partial.md) go by an event queue: steps that end, rounds that end, patience that ends. A rank's time is
compute, blocked or comm, booked as the trainer books it, without a rest.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hvd_hetero.algorithms.policy import MAJORITY, SOLO
from hvd_hetero.algorithms.server_rule import Rule
from hvd_hetero.planning.quorum import ROUNDING, Quorum

NONE, NORMAL, LOGNORMAL = "none", "normal", "lognormal"
DISTRIBUTIONS = (NONE, NORMAL, LOGNORMAL)
BLOCK = 65536
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """Ranks that do the same; groups of one name are reported as one class.

    Attributes:
        step_sec: mean seconds of a local step.
        tau: local steps in a round; 0: it only takes part in the collectives.
        jitter: standard deviation of a step over its mean.
        joins: whether it takes part in the collectives; if not, it waits all the time.
    """

    name: str
    ranks: int
    step_sec: float
    tau: int = 1
    jitter: float = 0.0
    joins: bool = True


@dataclass(frozen=True)
class Spent:
    """Seconds of a class by kind, its local steps, and those of them that were dropped; means over its ranks."""

    compute: float
    blocked: float
    comm: float
    steps: float
    dropped: float = 0.0

    @property
    def blocked_share(self) -> float:
        total = self.compute + self.blocked + self.comm
        return self.blocked / total if total else 0.0


@dataclass(frozen=True)
class Outcome:
    """The result of a simulation.

    Attributes:
        rounds: collectives that were made, or updates of a server's model.
        pushes: to a server, by each rank on average; ``sent_bytes``, where ranks meet in groups.
    """

    seconds: float
    rounds: int
    classes: dict[str, Spent]
    pushes: float = 0.0
    sent_bytes: float = 0.0


def blocking(
    groups: Sequence[Group], rounds: int, comm_sec: float, rng: np.random.Generator, distribution: str = LOGNORMAL
) -> Outcome:
    """Simulate rounds in which all ranks wait for the slowest one, then take part in the collective."""
    work = [draw_works(g, rounds, rng, distribution) for g in groups]
    return in_step(groups, work, comm_sec, [np.zeros(g.ranks) for g in groups])


def in_step(groups: Sequence[Group], work: Sequence[Floats], comm_sec: float, dropped: Sequence[Floats]) -> Outcome:
    """Let all wait for the slowest, by the seconds that they compute, ``[rounds, ranks]``."""
    last, rounds = np.max([w.max(axis=1) for w in work], axis=0), len(work[0])
    seconds = float(last.sum()) + rounds * comm_sec
    spent = []
    for g, w, lost in zip(groups, work, dropped, strict=True):
        compute, comm = w.sum(axis=0), np.full(g.ranks, rounds * comm_sec * g.joins)
        blocked = np.maximum(0.0, seconds - compute - comm)
        spent.append((compute, blocked, comm, np.full(g.ranks, float(rounds * g.tau)), lost))
    return Outcome(seconds, rounds, _by_name(groups, spent))


def split_steps(g: Group, count: int) -> Group:
    """Return ranks whose steps are parts of these ranks' steps."""
    return replace(g, step_sec=g.step_sec / count, jitter=g.jitter * math.sqrt(count))


def draw_works(g: Group, rounds: int, rng: np.random.Generator, distribution: str) -> Floats:
    """Draw seconds of computing, ``[rounds, ranks]``."""
    mean, spread = g.tau * g.step_sec, _spread(g, distribution)
    z = rng.standard_normal((rounds, g.ranks)) if spread else np.zeros((rounds, g.ranks))
    factors = 1 + spread * z if distribution == NORMAL else np.exp(spread * z - spread**2 / 2)
    return np.maximum(0.0, mean * factors)


def _spread(g: Group, distribution: str) -> float:
    """Return the deviation of a round's work over its mean; of its logarithm, where that is normal."""
    assert distribution in DISTRIBUTIONS
    relative = 0.0 if distribution == NONE or not g.tau else g.jitter / math.sqrt(g.tau)
    return math.sqrt(math.log1p(relative**2)) if distribution == LOGNORMAL else relative


def _by_name(groups: Sequence[Group], spent: Sequence[tuple[Floats, ...]]) -> dict[str, Spent]:
    """Average over the ranks of each class, of the fields of :class:`Spent` by rank."""
    found = {}
    for name in dict.fromkeys(g.name for g in groups):
        mine = [arrays for g, arrays in zip(groups, spent, strict=True) if g.name == name]
        found[name] = Spent(*(float(np.concatenate(column).mean()) for column in zip(*mine, strict=True)))
    return found


def partial(
    groups: Sequence[Group], comm_sec: float, rng: np.random.Generator, *, mode: str = SOLO, by_class: bool = False,
    rounds: int | None = None, contributions: int | None = None, sync_every: int = 32, max_lag: int = 32,
    patience_sec: float = math.inf, distribution: str = LOGNORMAL, quorum: Quorum | None = None,
    drops_late: bool = False, micro_batches: int = 1,
) -> Outcome:  # fmt: skip
    """Simulate rounds that the first rank that is ready starts, as in docs/partial.md, without the ends of epochs.

    Args:
        mode: ``solo`` or ``majority``; or a ``quorum`` is given, of ranks that contribute step by step where models are
            averaged.
        by_class: a group arrives as a whole (averages of models), not each rank by itself (gradients).
        rounds: it ends when all ranks of a group have contributed so many times; or
        contributions: when all ranks together have.
        drops_late: what is late for its round is dropped.
        micro_batches: parts of a step that are contributed one by one, of gradients.
    """
    assert mode in (SOLO, MAJORITY) and (rounds is None) != (contributions is None)
    assert all(g.tau and g.joins for g in groups)
    if by_step := quorum is not None and by_class:
        rounds, through = (rounds or 0) * max(g.tau for g in groups), [g.tau for g in groups]
        groups = [replace(g, tau=1) for g in groups]
    elif micro_batches > 1:
        through = [micro_batches] * len(groups)
        groups = [split_steps(g, micro_batches) for g in groups]
    run = _Partial(groups, comm_sec, rng, mode, by_class, sync_every, max_lag, patience_sec, distribution)
    run.quorum, run.drops_late = quorum, drops_late
    if by_step or micro_batches > 1:
        run.through = through
    now = run.until(rounds or math.inf, (contributions or math.inf) * micro_batches)
    spent = np.array([run.compute, run.blocked, run.comm, run.count, run.dropped], dtype=np.float64)
    tau = np.repeat([g.tau for g in groups], [g.ranks for g in groups])
    spent[3:] *= [tau / micro_batches, tau]
    return outcome_of(groups, now, run.completed, spent)


def served(
    groups: Sequence[Group], rule: Rule, exchange_sec: float, rng: np.random.Generator, *, pushes: int,
    distribution: str = LOGNORMAL,
) -> Outcome:  # fmt: skip
    """Simulate ranks that push to a server when they are ready, and go on when they have its answer.

    Args:
        rule: what becomes of a push; called in the order in which the server gets to them.
        exchange_sec: of a push and its answer; the server makes one after another.
        pushes: with so many it ends.
    """
    rule.step = lambda direction, factor: None
    group = [g for g in groups for _ in range(g.ranks)]
    spent = np.zeros((5, len(group)))  # by the fields of Spent
    compute, blocked, comm, steps, dropped = spent
    step_distributions = {id(g): (g.tau * g.step_sec, _spread(g, distribution)) for g in groups}
    queue: list[tuple[float, int, int, float]] = []

    def begin(rank: int, now: float) -> None:
        mean, spread = step_distributions[id(group[rank])]
        sec = mean * draw_factor(rng.standard_normal(), spread, distribution) if spread else mean
        compute[rank] += sec
        heapq.heappush(queue, (now + sec, 1, rank, now))

    for rank in range(len(group)):
        begin(rank, 0.0)
    free = now = 0.0
    count = 0
    while count < pushes:
        now, is_ready, rank, _ = heapq.heappop(queue)
        if is_ready:
            free = max(free, now) + exchange_sec
            blocked[rank] += free - exchange_sec - now
            comm[rank] += exchange_sec
            heapq.heappush(queue, (free, 0, rank, now))
            continue
        count += 1
        steps[rank] += group[rank].tau
        dropped[rank] += 0 if rule.arrive(rank, 0.0) else group[rank].tau
        begin(rank, now)
    for until, is_ready, rank, since in queue:  # what has not come to its end
        if is_ready:
            compute[rank] -= until - max(since, now)
        else:
            over = until - now
            comm[rank] -= min(over, exchange_sec)
            blocked[rank] -= max(0.0, over - exchange_sec)
    return outcome_of(groups, now, rule.version, spent, count / len(group))


def outcome_of(
    groups: Sequence[Group], seconds: float, rounds: int, spent: Sequence[Floats] | Floats, pushes: float = 0.0,
    sent_bytes: float = 0.0,
) -> Outcome:  # fmt: skip
    """Return an outcome, from the fields of :class:`Spent` by rank, in the order of the groups."""
    ends = np.cumsum([g.ranks for g in groups])[:-1]
    by_group = [tuple(columns) for columns in zip(*(np.split(row, ends) for row in spent), strict=True)]
    return Outcome(seconds, rounds, _by_name(groups, by_group), pushes, sent_bytes)


def draw_factor(z: float, spread: float, distribution: str) -> float:
    """Return what a step takes over its mean, from a standard normal number."""
    return max(0.0, 1 + spread * z) if distribution == NORMAL else math.exp(spread * z - spread**2 / 2)


ROUND, STEP, PATIENCE = 0, 1, 2
"""What ends; at one moment, results come before those who would take them."""


class _Partial:
    """The event queue of partial rounds.

    Attributes:
        completed: rounds that have ended, and ``started`` those that have begun: one more at most.
        taken: by rank, rounds whose result it has had, and ``count``, what it has contributed.
        compute: seconds by rank, as ``blocked`` and ``comm``.
        dropped: contributions that were, by rank.
        through: by group, after how many contributions to a round a rank is there; None: after each, and then it waits.
    """

    quorum: Quorum | None = None
    drops_late = False
    through: Sequence[int] | None = None

    def __init__(
        self, groups: Sequence[Group], comm_sec: float, rng: np.random.Generator, mode: str, by_class: bool,
        sync_every: int, max_lag: int, patience_sec: float, distribution: str,
    ) -> None:
        self._comm_sec, self._rng, self._mode, self._distribution = comm_sec, rng, mode, distribution
        self._sync_every, self._max_lag, self._patience_sec = sync_every, max_lag, patience_sec
        self._size = size = sum(g.ranks for g in groups)
        self._group = [i for i, g in enumerate(groups) for _ in range(g.ranks)]
        self._group_size = [g.ranks for g in groups]
        self._unit = self._group if by_class else list(range(size))
        self._unit_size = self._group_size if by_class else [1] * size
        self._distribution_of = [(g.tau * g.step_sec, _spread(g, distribution)) for g in groups]
        self.taken, self.count, self.dropped, self._since = [0] * size, [0] * size, [0] * size, [0] * size
        self.compute, self.blocked, self.comm = [0.0] * size, [0.0] * size, [0.0] * size
        self._began = [0.0] * size
        self._waiting: dict[int, float] = {}  # since when
        self._contributed: dict[int, int] = {}  # contributions that no round has taken yet
        self._arrived: set[int] = set()
        self._there, self._there_weight = Counter[int](), 0.0
        self._missing: set[int] = set()
        self.completed, self.started, self._started_at, self._least_taken = 0, 0, 0.0, 0
        self._normals: list[float] = []
        self._queue: list[tuple[float, int, int]] = []
        self._draw_initiator()
        for rank in range(size):
            self._begin(rank, 0.0)

    def until(self, rounds: float, contributions: float) -> float:
        """Run until a group, or all ranks together, have made n contributions; return the time."""
        behind, total = [size * rounds for size in self._group_size], 0
        while True:
            now, what, rank = heapq.heappop(self._queue)
            if what == ROUND:
                self._round_ended(now)
            elif what == PATIENCE:
                self._patience_ended(rank, now)
            else:
                behind[self._group[rank]] -= self.count[rank] < rounds
                total += 1
                self._step_ended(rank, now)
                if total >= contributions or behind[self._group[rank]] <= 0:
                    break
        for rank in range(self._size):
            if rank in self._waiting:
                self.blocked[rank] += now - self._waiting[rank]
            else:
                self.compute[rank] += now - self._began[rank]
        return now

    def _step_ended(self, rank: int, now: float) -> None:
        self.compute[rank] += now - self._began[rank]
        self._began[rank] = now
        self.count[rank] += 1
        self._since[rank] += 1
        if self.drops_late and self.taken[rank] != self.started:
            self.dropped[rank] += 1
        else:
            self._contributed[rank] = self._contributed.get(rank, 0) + 1
        is_there = self.through is None or self._since[rank] >= self.through[self._group[rank]]
        if is_there and self.quorum is None:
            self._since[rank] = 0
        if is_there and self.taken[rank] == self.started and rank not in self._arrived:
            self._arrived.add(rank)
            self._there[self._unit[rank]] += 1
            self._there_weight += 0.0 if self.quorum is None else self.quorum.weights[rank]
            self._start_if_ready(self._unit[rank], now)
        if self.completed > self.taken[rank]:
            self._take(rank)
            self._begin(rank, now)
        elif self.through is not None and (self.taken[rank] == self.started or (self.quorum is None and not is_there)):
            self._begin(rank, now)  # models go on until a round begins, micro-batches until they are a batch
        else:
            self._waiting[rank] = now
            if self._patience_sec < math.inf:
                heapq.heappush(self._queue, (now + self._patience_sec, PATIENCE, rank))
        if rank in self._missing:
            self._join_late(rank, now)

    def _start_if_ready(self, unit: int, now: float) -> None:
        """Start the next round if the unit that has just gained a rank is complete, and may start it."""
        if self.quorum is not None:
            if self._there_weight < self.quorum.needed * (1 - ROUNDING):
                return
        elif self._there[unit] < self._unit_size[unit] or (self._mode == MAJORITY and unit != self._initiator):
            return
        number, self.started, self._started_at = self.started, self.started + 1, now
        self._arrived.clear()
        self._there.clear()
        self._there_weight = 0.0
        self._draw_initiator()
        if number - self._least_taken >= self._max_lag:
            self._least_taken = min(self.taken)
            self._missing |= {r for r, taken in enumerate(self.taken) if number - taken >= self._max_lag}
        if (number + 1) % self._sync_every == 0:
            self._missing |= {r for r in range(self._size) if r not in self._contributed}
        self._contributed = {r: n for r, n in self._contributed.items() if r in self._missing} if self._missing else {}
        self._go_if_complete(now)

    def _join_late(self, rank: int, now: float) -> None:
        if self.started - 1 - self.taken[rank] < self._max_lag:
            self._contributed.pop(rank, None)  # what it has made may have been dropped
            self._missing.remove(rank)
            self._go_if_complete(now)

    def _go_if_complete(self, now: float) -> None:
        if not self._missing:
            heapq.heappush(self._queue, (now + self._comm_sec, ROUND, -1))

    def _round_ended(self, now: float) -> None:
        self.completed += 1
        waiting, self._waiting = self._waiting, {}
        for rank, since in waiting.items():
            start = max(since, self._started_at)
            self.blocked[rank] += start - since
            self.comm[rank] += now - start
            self._take(rank)
            self._begin(rank, now)

    def _take(self, rank: int) -> None:
        self.taken[rank] = self.completed
        if self.quorum is not None:
            self._since[rank] = 0

    def _patience_ended(self, rank: int, now: float) -> None:
        # one that has gone on, and waits again by now, has a later end of its own
        over = rank in self._waiting and now - self._waiting[rank] >= self._patience_sec * (1 - 1e-9)
        if over and self._contributed.get(rank, 0) < self._max_lag:
            self.blocked[rank] += now - self._waiting.pop(rank)
            self._begin(rank, now)

    def _begin(self, rank: int, now: float) -> None:
        mean, spread = self._distribution_of[self._group[rank]]
        self._began[rank] = now
        heapq.heappush(self._queue, (now + mean * self._factor(spread), STEP, rank))

    def _factor(self, spread: float) -> float:
        if not spread:
            return 1.0
        if not self._normals:
            self._normals = self._rng.standard_normal(BLOCK).tolist()
        z = self._normals.pop()
        return draw_factor(z, spread, self._distribution)

    def _draw_initiator(self) -> None:
        self._initiator = self._unit[int(self._rng.integers(self._size))]
