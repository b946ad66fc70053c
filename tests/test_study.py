"""scripts/bench/study: its steps are those of torch, its rounds those of the trainer's plan."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

STUDY = runpy.run_path(str(Path(__file__).resolve().parents[1] / "scripts" / "bench" / "study_run.py"))
Machine, Method, Run, Setting, Task, shape_of = (
    STUDY[name] for name in ("Machine", "Method", "Run", "Setting", "Task", "shape_of")
)


@pytest.fixture
def task() -> Any:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(96, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (96,), generator=generator)
    return Task(F.pad(images, (4,) * 4), labels, (images, labels), (images, labels), "cnn")


def test_a_step_is_that_of_torch(task: Any) -> None:
    machine = Machine(task, 8)
    machine.reset(3)
    torch.manual_seed(3)
    model = machine._build()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    machine.rows[:16] = torch.arange(16)
    machine.moves[:] = torch.tensor([4, 4, 0])  # the image itself
    machine.rates[:] = 0.01
    machine.at.zero_()
    for rows in torch.arange(16).split(8):
        machine.step()
        optimizer.zero_grad()
        each = F.cross_entropy(model(task.held_back[0][rows]), task.labels[rows], reduction="none")
        each.mean().backward()
        optimizer.step()
        torch.testing.assert_close(machine.losses[rows], each.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(machine.weights, torch.cat([p.detach().reshape(-1) for p in model.parameters()]),
                               rtol=1e-3, atol=1e-5)  # fmt: skip
    buffers = [b.reshape(-1) for b in model.buffers()]
    torch.testing.assert_close(machine.stats, torch.cat(buffers), rtol=1e-3, atol=1e-5)


def test_rounds_are_those_of_the_plan() -> None:
    at = Setting(fast=2, slow=2, speed=0.25, batch=32, budget=100)
    fast, _, slow, _ = shape_of(Method("local", 32), at, 10_000).ranks
    assert (fast.tau, slow.tau) == (32, 8) and fast.weight == fast.coefficient == pytest.approx(0.4)
    every = shape_of(Method("local", 4, "normalised"), at, 10_000).ranks
    assert [r.coefficient for r in every] == [pytest.approx(0.4)] * 4  # tau_max over all steps: 4 / 10
    assert shape_of(Method("sync"), at, 10_000).cost == 4 * shape_of(Method("dlb"), at, 10_000).cost
    assert shape_of(Method("dlb"), at, 10_000).batch == 80


def test_ranks_start_a_round_from_its_average_and_keep_their_momentum(task: Any) -> None:
    run = Run(task, Method("local", 2), Setting(1, 1, 0.5, 4, 2), 0.01, 0)
    machine = Machine(task, 4)
    for _ in run.advance(machine):
        pass
    found = machine.weights.clone()
    assert run.taken == 12 and len(run.curve) == 1
    rows, moves, rates = (tensor[:12].clone() for tensor in (machine.rows, machine.moves, machine.rates))
    averaged = torch.zeros_like(found)
    for first, steps, weight in ((0, 2, 2 / 3), (2, 1, 1 / 3)):
        machine.reset(0)
        machine.rows[: 4 * steps], machine.moves[: 4 * steps] = (
            rows[4 * first : 4 * (first + steps)],
            moves[4 * first :][: 4 * steps],
        )
        machine.rates[:steps] = rates[first : first + steps]
        machine.at.zero_()
        for _ in range(steps):
            machine.step()
        averaged += weight * machine.weights
    torch.testing.assert_close(found, averaged)
