"""DropCompute on one rank, by a clock that the model moves: what is sent of a batch that was not finished in time."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from method_helpers import method
from torch import nn

from hvd_hetero.algorithms.execution import compute_clock
from hvd_hetero.algorithms.execution.drop_compute import DropComputeExecutor
from hvd_hetero.cluster.device_classes import DeviceClass
from hvd_hetero.worker.factories import per_sample_loss
from hvd_hetero.worker.losses import NOT_COUNTED
from hvd_hetero.worker.worker import Worker

pytestmark = pytest.mark.horovod


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Net(nn.Linear):
    """Takes as long as the clock is told to."""

    def __init__(self, clock: Clock, seconds: list[float]) -> None:
        torch.manual_seed(0)
        super().__init__(3, 2, dtype=torch.float64)
        self.clock, self.seconds = clock, seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.now += self.seconds.pop(0) if self.seconds else 1.0
        return super().forward(x)


BATCH = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.arange(8) % 2


def run(monkeypatch: pytest.MonkeyPatch, steps: int, seconds: list[float], **options: Any) -> DropComputeExecutor:
    clock = Clock()
    monkeypatch.setattr(compute_clock, "time", clock)
    settings = {"algorithm.name": "drop_compute", "train.batch_size": 8, "train.micro_batches": 4,
                "algorithm.warmup_steps": 0, **{f"algorithm.{key}": value for key, value in options.items()}}
    policy: Any = method(settings, (DeviceClass("only", "cpu", (0,)),))
    policy.check()
    loss = per_sample_loss("cross_entropy", {})
    worker = Worker(Net(clock, seconds), loss, lambda params: torch.optim.SGD(params, lr=1.0), None, micro_batches=4)
    comm: Any = SimpleNamespace(
        rank=0, size=1, timed=nullcontext, weighted_sum_=lambda *args: None,
        gather=lambda tensor, *args, **more: [tensor], excluded=SimpleNamespace(stops=False),
    )
    made = DropComputeExecutor(policy)
    made.start(policy.make_plan(None), worker, comm)
    for _ in range(steps):
        made.run_round(iter([BATCH]))
    return made


def moved(made: DropComputeExecutor) -> torch.Tensor:
    return Net(Clock(), []).weight.detach() - made.worker.model.weight.detach()


def gradient(samples: int) -> torch.Tensor:
    """Of the mean loss of the first samples."""
    net = Net(Clock(), [])
    nn.functional.cross_entropy(net(BATCH[0][:samples]), BATCH[1][:samples]).backward()
    return net.weight.grad


def test_a_late_rank_sends_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of four micro-batches ends beyond the threshold: half of the batch, and zeros for the other half."""
    made = run(monkeypatch, 1, [1.0, 5.0], threshold=3.5)
    torch.testing.assert_close(moved(made), gradient(4) / 2)
    losses, weights = made.worker.pop_losses()
    assert losses[4:].tolist() == [NOT_COUNTED] * 4 and weights.tolist() == [1.0] * 4 + [0.0] * 4
    assert made.pop_dropped() == 4 and made.pop_dropped() == 0


def test_what_is_not_done_may_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(monkeypatch, 1, [1.0, 5.0], threshold=3.5, normalise="done")
    torch.testing.assert_close(moved(made), gradient(4))


@pytest.mark.parametrize("options", [{"threshold": None}, {"threshold": 4.0}, {"threshold": 0.1, "warmup_steps": 1}])
def test_nothing_is_left_out_in_time(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    made = run(monkeypatch, 1, [], **options)
    torch.testing.assert_close(moved(made), gradient(8))
    assert made.pop_dropped() == 0


def test_one_micro_batch_is_always_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(monkeypatch, 1, [9.0], threshold=0.1)
    torch.testing.assert_close(moved(made), gradient(2) / 4)


def test_the_threshold_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every other step the third micro-batch takes long, and then the fourth is not begun."""
    steps = np.tile([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 6.0, 6.0], 2).tolist()
    made = run(monkeypatch, 6, [1.0] * 8 + steps, threshold="auto", warmup_steps=2, measured_steps=4, max_dropped=0.2)
    assert made.clock.threshold is not None and 3 <= made.clock.threshold < 8
    assert made.state_dict()["threshold"] == made.clock.threshold and not made.state_dict()["ended"]


def test_a_run_that_is_resumed_goes_on_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(monkeypatch, 3, [], threshold="auto", measured_steps=4)
    second = run(monkeypatch, 0, [], threshold="auto", measured_steps=4)
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["ended"] == [[1.0, 2.0, 3.0, 4.0]] * 3
    second.run_round(iter([BATCH]))
    assert second.clock.threshold is None and not second.state_dict()["is_open"], "steps that do not vary"


def test_a_gradient_that_is_computed_once_more_has_no_more_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in float16, where it has overflowed; the times of all ranks' steps are one table."""
    made = run(monkeypatch, 1, [], threshold="auto", measured_steps=3)
    gradient_once = made.worker.gradient

    def twice(*args: Any) -> torch.Tensor:
        gradient_once(*args)
        return gradient_once(*args)

    monkeypatch.setattr(made.worker, "gradient", twice)
    made.run_round(iter([BATCH]))
    assert [len(times) for times in made.state_dict()["ended"]] == [4, 4]
    made.run_round(iter([BATCH]))
    assert not made.state_dict()["is_open"]
