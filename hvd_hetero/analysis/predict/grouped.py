"""Simulate methods whose ranks meet in groups: each step by step, on its own clock. Pure (numpy).

A rank's clock goes on with what it computes, and with what it waits for: its group, or the first rank of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_hetero.algorithms.daso import DASO
from hvd_hetero.algorithms.grouped import Grouped
from hvd_hetero.algorithms.wagma_sgd import WAGMASGD
from hvd_hetero.analysis.predict.link import Link, sent_bytes
from hvd_hetero.analysis.predict.simulator import Floats, Group, Outcome, draw_works, outcome_of
from hvd_hetero.planning.groups import Partition


class _Clocks:
    """The ranks' clocks, by rank number, and what of them was spent on computing and on collectives."""

    def __init__(self, ranks: int, link: Link, nbytes: float) -> None:
        self.now, self.compute, self.comm, self.sent = (np.zeros(ranks) for _ in range(4))
        self._link, self._nbytes = link, nbytes

    def work(self, seconds: Floats) -> None:
        """Let every rank compute."""
        self.now = self.now + seconds
        self.compute += seconds

    def meet(self, partition: Partition) -> None:
        """Let all ranks of a group wait for its last, and add up."""
        for group in partition:
            ranks = list(group)
            sec = self.cost(len(group))
            self.now[ranks] = self.now[ranks].max() + sec
            self.spend(ranks, sec, len(group))

    def meet_all(self) -> None:
        """Let all ranks do so."""
        self.meet((tuple(range(self.now.size)),))

    def cost(self, ranks: int) -> float:
        """Return the seconds of a sum over so many ranks."""
        return self._link.sum_sec(ranks, self._nbytes)

    def spend(self, ranks: Any, seconds: Any, among: int) -> None:
        """Book what ranks spend on one sum over so many of them."""
        self.comm[ranks] += seconds
        self.sent[ranks] += sent_bytes(among, self._nbytes)


def simulate(
    policy: Grouped, groups: Sequence[Group], ranks: Sequence[int], rounds: int, link: Link, nbytes: float,
    rng: np.random.Generator, distribution: str,
) -> Outcome:  # fmt: skip
    """Simulate rounds of one step.

    Args:
        ranks: their numbers, in the order of the groups.
        nbytes: of a model.
    """
    order = np.argsort(ranks)
    work = np.concatenate([draw_works(g, rounds, rng, distribution) for g in groups], axis=1)[:, order]
    clocks = _Clocks(len(ranks), link, nbytes)
    if isinstance(policy, WAGMASGD):
        _wait_avoiding(policy, clocks, work)
    elif isinstance(policy, DASO):
        _apart(policy, clocks, work)
    else:
        for t, works in enumerate(work):
            clocks.work(works)
            clocks.meet(policy.partitions[t % len(policy.partitions)])
        clocks.meet_all()
    seconds = float(clocks.now.max())
    blocked = np.maximum(0.0, seconds - clocks.compute - clocks.comm)
    columns = (clocks.compute, blocked, clocks.comm, np.full(len(ranks), float(rounds)), np.zeros(len(ranks)))
    by_class = [column[list(ranks)] for column in columns]
    return outcome_of(groups, seconds, rounds, by_class, sent_bytes=float(clocks.sent.mean()))


def _wait_avoiding(policy: WAGMASGD, clocks: _Clocks, work: Floats) -> None:
    """Let the first rank of an iteration start its sums, and every tau-th time the last one."""
    everybody, ended = clocks.now.size, 0.0
    for t, seconds in enumerate(work):
        clocks.work(seconds)
        is_full = (t + 1) % policy.sync_every == 0 or t == len(work) - 1
        among = everybody if is_full else policy.group_size
        start = max(ended, float(clocks.now.max() if is_full else clocks.now.min()))
        ended = start + clocks.cost(among)
        clocks.spend(slice(None), np.clip(ended - clocks.now, 0.0, clocks.cost(among)), among)
        clocks.now = np.maximum(clocks.now, ended)


def _apart(policy: DASO, clocks: _Clocks, work: Floats) -> None:
    """Let hosts work on while a group's models travel; what they say to one another within a host takes as long."""
    cadence, last, place = policy.cadence, len(work) - 1, 0
    flight: tuple[int, list[int], float] | None = None
    for batch, seconds in enumerate(work):
        clocks.work(seconds)
        if cadence.averages_gradients(batch, last):
            clocks.meet(policy.local_groups)
        delay = cadence.delay(batch, last)
        if flight is not None and (delay is not None or batch >= flight[0]):
            _arrive(policy, clocks, *flight[1:])
            flight = None
        if batch == last:
            clocks.meet_all()
        elif delay is not None:
            group = list(policy.global_groups[place])
            place = (place + 1) % policy.group_size
            flight = batch + delay, group, float(clocks.now[group].max()) + clocks.cost(policy.hosts)
            if delay == 0:
                _arrive(policy, clocks, *flight[1:])
                flight = None


def _arrive(policy: DASO, clocks: _Clocks, group: list[int], ended: float) -> None:
    """Let a group wait for its sum, and each host for its rank of that group."""
    sec = clocks.cost(policy.hosts)
    clocks.spend(group, np.clip(ended - clocks.now[group], 0.0, sec), policy.hosts)
    clocks.now[group] = np.maximum(clocks.now[group], ended)
    clocks.meet(policy.local_groups)
