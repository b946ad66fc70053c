"""``hvd_hetero.Loop`` beyond its example: what counts as a step of an emulated slow rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.horovod

BUSY_SEC, STEP_SEC, SLOWDOWN = 64, 0.5, 1000
PROGRAM = f"""
import torch
import hvd_hetero
from hvd_hetero.telemetry import emulation, stopwatch

class Clock:
    now = slept = 0.0

    def thread_time(self):
        return self.now

    def perf_counter(self):
        return self.slept

    def sleep(self, seconds):
        self.slept += seconds

clock = emulation.time = stopwatch.time = Clock()
settings = {{"cluster.classes": {{"slow": {{"ranks": [0], "slowdown": {SLOWDOWN}, "threads": 1}}}},
             "train.tau": {{"slow": 2}}, "train.batch_size": 4, "train.epochs": 1}}
loop = hvd_hetero.Loop(torch.nn.Linear(3, 2), (torch.randn(16, 3), torch.zeros(16, dtype=torch.long)), settings)
steps = 0
for round in loop:
    clock.now += {BUSY_SEC}
    for inputs, targets in round:
        losses = torch.nn.functional.cross_entropy(loop.model(inputs), targets, reduction="none")
        losses.mean().backward()
        clock.now += {STEP_SEC}
        round.losses(losses)
        steps += 1
loop.close()
print(steps, clock.slept)
"""


def test_what_a_program_does_between_rounds_is_not_stretched(tmp_path: Path) -> None:
    """Only its steps are."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    steps, slept = done.stdout.split()[-2:]
    assert steps == "4"
    assert float(slept) == 4 * STEP_SEC * (SLOWDOWN - 1)


WEIGHTS = """
import torch
import hvd_hetero
from hvd_hetero.errors import UserError

inputs, targets = torch.randn(16, 3), torch.arange(16) % 2
settings = {"cluster.classes": {"only": {"ranks": [0]}}, "train.tau": {"only": 2}, "train.batch_size": 4,
            "train.epochs": 1}
loop = hvd_hetero.Loop(torch.nn.Linear(3, 2), (inputs, targets), settings)
for round in loop:
    for x, y in round:
        losses = torch.nn.functional.cross_entropy(loop.model(x), y, reduction="none")
        for wrong in (losses[:3], losses.mean(), None):
            try:
                round.losses(wrong)
            except UserError as error:
                print(error)
        round.losses(losses, y == 1)
print((loop._feed.sampler.losses == -float("inf")).tolist() == (targets == 0).tolist())
loop.close()
"""


def test_losses_that_are_not_one_a_sample_are_refused_and_some_do_not_count(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WEIGHTS], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    *refused, last = [line for line in done.stdout.splitlines() if line.startswith("round.losses") or line == "True"]
    assert last == "True"
    said = [line.partition("; ")[0] for line in refused[:3]]
    assert said == ["round.losses=[3] float32: is not per sample: a batch of 4 gives [3]",
                    "round.losses=[] float32: is not per sample: a batch of 4 gives []",
                    "round.losses=None: is not per sample: a batch of 4 gives NoneType"]  # fmt: skip
