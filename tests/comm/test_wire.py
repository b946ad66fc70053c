"""What sums travel in: unbiased, within bounds, without wrapping around, and without those whose numbers are bad."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_hetero.algorithms.averaging.delayed import InFlightAverage
from hvd_hetero.comm.averaging import ModelDifferences, average
from hvd_hetero.comm.flat_params import FlatState
from hvd_hetero.comm.nonfinite import FLAG_SLOTS
from hvd_hetero.comm.paths import FLAT
from hvd_hetero.comm.weighted_sums import sum_finite_
from hvd_hetero.comm.wire import BLOCK, Wire
from hvd_hetero.errors import UserError
from hvd_hetero.telemetry.heartbeat import Heartbeat

pytestmark = pytest.mark.horovod

CPU = torch.device("cpu")


def added(one: Tensor, other: Tensor) -> Tensor:
    total = one + other
    assert torch.equal(one.double() + other.double(), total.double()) or total.is_floating_point()
    return total


class Ranks:
    """So many ranks in one process, a thread each, that meet in sums of the type that travels; none may overflow."""

    def __init__(self, count: int) -> None:
        self.count, self._barrier, self._given = count, threading.Barrier(count), dict[int, Tensor]()
        self.sent: set[torch.dtype] = set()

    def _meet(self, rank: int, vector: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._given[rank] = vector.clone()
        self._barrier.wait(20)
        total = self._given[0]
        for other in range(1, self.count):
            total = join(total, self._given[other])
        self._barrier.wait(20)
        vector.copy_(total)

    def comm(self, rank: int) -> Any:
        def weighted_sum_(vector: Tensor, weight: float, name: str, ranks: Any = None) -> None:
            self.sent.add(vector.dtype)
            self._meet(rank, vector.mul_(weight) if weight != 1 else vector, added)

        def max_async_(vector: Tensor, name: str, ranks: Any = None) -> Callable[[], None]:
            return lambda: self._meet(rank, vector, torch.maximum)

        made = SimpleNamespace(
            rank=rank, size=self.count, weighted_sum_=weighted_sum_, max_async_=max_async_, timed=nullcontext,
            path=FLAT, excluded=SimpleNamespace(stops=False), heartbeat=Heartbeat(),
        )
        made.clone_for_thread = lambda: made
        return made

    def run(self, call: Callable[[Any], Any]) -> list[Any]:
        results: dict[int, Any] = {}
        threads = [threading.Thread(target=lambda rank=rank: results.update({rank: call(self.comm(rank))}))
                   for rank in range(self.count)]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return [results[rank] for rank in range(self.count)]


def summed(kind: str, parts: Sequence[Tensor], weight: float = 1.0, finite: Sequence[bool] = ()) -> list[Tensor]:
    """By rank, the sum of weight times parts over the good ranks."""
    ranks = Ranks(len(parts))

    def one(comm: Any) -> Tensor:
        wire = Wire(comm, kind, CPU, seed=7)
        vector = torch.cat([parts[comm.rank], torch.zeros(FLAG_SLOTS, dtype=parts[0].dtype)])
        is_finite = not finite or finite[comm.rank]
        sum_finite_(comm, [vector], is_finite, "x", weight=weight, prescaled_weight=1.0, wire=wire)
        return vector[:-FLAG_SLOTS]

    found = ranks.run(one)
    assert ranks.sent == {torch.int32 if kind == "int8" else torch.float16}
    assert all(torch.equal(found[0], other) for other in found)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_int8_is_within_its_bound_and_right_on_average(ranks: int, dtype: torch.dtype) -> None:
    """40 blocks of one and the same numbers: their means over the blocks are those of 40 draws."""
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(BLOCK, generator=generator, dtype=dtype) * 10.0**-rank for rank in range(ranks)]
    found = summed("int8", [part.repeat(40) for part in parts], weight=0.5)[0].view(40, BLOCK)
    exact = 0.5 * torch.stack(parts).sum(0)
    step = 0.5 * max(float(part.abs().max()) for part in parts) / (127 // ranks)
    assert float((found - exact).abs().max()) <= ranks * step * (1 + 1e-5)
    deviation = step / 2 * (ranks / 40 / BLOCK) ** 0.5
    assert abs(float((found - exact).mean())) < 5 * deviation
    assert float((found - exact).abs().max()) > step / 10, "it is rounded at all"


@pytest.mark.parametrize("ranks", [2, 4, 8, 16, 127])
def test_the_largest_numbers_of_all_ranks_do_not_wrap_around(ranks: int) -> None:
    """In the published form, 127 / n levels, 128 of them may meet."""
    part = torch.cat([torch.full((2 * BLOCK,), 0.1), torch.full((7,), -3.3)])
    found = summed("int8", [part] * ranks)[0]
    torch.testing.assert_close(found, ranks * part, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_zeros_and_any_length(kind: str, size: int) -> None:
    assert torch.equal(summed(kind, [torch.zeros(size)] * 2)[0], torch.zeros(size))


@pytest.mark.parametrize("scale", [1e-25, 1e-9, 1.0, 1e30])
def test_float16_keeps_eleven_bits_of_numbers_of_any_size(scale: float) -> None:
    parts = [scale * torch.linspace(0.1, 1, BLOCK + 9), scale * torch.linspace(-0.05, 0.7, BLOCK + 9)]
    found = summed("float16", parts)[0]
    assert float(((found - sum(parts)) / scale).abs().max()) < 3 * 2**-11


@pytest.mark.parametrize(("kind", "least"), [("float16", 3 * 2**-11), ("int8", 3 / 63)])
@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1.0, 1e3])
def test_numbers_in_float16_have_room_for_their_scale(kind: str, least: float, scale: float) -> None:
    """A model trained in float16: what numbers are multiplied with before they are rounded is beyond its range."""
    parts = [(scale * torch.linspace(begin, 1, BLOCK + 9)).half() for begin in (0.1, -0.5)]
    found = summed(kind, parts)[0]
    expected = sum(part.double() for part in parts)
    assert found.dtype == torch.float16
    assert float((found.double() - expected).abs().max()) < least * scale + 1e-7


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_a_rank_with_bad_numbers_is_left_out_before_rounding(kind: str) -> None:
    part = torch.linspace(-1, 1, 100)
    bad = torch.full((100,), torch.nan)
    found = summed(kind, [part, bad, part], weight=1 / 3, finite=[True, False, True])[0]
    assert float((found - part).abs().max()) < (1e-3 if kind == "float16" else 2 / 42)


def test_random_numbers_go_on_where_they_were() -> None:
    def draw(wire: Wire) -> Tensor:
        return wire._rounded(torch.full((50,), 0.5))

    comm = Ranks(1).comm(0)
    first, second = Wire(comm, "int8", CPU, 0), Wire(comm, "int8", CPU, 1)
    draw(first)
    assert not torch.equal(draw(first), draw(second))
    second.load_state_dict(first.state_dict())
    assert torch.equal(draw(first), draw(second))


@pytest.mark.parametrize("result", [RuntimeError("no such type"), 0.0])
def test_a_type_that_cannot_be_summed_is_refused(result: Any) -> None:
    def weighted_sum_(vector: Tensor, *args: Any) -> None:
        if isinstance(result, Exception):
            raise result
        vector.fill_(result)

    comm: Any = SimpleNamespace(rank=0, size=2, weighted_sum_=weighted_sum_)
    with pytest.raises(UserError, match=r"aggregation.wire='int8': .*; set float32"):
        Wire(comm, "int8", CPU, 0)


# ---- running statistics ---------------------------------------------------------------------------------------------


def statistics(net: nn.Module, rank: int) -> None:
    """One channel's variance is large, and the others' have come down to little."""
    with torch.no_grad():
        net[1].weight += 0.1 * (rank + 1)
        net[1].running_var.copy_(torch.tensor([60.0 + rank, 0.01, 0.02, 0.03]))


@pytest.mark.parametrize("averages", ["at the end of a round", "in flight"])
@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_running_statistics_are_not_rounded(kind: str, averages: str) -> None:
    """The differences from 1 are -0.99 beside 59, of which int8 has steps of nearly 1: a variance would be below 0."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ranks, nets = Ranks(2), [copy.deepcopy(net) for _ in range(2)]

    def one(comm: Any) -> dict[str, Tensor]:
        net = nets[comm.rank]
        state, wire = FlatState(net), Wire(comm, kind, CPU, seed=7)
        state.untrained.remember()  # all have it
        worker: Any = SimpleNamespace(device=CPU, state=state)
        flight = InFlightAverage(worker, comm, wire)
        flight.begin()
        statistics(net, comm.rank)
        if averages == "in flight":
            flight.send(0.5)
            flight.receive()
        else:
            average(comm, state, 0.5, differences=ModelDifferences(flight.base, wire))
        flight.close()
        return {name: value.clone() for name, value in net.state_dict().items()}

    first, other = ranks.run(one)
    torch.testing.assert_close(first["1.running_var"], torch.tensor([60.5, 0.01, 0.02, 0.03]), rtol=0, atol=1e-6)
    torch.testing.assert_close(first["1.weight"], torch.full((4,), 1.15), rtol=0, atol=0.01)
    assert not torch.equal(first["1.weight"], torch.full((4,), 1.15)), "what is trained is rounded"
    if averages != "in flight":
        assert all(torch.equal(value, other[name]) for name, value in first.items())
