"""Simulate DropCompute: rounds of which ranks leave out the parts that they have no time for. Pure (numpy)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hvd_hetero.analysis.predict.simulator import LOGNORMAL, Floats, Group, Outcome, draw_works, in_step, split_steps
from hvd_hetero.planning.compute_threshold import taken


def dropping(
    groups: Sequence[Group], rounds: int, comm_sec: float, rng: np.random.Generator, distribution: str = LOGNORMAL, *,
    micro_batches: Sequence[int], threshold: Callable[[Sequence[Floats], float], float | None],
) -> Outcome:  # fmt: skip
    """Simulate rounds in lockstep, of which a rank begins no part after a threshold.

    Args:
        micro_batches: of a round, by group: its local steps, or the micro-batches of its one step.
        threshold: is given by rank when its parts end, ``[rounds, M]``, and what a round takes; None: no limit.
    """
    single = [replace(g, tau=1) if count == g.tau else split_steps(g, count)
              for g, count in zip(groups, micro_batches, strict=True)]  # fmt: skip
    ended = [np.cumsum(draw_works(g, rounds * count, rng, distribution).reshape(rounds, count, g.ranks), axis=1)
             for g, count in zip(single, micro_batches, strict=True)]  # fmt: skip
    ranks = [end[:, :, rank] for g, end in zip(groups, ended, strict=True) if g.tau for rank in range(g.ranks)]
    step_sec = float(np.mean(np.max([of_rank[:, -1] for of_rank in ranks], axis=0))) + comm_sec
    limit = threshold(ranks, step_sec)
    kept = [np.stack([taken(end[:, :, rank], math.inf if limit is None else limit) for rank in range(g.ranks)], axis=2)
            for g, end in zip(groups, ended, strict=True)]  # fmt: skip
    work = [np.where(mine, end, 0.0).max(axis=1) for mine, end in zip(kept, ended, strict=True)]
    left_out = [g.tau * (rounds - mine.mean(axis=1).sum(axis=0)) for g, mine in zip(groups, kept, strict=True)]
    return in_step(groups, work, comm_sec, left_out)
