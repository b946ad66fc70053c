"""Micro-batches: the gradient of a batch's mean loss, accumulated part by part, so that less is in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvd_hetero.data import Batch
from hvd_hetero.data.batch import Weighted, split_batch
from hvd_hetero.worker.losses import NOT_COUNTED, TINY, Numbers, joined, mean_gradient


def accumulate(
    batch: Batch, count: int, least: int, scale: float, losses_of: Callable[[Any, Any], Numbers],
    backward: Callable[[Tensor, Tensor], None], rescale: Callable[[Tensor], None],
    stop: Callable[[], bool] | None = None,
) -> Numbers:  # fmt: skip
    """Go forward and backward through the parts of a batch.

    The gradients add up to that of ``scale`` times the mean over all that counts in the batch. How much counts is known
    with the last part's losses: until then each sample counts once, and before the last backward pass, from which
    gradients may be sent, those that there are become what they should have been.

    Args:
        count: of parts, and ``least``, samples of one: a batch that has too few is cut into fewer parts.
        losses_of: one number a sample of inputs and targets.
        backward: adds the gradient of the losses ``[b]`` for their ``grad_output`` ``[b]`` to those that there are.
        rescale: multiplies them by a number.
        stop: asked between parts whether those that are left are to be left out; their gradient then counts as zero.

    Returns:
        Losses and weights ``[B]``. Samples that were left out do not count.
    """
    if count == 1:
        losses, weights = losses_of(*batch)
        grad_output = mean_gradient(losses, weights, scale)  # their mean's gradient, without the mean
        backward(losses, weight_grad(grad_output, batch[1]))
        return losses.detach(), weights
    size, chunks = split_batch(batch, count, least)
    each, counted, results = scale / size, torch.zeros((), dtype=torch.float32), list[Numbers]()
    samples = 0
    for chunk in chunks:
        if results and stop is not None and stop():
            break
        losses, weights = losses_of(*chunk)
        samples += len(losses)
        if weights is None:
            grad_output, counted = torch.full_like(losses, each), counted + len(losses)
        else:
            grad_output, counted = torch.where(weights > 0, each, 0.0).to(losses), counted.to(weights) + weights.sum()
        results.append((losses.detach(), weights))
        if len(results) == len(chunks) and (factor := _factor(results, samples, counted)) is not None:
            rescale(factor)
            grad_output = grad_output * factor
        backward(losses, weight_grad(grad_output, chunk[1]))
    if samples < size:
        if (factor := _factor(results, samples, counted)) is not None:
            rescale(factor)
        first = results[0][0]
        results.append((first.new_full((size - samples,), NOT_COUNTED), first.new_zeros(size - samples)))
    return joined(results)


def weight_grad(grad_output: Tensor, targets: Any) -> Tensor:
    """Return the ``grad_output`` of losses, where samples may have weights of their own."""
    return grad_output * targets.weights.to(grad_output) if isinstance(targets, Weighted) else grad_output


def _factor(results: list[Numbers], samples: int, counted: Tensor) -> Tensor | None:
    """Return what turns sums in which each sample counts once into sums in which each counts as much as it does."""
    if all(weights is None for _, weights in results):
        return None
    return torch.where(counted > 0, samples / counted.clamp(min=TINY), 0.0)
