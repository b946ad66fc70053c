"""What is left of an epoch is dealt anew, and goes on, also from a checkpoint."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hvd_hetero.data import TensorSource
from hvd_hetero.planning.plan import ClassPlan, Plan
from hvd_hetero.worker.epoch import Epoch, Progress, Segment


def plan(fast: int, slow: int, rounds: int) -> Plan:
    return Plan((ClassPlan("fast", (0,), fast, 2, 0.5), ClassPlan("slow", (1,), slow, 2, 0.5)), rounds)


def noisy(batch: Tensor, generator: torch.Generator) -> Tensor:
    return batch + torch.rand(len(batch), generator=generator)


SOURCE = TensorSource(torch.arange(100.0), torch.arange(100), noisy)


def worked(epoch: Epoch, rounds: int, tau: int) -> list[Any]:
    """The batches of so many rounds."""
    segment = Segment(epoch, rounds)
    batches, found = segment.batches(), []
    for number in range(rounds):
        found += [next(batches) for _ in range(tau)]
        segment.record(tau, number)
    epoch.add(segment, replace(epoch.finish(segment, tau), averages=rounds))
    return found


def test_an_epoch_goes_on_by_another_plan_on_other_samples() -> None:
    epoch = Epoch(plan(4, 1, 10), np.arange(80).reshape(40, 2), SOURCE, torch.Generator().manual_seed(0))
    worked(epoch, 3, 4)
    assert epoch.spent == (12, 30) and epoch.rounds_done == 3
    epoch.deal_rest(plan(6, 3, 2), np.arange(24).reshape(12, 2))
    assert (epoch.rounds_left, epoch.plan.rounds, epoch.since) == (2, 5, 3)
    assert epoch.spent == (12, 30) and epoch.rounds_done == pytest.approx(2), "12 steps are 2 rounds of 6"
    batches = worked(epoch, 2, 6)
    assert [row.tolist() for _, row in batches] == np.arange(24).reshape(12, 2).tolist()
    assert epoch.spent == (24, 30 + 2 * 18) and epoch.rounds_left == 0
    rows, at = epoch.results()
    assert rows.tolist() == [*np.arange(24).reshape(12, 2).tolist(), *np.arange(24).reshape(12, 2).tolist()]
    assert at.tolist() == [*np.repeat([0, 1, 2], 4)] + [*np.repeat([3, 4], 6)]
    assert epoch.progress == Progress(5, 5, 0, 5)


def test_it_is_saved() -> None:
    """Saved and loaded within the rest, it draws the same augmentation."""
    generator = torch.Generator().manual_seed(0)
    epoch = Epoch(plan(4, 1, 10), np.arange(80).reshape(40, 2), SOURCE, generator)
    worked(epoch, 3, 4)
    epoch.deal_rest(plan(6, 3, 4), np.arange(48).reshape(24, 2))
    worked(epoch, 1, 6)
    state, position = deepcopy(epoch.state_dict()), generator.get_state()
    expected = worked(epoch, 2, 6)
    again = torch.Generator()
    again.set_state(position)
    resumed = Epoch.from_state(state, SOURCE, again)
    assert (resumed.spent, resumed.since, resumed.rounds_left) == ((18, 30 + 18), 3, 3)
    for (inputs, targets), (other_inputs, other_targets) in zip(expected, worked(resumed, 2, 6), strict=True):
        assert torch.equal(targets, other_targets) and torch.equal(inputs, other_inputs)
