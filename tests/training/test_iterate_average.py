"""Averages of the rounds' models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from hvd_hetero.cluster.device_classes import assign
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.comm.flat_params import FlatState
from hvd_hetero.comm.nonfinite import SUMMED
from hvd_hetero.config.load import device_classes
from hvd_hetero.config.schema import EvalConfig, TrainConfig
from hvd_hetero.planning.plan import Plan, make_plan
from hvd_hetero.training.iterate_average import EMA, LAWA, SHARE, UNKNOWN, IterateAverage, half_life

pytestmark = pytest.mark.horovod


class Alone:
    """A rank that has nobody to tell."""

    @staticmethod
    def broadcast(tensor: Any, name: str) -> Any:
        assert tensor.dtype in SUMMED, "Horovod has no other types"
        return tensor


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def plan() -> Plan:
    facts = [RankFacts(rank, "here", rank, (), "cpu", (0,)) for rank in range(2)]
    cluster = assign(device_classes({"fast": {"ranks": [0]}, "slow": {"ranks": [1]}}), facts)
    return make_plan(cluster, 400, {"fast": 4, "slow": 1}, {"fast": 8, "slow": 8})


def rounds(state: FlatState, average: IterateAverage, count: int, seed: int = 1) -> list[torch.Tensor]:
    """The models after so many rounds, all of them taken in."""
    generator, seen = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        state.vectors[0].copy_(torch.randn(state.vectors[0].shape, generator=generator))
        seen.append(state.vectors[0].clone())
        average.end_round(4)
    return seen


def mean_of(average: IterateAverage, state: FlatState) -> torch.Tensor:
    with average.in_place(Alone()):  # type: ignore[arg-type]
        return state.vectors[0].clone()


def test_exponential_with_a_plain_mean_at_first() -> None:
    state = FlatState(model())
    average = IterateAverage(EMA, state, half_life=8.0, last=1)
    seen = rounds(state, average, 6)
    expected = torch.zeros_like(seen[0])
    for number, x in enumerate(seen, 1):
        kept = min(0.5 ** (4 / 8), 1 - 1 / number)
        expected = kept * expected + (1 - kept) * x
    torch.testing.assert_close(mean_of(average, state), expected)
    first = IterateAverage(EMA, state, half_life=1e9, last=1)
    torch.testing.assert_close(mean_of(first, state), seen[-1], msg="without a round it is the model itself")
    torch.testing.assert_close(mean_of(first, state), torch.stack(seen[-1:]).mean(0))
    torch.testing.assert_close(torch.stack(rounds(state, first, 5)).mean(0), mean_of(first, state))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers_are_averaged_in_wide_ones(dtype: torch.dtype) -> None:
    """A round adds a thousandth of the model, which bfloat16 would round away."""
    state = FlatState(nn.Linear(3, 2).to(dtype))
    average, again = (IterateAverage(EMA, state, half_life=1e6, last=1) for _ in range(2))
    for number in range(400):
        state.vectors[0].fill_(1.0 if number < 200 else 2.0)
        average.end_round(4)
        if number == 300:
            again.load_state_dict(average.state_dict())
        elif number > 300:
            again.end_round(4)
    assert float(mean_of(average, state)[0]) == pytest.approx(1.5, abs=0.01)
    assert torch.equal(mean_of(again, state), mean_of(average, state))
    assert float(state.vectors[0][0]) == 2.0


def test_the_mean_of_the_last_epochs() -> None:
    state = FlatState(model())
    average = IterateAverage(LAWA, state, half_life=1.0, last=3)
    ends = []
    for epoch in range(5):
        ends += rounds(state, average, 2, epoch)[-1:]
        average.end_epoch()
    torch.testing.assert_close(mean_of(average, state), torch.stack(ends[-3:]).mean(0))


def test_the_model_is_put_back_whatever_happens() -> None:
    state = FlatState(net := model())
    average = IterateAverage(EMA, state, 8.0, 1)
    last = rounds(state, average, 3)[-1]
    with pytest.raises(RuntimeError), average.in_place(Alone()):  # type: ignore[arg-type]
        assert not torch.equal(state.vectors[0], last)
        raise RuntimeError("in an evaluation")
    assert torch.equal(state.vectors[0], last)
    assert next(net.parameters()).data_ptr() == state.vectors[0].data_ptr()


@pytest.mark.parametrize("kind", [EMA, LAWA])
def test_it_is_resumed_where_it_was(kind: str) -> None:
    first, second = FlatState(model()), FlatState(model())
    before, after = (IterateAverage(kind, state, 8.0, 2) for state in (first, second))
    for epoch in range(3):
        rounds(first, before, 2, epoch)
        before.end_epoch()
    after.load_state_dict(before.state_dict())
    for state, average in ((first, before), (second, after)):
        rounds(state, average, 2, 9)
        average.end_epoch()
    assert torch.equal(mean_of(before, first), mean_of(after, second))
    other = IterateAverage(EMA if kind == LAWA else LAWA, second, 8.0, 2)
    other.load_state_dict(before.state_dict())
    assert torch.equal(mean_of(other, second), second.vectors[0]), "another kind is begun anew"


def test_the_half_life_of_a_run() -> None:
    train = replace(TrainConfig(), epochs=3)
    whole = plan().rounds * 4 * 3
    assert half_life(EvalConfig(), train, plan()) == SHARE * whole
    assert half_life(EvalConfig(half_life=7.0), train, plan()) == 7.0
    assert half_life(EvalConfig(), replace(train, epochs=None, max_train_sec=5.0), plan()) == UNKNOWN
