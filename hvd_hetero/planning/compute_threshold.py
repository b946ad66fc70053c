"""The seconds after which ranks leave out the micro-batches of a step that are left. Pure (numpy alone)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CANDIDATES = 200
MARGIN = 0.02
"""Gain in micro-batches per second below which none is worth leaving out."""


def best_threshold(
    ended: Sequence[NDArray[np.float64]], step_sec: float, max_dropped: float = 1.0
) -> tuple[float, float, float] | None:  # fmt: skip
    """Choose the threshold with the most micro-batches per second (DropCompute, "automatic" threshold).

    Of each candidate tau, over all steps::

        gain = mean over steps of (1 - dropped) / (1 - cut / (longest + overhead)) - 1

    with ``longest`` the latest end of a micro-batch in the step, ``cut`` by how much earlier the latest one ends that
    is not left out, ``dropped`` the share of those that are, and ``overhead`` what a step takes beyond ``longest``, on
    average. The published rule has no candidate "off", and picks a threshold that costs time where no rank varies: here
    one has to be worth :data:`MARGIN`. A micro-batch that has begun is finished, as the ranks do it.

    Args:
        ended: by rank, seconds from a step's begin to the end of each micro-batch, ``[steps, M]``; M may differ.
        step_sec: mean seconds of a whole step, with communication.
        max_dropped: the share of micro-batches that may be left out.

    Returns:
        tau, its gain, and the share of micro-batches that it leaves out; None: leave none out.
    """
    times = np.concatenate(ended, axis=1)
    longest = times.max(axis=1)
    overhead = max(0.0, step_sec - float(longest.mean()))
    best = None
    for tau in np.linspace(min(float(of_rank[:, 0].min()) for of_rank in ended), float(times.max()), CANDIDATES):
        kept = np.concatenate([taken(of_rank, tau) for of_rank in ended], axis=1)
        last = np.where(kept, times, 0.0).max(axis=1)
        dropped = 1 - kept.mean(axis=1)
        gain = float(np.mean((1 - dropped) * (longest + overhead) / (last + overhead) - 1))
        if float(dropped.mean()) <= max_dropped and gain > MARGIN and (best is None or gain > best[1]):
            best = float(tau), gain, float(dropped.mean())
    return best


def taken(ended: NDArray[np.float64], tau: float) -> NDArray[np.bool_]:
    """Tell which micro-batches a rank takes, ``[steps, M]``: those that begin before tau, and its first."""
    began = np.concatenate([np.zeros((len(ended), 1)), ended[:, :-1]], axis=1)
    kept = began <= tau
    kept[:, 0] = True
    return kept
