"""The small pieces that methods are made of, without a job."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from method_helpers import GPU, ONE, TWO, method, of
from torch import nn

from hvd_hetero.algorithms.averaging.optimizer_average import SEEDED, OptimizerAverage
from hvd_hetero.algorithms.averaging.outer_optimizer import OuterOptimizer
from hvd_hetero.algorithms.dlb import DLB
from hvd_hetero.algorithms.synchronous import choose
from hvd_hetero.cluster import hardware
from hvd_hetero.cluster.device_classes import DeviceClass
from hvd_hetero.cluster.hardware import has_bf16
from hvd_hetero.comm.flat_params import FlatState
from hvd_hetero.comm.parameter_server import Servers
from hvd_hetero.planning.plan import apportion
from hvd_hetero.worker.factories import per_sample_loss
from hvd_hetero.worker.worker import Worker

pytestmark = pytest.mark.horovod

# ---- DLB ------------------------------------------------------------------------------------------------------------


def dlb(classes: tuple[DeviceClass, ...] = TWO, **settings: Any) -> DLB:
    made = method({"algorithm.name": "dlb", **{f"algorithm.{k}": v for k, v in settings.items()}}, classes)
    assert isinstance(made, DLB)
    made.start(made.make_plan(None))
    return made


def batches(policy: DLB) -> list[int]:
    return [c.batch_size for c in policy.plan.by_rank()]


def test_dlb_begins_with_equal_shares_and_follows_speed() -> None:
    made = dlb(global_batch=50)
    assert batches(made) == [10] * 5
    made.replan([1.0, 1.0, 4.0, 4.0, 2.0])  # 1 : 1 : 1/4 : 1/4 : 1/2
    assert batches(made) == [17, 17, 4, 4, 8], "16.67, 16.67, 4.17, 4.17, 8.33 by largest remainder"
    made.replan([17.0, 17.0, 4.0, 4.0, 8.0])
    assert batches(made) == [10] * 5, "all equally fast now"
    assert made.plan.rounds == 1000 // 50


def test_dlb_weights_gradients_by_batch() -> None:
    made = dlb(global_batch=13)
    made.replan([1.0, 2.0, 3.0, 4.0, 5.0])
    plan = made.plan.by_rank()
    assert sum(batches(made)) == 13
    assert [c.weight for c in plan] == pytest.approx([c.batch_size / 13 for c in plan])
    assert sum(c.weight * len(c.ranks) for c in made.plan.classes) == pytest.approx(1)
    assert made.plan.epoch_samples() == {"fast": sum(batches(made)[:2]) * 76, "slow": sum(batches(made)[2:]) * 76}


@pytest.mark.parametrize(("wanted", "needed", "least"), [(1, 1, 1), (2, 1, 2), (1, 2, 2), (3, 2, 3)])
def test_dlb_gives_everybody_as_many_samples_as_are_wanted_or_needed(wanted: int, needed: int, least: int) -> None:
    made = dlb(global_batch=20, min_local_batch=wanted)
    made.min_batch = needed
    for _ in range(3):
        made.replan([1e-3, 1e-3, 1.0, 1.0, 1.0])
    assert sum(batches(made)) == 20 and min(batches(made)) == least
    for _ in range(2):
        made.replan([b * 1.0 for b in batches(made)])
    assert batches(made) == [4] * 5, "a class that was slow for a while comes back at once"


def test_dlb_resumes_with_the_shares_it_had() -> None:
    first, second = dlb(global_batch=50), dlb(global_batch=50)
    first.replan([1.0, 1.0, 4.0, 4.0, 2.0])
    second.load_state_dict(first.state_dict())
    assert second.plan == first.plan


@pytest.mark.parametrize(("total", "shares", "at_least", "expected"), [
    (10, [0.98, 0.01, 0.01], 1, [8, 1, 1]),
    (3, [1.0, 0.0, 0.0], 1, [1, 1, 1]),
    (10, [0.98, 0.01, 0.01], 0, [10, 0, 0]),
    (12, [0.5, 0.25, 0.25], 2, [6, 3, 3]),
])  # fmt: skip
def test_apportion_with_a_least_share(total: int, shares: list[float], at_least: int, expected: list[int]) -> None:
    assert apportion(total, shares, at_least) == expected


FOUR = (DeviceClass("every", "cpu", (0, 1, 2, 3)),)
OMNI = {"global_batch": 128, "deadband": 0.2, "min_local_batch": 16, "max_local_batch": 96}


@pytest.mark.parametrize(("times", "expected"), [
    ([1.0, 1.0, 1.0, 1.0], [32, 32, 32, 32]),
    ([1.0, 1.0, 1.0, 2.0], [37, 37, 37, 17]),    # (40, 40, 40, 20) and 12 too many
    ([1.0, 1.0, 1.0, 1.2], [32, 32, 32, 32]),    # (33.6, 33.6, 33.6, 28): all changes below a fifth
    ([1.0, 1.0, 1.0, 9.0], [38, 37, 37, 16]),    # (96, 96, 96, 16): bounds, then what is over in the sum
])  # fmt: skip
def test_omnilearn_follows_its_published_controller(times: list[float], expected: list[int]) -> None:
    made = dlb(FOUR, **OMNI)
    assert batches(made) == [32] * 4
    made.replan(times)
    assert batches(made) == expected and sum(expected) == 128


def test_bounds_hold_for_dlb_too_and_the_sum_stays() -> None:
    made = dlb(FOUR, global_batch=100, max_local_batch=40, min_local_batch=5)
    made.replan([0.1, 1.0, 1.0, 8.0])
    assert batches(made) == [40, 28, 27, 5]
    made.replan([40.0, 28.0, 27.0, 5.0])
    assert batches(made) == [25] * 4


# ---- BytePS ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("servers", "length", "expected"), [
    (1, 10, [[4], [4], [2]]),          # the last partition is smaller
    (2, 10, [[4, 4], [2, 0]]),
    (3, 10, [[4, 4, 2]]),
    (4, 10, [[4, 4, 2, 0]]),           # more servers than partitions
    (2, 8, [[4, 4]]),
    (2, 3, [[3, 0]]),
    (2, 0, []),
])  # fmt: skip
def test_partitions_are_spread_over_the_servers(servers: int, length: int, expected: list[list[int]]) -> None:
    comm: Any = SimpleNamespace(size=servers + 2, rank=0)
    assert Servers(comm, [0, 1], partition_bytes=32).turns(length, itemsize=8) == expected


# ---- which class is fast --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "participants", "expected"), [
    (TWO, "all", ["fast", "slow"]),
    (TWO, "fast", ["fast"]),
    (TWO, "slow", ["slow"]),
    (ONE, "fast", ["every"]),
    (GPU, "fast", ["new"]),
    ((TWO[1], DeviceClass("quick", "cpu", (0, 1))), "fast", ["quick"]),
])  # fmt: skip
def test_participants(classes: tuple[DeviceClass, ...], participants: str, expected: list[str]) -> None:
    assert [c.name for c in choose(of(classes), participants)] == expected


# ---- bfloat16 -------------------------------------------------------------------------------------------------------


def test_autocast_computes_in_bfloat16_and_keeps_float32_parameters() -> None:
    seen = []
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loss = per_sample_loss("cross_entropy", {})
    worker = Worker(net, loss, lambda params: torch.optim.SGD(params, lr=0.1), None, autocast=torch.bfloat16)
    before = worker.state.vectors[0].clone()
    losses = worker.gradient(torch.randn(6, 4), torch.zeros(6, dtype=torch.int64))
    worker.apply()
    assert seen == [torch.bfloat16] and losses.dtype == torch.float32
    assert worker.state.vectors[0].dtype == torch.float32 and not torch.equal(before, worker.state.vectors[0])


@pytest.mark.parametrize(("flags", "expected"), [("sse avx512_bf16 avx", True), ("sse avx512f", False), ("", False)])
def test_a_cpu_tells_whether_it_has_bfloat16(monkeypatch: pytest.MonkeyPatch, flags: str, expected: bool) -> None:
    monkeypatch.setattr(hardware, "_cpu_info", lambda name: flags if name == "flags" else "")
    assert has_bf16("cpu") is expected


# ---- the optimizer's state -------------------------------------------------------------------------------------------


def test_fedlalr_begins_the_second_moment_anew_from_its_largest_value() -> None:
    """One rank, a round of two steps and one of one, beside AMSGrad written out, with torch's correction of bias."""
    param, lr, beta, beta2 = nn.Parameter(torch.ones(3, dtype=torch.float64)), 0.1, 0.9, 0.995
    optimizer = torch.optim.Adam([param], lr=lr, betas=(beta, beta2), eps=0.0, amsgrad=True)
    comm: Any = SimpleNamespace(
        rank=0, size=1, timed=nullcontext, excluded=SimpleNamespace(stops=False), max=lambda values, name: values,
        gather=lambda tensor, name: [tensor], gather_text=lambda text, name: [text], weighted_sum_=lambda *args: None,
    )
    average = OptimizerAverage([param], comm, SEEDED)
    x, m, (v, largest) = torch.ones(3, dtype=torch.float64), 0.0, torch.zeros(2, 3, dtype=torch.float64)
    for step, gradient in enumerate(torch.tensor([[4.0, 1.0, 0.1], [0.1, 1.0, 2.0], [1.0, 1.0, 1.0]]).double(), 1):
        param.grad = gradient.clone()
        optimizer.step()
        m, v = beta * m + (1 - beta) * gradient, beta2 * v + (1 - beta2) * gradient**2
        largest = torch.maximum(largest, v)
        x = x - lr * m / (1 - beta**step) / (largest / (1 - beta2**step)).sqrt()
        if step == 2:
            average.average(optimizer, 1.0)
            v = largest.clone()
    torch.testing.assert_close(param.detach(), x)
    assert torch.equal(optimizer.state[param]["max_exp_avg_sq"], torch.maximum(largest, v))


# ---- the outer optimizer --------------------------------------------------------------------------------------------


def test_the_outer_optimizer_resumes_where_it_was() -> None:
    """Saved and loaded between two rounds, it goes on as if nothing had happened."""

    def made() -> tuple[FlatState, OuterOptimizer]:
        torch.manual_seed(0)
        state = FlatState(nn.Linear(3, 2))
        return state, OuterOptimizer(state, 0.7, 0.9, nesterov=True)

    def round_of(state: FlatState, outer: OuterOptimizer, number: int) -> None:
        outer.snapshot()
        vector = state.vectors[0]
        vector.add_(number * torch.arange(float(len(vector))))  # what local steps and their average would come to
        outer.step()

    whole, first, second = made(), made(), made()
    for number in (1, 2, 3):
        round_of(*whole, number)
    for number in (1, 2):
        round_of(*first, number)
    second[0].vectors[0].copy_(first[0].vectors[0])
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    round_of(*second, 3)
    assert torch.equal(second[0].vectors[0], whole[0].vectors[0])


@pytest.mark.parametrize(("lr", "momentum", "nesterov"), [(0.7, 0.0, False), (0.7, 0.9, False), (0.7, 0.9, True)])
def test_an_outer_step_rounds_as_it_is_written(lr: float, momentum: float, nesterov: bool) -> None:
    """Every product and every sum to float32, so that CPUs and GPUs come to the same bits."""
    torch.manual_seed(0)
    state = FlatState(nn.Linear(40, 25))
    outer = OuterOptimizer(state, lr, momentum, nesterov)
    outer.snapshot()
    vector = state.parameters()[0]
    before = vector.numpy().copy()
    vector.add_(torch.randn_like(vector))
    average = vector.numpy().copy()
    outer.step()
    d, f = before - average, np.float32
    expected = average + f(1 - lr) * d if nesterov or not momentum else average + d
    if momentum:
        expected -= f(lr * momentum if nesterov else lr) * d  # the first velocity
    assert np.array_equal(vector.numpy(), expected)


def test_a_plain_average_costs_nothing_more() -> None:
    state = FlatState(nn.Linear(3, 2))
    outer = OuterOptimizer(state, 1.0, 0.0, nesterov=False)
    assert not outer.active and outer.state_dict() == {}
    before = state.vectors[0].clone()
    outer.snapshot()
    outer.step()
    assert torch.equal(before, state.vectors[0])
