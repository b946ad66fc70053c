"""Simulate delayed averages: each travels while the next round is worked on. Pure (numpy)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvd_hetero.analysis.predict.simulator import LOGNORMAL, Group, Outcome, draw_works, outcome_of


def delaying(
    groups: Sequence[Group], rounds: int, comm_sec: float, rng: np.random.Generator, distribution: str = LOGNORMAL, *,
    shares: Sequence[float],
) -> Outcome:  # fmt: skip
    """Simulate rounds whose average is taken in during the next one, and waited for if it is not there yet.

    Args:
        shares: of a round, by group, after which the average of the one before is taken in.
    """
    work = np.concatenate([draw_works(g, rounds, rng, distribution) for g in groups], axis=1)
    share = np.repeat(shares, [g.ranks for g in groups])
    ended, there = work[0], -np.inf  # of each rank's round, and of the last average
    compute, waited, comm = work.sum(axis=0), np.zeros(len(share)), 0.0
    for now in work[1:]:
        there = max(there, ended.max()) + comm_sec
        reached = ended + share * now
        wait = np.maximum(0.0, there - reached)
        comm += float(wait.min())  # as the trainer books it: the last rank there waits for the transfer alone
        waited += wait
        ended = reached + wait + (1 - share) * now
    seconds = float(ended.max()) + comm_sec
    waited += seconds - ended
    comm += comm_sec
    steps = np.repeat([float(rounds * g.tau) for g in groups], [g.ranks for g in groups])
    spent = [compute, waited - comm, np.full(len(share), comm), steps, np.zeros(len(share))]
    return outcome_of(groups, seconds, rounds, spent)
