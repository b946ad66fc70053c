"""Schemes whose samples carry weights, by which they stay unbiased: InfoBatch and importance sampling. Pure numpy.

A sample of weight w counts w times in the gradient of its batch, which stays a mean over the batch's samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float32]
INFOBATCH, IMPORTANCE = "infobatch", "importance"
INFOBATCH_UNTIL = 0.875
"""Share of a run after which InfoBatch trains on everything."""
UNIFORM_SHARE = 0.2
"""Share of the draws of importance sampling that losses do not decide; no weight is above its inverse."""


def pruned(rng: np.random.Generator, losses: Losses, ratio: float) -> tuple[NDArray[np.bool_], Losses]:
    """Choose the samples of an epoch as InfoBatch does: of those of a loss below the mean, some are left out.

    Source: Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning" (ICLR 2024). Of the
    samples below the mean floor((1 - r) count) stay, and weigh 1 / (1 - r). Samples not seen yet are never below it.

    Args:
        losses: ``[n]``, +inf for samples not seen yet.
        ratio: r, the share of the samples below the mean that is left out.

    Returns:
        ``[n]``, which samples stay; and ``[n]``, their weights.
    """
    known = losses[np.isfinite(losses)]
    below = np.flatnonzero(losses < known.mean(dtype=np.float64)) if len(known) else np.empty(0, dtype=int)
    out = rng.permutation(below)[math.floor((1 - ratio) * len(below)) :]
    kept, weights = np.ones(len(losses), dtype=bool), np.ones(len(losses), dtype=np.float32)
    kept[out], weights[below] = False, 1 / (1 - ratio)
    return kept, weights


def importance(losses: Losses) -> NDArray[np.float64]:
    """Return the probability ``[n]`` of each sample: that of its gradient's bound, and a share that is uniform.

    Source: Katharopoulos and Fleuret, "Not All Samples Are Created Equal" (ICML 2018): the norm of a sample's gradient
    is bounded by that of its loss's gradient in the last layer's outputs, |softmax - onehot|. With a cross-entropy loss
    l, p(true class) = exp(-l), and that norm lies between 1 - exp(-l) and sqrt 2 times it. So the table of losses is
    enough, and no forward pass over more samples than are trained on is needed. Samples not seen score highest.
    """
    score = np.clip(-np.expm1(-losses.astype(np.float64)), 0, None)
    score = score / score.sum() if score.any() else np.full(len(losses), 1 / len(losses))
    return (1 - UNIFORM_SHARE) * score + UNIFORM_SHARE / len(losses)


def resampled(
    rng: np.random.Generator, probability: NDArray[np.float64], counts: Mapping[str, int]
) -> dict[str, NDArray[Any]]:
    """Draw N_g samples for each class with replacement: of all N draws, floor or ceil of N p_i are of sample i."""
    total, ends = sum(counts.values()), np.cumsum(list(counts.values()))
    sums = np.cumsum(probability)
    places = (np.arange(total) + rng.random()) / total * sums[-1]
    drawn = rng.permutation(np.minimum(np.searchsorted(sums, places, side="right"), len(probability) - 1))
    return {name: drawn[end - count : end] for (name, count), end in zip(counts.items(), ends, strict=True)}
