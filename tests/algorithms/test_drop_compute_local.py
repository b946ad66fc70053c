"""DropCompute for local SGD on one rank, by a clock that the model moves, beside another rank that is scripted."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from method_helpers import method
from torch import nn

from hvd_hetero.algorithms.averaging import blocking
from hvd_hetero.algorithms.drop_compute_local import DropComputeLocal, DropComputeLocalOptions
from hvd_hetero.algorithms.execution import compute_clock
from hvd_hetero.algorithms.execution.drop_compute_local import DropComputeLocalExecutor
from hvd_hetero.cluster.device_classes import DeviceClass
from hvd_hetero.errors import ConfigError
from hvd_hetero.worker.factories import per_sample_loss
from hvd_hetero.worker.worker import Worker

pytestmark = pytest.mark.horovod

TAU = 4
ROWS = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.arange(40) % 2


class Net(nn.Linear):
    """Takes as long as it is told to; 1 s a step without that."""

    def __init__(self, seconds: list[float] | None = None) -> None:
        torch.manual_seed(0)
        super().__init__(3, 2, dtype=torch.float64)
        self.seconds, self.now = seconds or [], 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.now += self.seconds.pop(0) if self.seconds else 1.0
        return super().forward(x)

    def perf_counter(self) -> float:
        return self.now


class Part:
    """A segment that only notes what is said."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.recorded, self.planned, self.averages = rounds, list[int](), None, 0
        self.iterator = iter([(ROWS[0][i : i + 2], ROWS[1][i : i + 2]) for i in range(0, 40, 2)])

    def batches(self) -> Any:
        return self.iterator

    def start_round(self, number: int) -> None:
        assert self.planned == number

    def record(self, steps: int, number: int) -> None:
        self.recorded.append(steps)

    def finish_round(self) -> None:
        pass


def run(
    monkeypatch: pytest.MonkeyPatch, rounds: int, seconds: list[float], others: float = 0.0, **options: Any
) -> tuple[DropComputeLocalExecutor, Part]:
    """Rounds of 4 steps of 2 samples.

    Args:
        others: steps that the other rank takes in each round; it does not move its model.
    """
    net = Net(seconds)
    monkeypatch.setattr(compute_clock, "time", net)
    settings = {"algorithm.name": "drop_compute_local", "train.tau": {"only": TAU}, "train.batch_size": 2,
                "algorithm.warmup_rounds": 0, **{f"algorithm.{key}": value for key, value in options.items()}}
    policy: Any = method(settings, (DeviceClass("only", "cpu", (0, 1) if others else (0,)),), 100)
    policy.check()
    worker = Worker(net, per_sample_loss("cross_entropy", {}), lambda params: torch.optim.SGD(params, lr=0.5), None)
    comm: Any = SimpleNamespace(
        rank=0, size=1, timed=nullcontext, sum=lambda values, name: [values[0] + others],
        gather=lambda tensor, *args, **more: [tensor], excluded=SimpleNamespace(stops=False),
    )  # fmt: skip

    def average(comm: Any, state: Any, weight: float, **more: Any) -> bool:
        with torch.no_grad():
            for own, start in zip(net.parameters(), Net().parameters(), strict=True):
                own.copy_(weight * own + (1 - weight) * start)
        return True

    monkeypatch.setattr(blocking, "average", average)
    made, part = DropComputeLocalExecutor(policy), Part(rounds)
    made.start(policy.make_plan(None), worker, comm)
    made.run_segment(part)  # type: ignore[arg-type]
    return made, part


def stepped(count: int, first: int = 0) -> torch.Tensor:
    """The weights after so many plain steps on the batches from one on."""
    net = Net()
    for i in range(first, first + count):
        net.zero_grad()
        nn.functional.cross_entropy(net(ROWS[0][2 * i : 2 * i + 2]), ROWS[1][2 * i : 2 * i + 2]).backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.5 * p.grad
    return net.weight.detach()


def weights(made: DropComputeLocalExecutor) -> torch.Tensor:
    return made.worker.model.weight.detach()


def test_a_late_rank_joins_with_the_steps_it_has_and_goes_on_with_the_samples_it_has_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second step of the first round ends beyond the threshold; the second round is in time."""
    made, part = run(monkeypatch, 2, [1.0, 5.0], threshold=4.5)
    assert part.recorded == [2, 4] and part.planned == part.averages == 2
    torch.testing.assert_close(weights(made), stepped(6))
    assert made.pop_dropped() == 2 * 2 and made.pop_dropped() == 0


def test_weights_may_be_by_the_steps_that_were_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 of this rank and 4 of the other one, which stays where it was."""
    start = Net().weight.detach()
    made, _ = run(monkeypatch, 1, [1.0, 5.0], others=4.0, threshold=4.5, normalise="done")
    torch.testing.assert_close(weights(made) - start, (stepped(2) - start) * 2 / 6)
    made, _ = run(monkeypatch, 1, [1.0, 5.0], others=4.0, threshold=4.5, normalise="full")
    torch.testing.assert_close(weights(made) - start, (stepped(2) - start) / 2)


def test_weights_are_those_of_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``aggregation.anneal_from`` changes them."""
    monkeypatch.setattr(DropComputeLocal, "weight_of", lambda self, mine: mine.weight / 2)
    made, _ = run(monkeypatch, 1, [], others=4.0)
    start = Net().weight.detach()
    torch.testing.assert_close(weights(made) - start, (stepped(TAU) - start) / 4)


@pytest.mark.parametrize("is_idle", [False, True])
def test_a_class_that_is_left_out_measures_nothing_but_is_there(
    monkeypatch: pytest.MonkeyPatch, is_idle: bool
) -> None:
    """The other rank's last step always takes long; all ranks gather, in whatever order classes have them."""
    net, other = Net(), torch.tensor([9.0, 1.0, 2.0, 9.0], dtype=torch.float64)
    monkeypatch.setattr(compute_clock, "time", net)
    output: Any = {"threshold.sizes": torch.tensor([4]), "threshold.times": other}

    def gather(tensor: torch.Tensor, name: str, sizes: Any = None, ranks: Any = None) -> list[torch.Tensor]:
        assert ranks is None
        return [tensor, output[name]]

    clock = compute_clock.ComputeClock(DropComputeLocalOptions(threshold="auto", max_dropped=0.5), 0, 1, lambda: None)
    clock.begin()
    for _ in range(0 if is_idle else 3):
        net.now += 1
        assert not clock.is_over()
    clock.end(SimpleNamespace(gather=gather))  # type: ignore[arg-type]
    assert clock.threshold is not None and clock.threshold < 2


@pytest.mark.parametrize("options", [{"threshold": None}, {"threshold": 4.0}, {"threshold": 0.1, "warmup_rounds": 1}])
def test_nothing_is_left_out_in_time(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    made, part = run(monkeypatch, 1, [], **options)
    assert part.recorded == [TAU] and made.pop_dropped() == 0
    torch.testing.assert_close(weights(made), stepped(TAU))


def test_one_step_is_always_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, 2, [9.0, 9.0], threshold=0.1)[1].recorded == [1, 1]


def test_the_threshold_is_measured_and_anew_when_rounds_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every other round the third step takes long, and then the fourth is not begun."""
    seconds = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 6.0, 6.0] * 2
    made, part = run(monkeypatch, 4, seconds, threshold="auto", measured_rounds=4, max_dropped=0.2)
    clock = made.averaging.clock
    assert part.recorded == [4] * 4 and clock.threshold is not None and 3 <= clock.threshold < 8
    again, _ = run(monkeypatch, 0, [], threshold="auto", measured_rounds=4)
    again.load_state_dict(made.state_dict())
    assert again.averaging.clock.threshold == clock.threshold
    again.averaging._taus = [TAU + 1]
    again.run_segment(Part(1))  # type: ignore[arg-type]
    assert again.averaging.clock.threshold is None and len(again.averaging.clock.state_dict()["ended"]) == 1


@pytest.mark.parametrize(("settings", "key"), [
    ({"algorithm.threshold": -1}, "algorithm.threshold"),
    ({"algorithm.threshold": 2.0, "train.tau": 1}, "train.tau"),
    ({"aggregation.mode": "solo"}, "aggregation.mode"),
    ({"aggregation.delayed": True}, "aggregation.delayed"),
    ({"aggregation.weights": "normalised"}, "aggregation.weights"),
    ({"cluster.too_slow": "wait_avoiding"}, "cluster.too_slow"),
])  # fmt: skip
def test_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        method({"algorithm.name": "drop_compute_local", "train.tau": 8, **settings}).check()
    assert caught.value.key == key
