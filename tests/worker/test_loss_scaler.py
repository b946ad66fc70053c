"""Steps in float16 (train.autocast): gradients as in float32, overflows computed once more, and nothing skipped.

Here on the CPU, which computes in float16 too; what devices compute in: tests/algorithms/test_methods_parts.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hvd_hetero.worker import loss_scaler
from hvd_hetero.worker.factories import per_sample_loss
from hvd_hetero.worker.worker import Worker

pytestmark = pytest.mark.horovod

INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])


class Huge(nn.Module):
    """Its outputs overflow in float16, in the batches that say so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x)
        return (outputs * 1e5).float() * 1e-5 if x[0, 0] > 50 else outputs


def worker(half: bool = True, model: nn.Module | None = None) -> Worker:
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return Worker(model, per_sample_loss("cross_entropy", {}), lambda params: torch.optim.SGD(params, lr=0.1), None,
                  autocast=torch.float16 if half else None)


def gradients(mine: Worker, inputs: Tensor = INPUTS) -> list[Tensor]:
    mine.gradient(inputs, TARGETS, 0.5)
    return [g.clone() for g in mine.gradients()]


def test_gradients_are_those_of_float32_whatever_the_scale() -> None:
    expected, mine = gradients(worker(half=False)), worker()
    assert mine.scaler is not None
    for scale in (1.0, 2.0**16):
        mine.scaler.scale = scale
        found = gradients(mine)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-4)
        assert found[0].dtype == torch.float32
    assert not torch.equal(found[0], expected[0]), "else it was not computed in float16"
    assert mine.scaler.overflows == 0


@pytest.mark.parametrize("parts", [1, 3])
def test_an_overflow_is_computed_again_and_no_step_is_skipped(parts: int) -> None:
    mine = worker()
    mine.micro_batches = parts
    assert mine.scaler is not None
    mine.scaler.scale = 2.0**24
    before = [p.detach().clone() for p in mine.model.parameters()]
    torch.testing.assert_close(gradients(mine), gradients(worker(half=False)), rtol=2e-2, atol=1e-4)
    assert mine.scaler.overflows >= 1 and mine.scaler.scale == 2.0 ** (24 - mine.scaler.overflows)
    assert len(mine.pop_losses()[0]) == len(TARGETS), "the losses of one step"
    mine.apply()
    assert not any(torch.equal(p, b) for p, b in zip(mine.model.parameters(), before, strict=True))


@pytest.mark.parametrize("parts", [1, 3])
def test_the_gradient_beside_is_the_same_one(parts: int) -> None:
    """Of synchronous methods, whose gradients have been sent when they are looked at."""
    mine = worker()
    mine.micro_batches = parts
    found = gradients(mine)
    assert mine.scaler is not None
    mine.scaler.scale = 2.0**24
    torch.testing.assert_close(mine.gradient_again(INPUTS, TARGETS, 0.5), found, rtol=1e-3, atol=1e-5)
    assert mine.scaler.overflows >= 1


def test_what_overflows_at_any_scale_is_computed_in_float32() -> None:
    inputs = INPUTS.clone()
    inputs[0, 0] = 100.0
    mine, model = worker(model=Huge()), Huge()
    model.load_state_dict(copy.deepcopy(mine.model.state_dict()))
    torch.testing.assert_close(gradients(mine, inputs), gradients(worker(half=False, model=model), inputs))
    assert mine.scaler is not None and mine.scaler.scale == loss_scaler.START, "which was not to blame"
    assert mine.scaler.overflows == 1
    gradients(mine)
    assert not mine.scaler.in_float32 and mine.scaler.overflows == 1


def test_bad_numbers_stay_bad() -> None:
    mine = worker()
    found = gradients(mine, INPUTS * float("nan"))
    assert mine.scaler is not None and not any(bool(g.isfinite().all()) for g in found[:1])
    assert mine.scaler.scale == loss_scaler.START and not mine.scaler.in_float32


def test_the_scale_grows_and_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scaler, "GROWTH_STEPS", 3)
    mine, other = worker(), worker()
    assert mine.scaler is not None and other.scaler is not None
    restore = mine.snapshot()
    for step in range(5):
        gradients(mine)
        mine.apply()
        if step == 3:
            other.load_state_dict(mine.state_dict())
    assert mine.scaler.scale == 2 * loss_scaler.START
    for _ in range(2):
        gradients(other)
        other.apply()
    assert other.scaler.scale == 4 * loss_scaler.START, "a step after the restored ones"
    restore()
    assert mine.scaler.scale == loss_scaler.START


def test_flat_and_sparse_gradients() -> None:
    torch.manual_seed(0)
    words = torch.tensor([[0, 1], [2, 0], [1, 1], [0, 2], [1, 0], [2, 2]])
    for sparse in (False, True):
        mine = worker(model=nn.Sequential(nn.EmbeddingBag(3, 4, sparse=sparse), nn.Linear(4, 3)))
        if not sparse:
            mine.flat_gradients()
        assert mine.scaler is not None
        mine.scaler.scale = 2.0**24
        mine.gradient(words, TARGETS)
        assert mine.scaler.overflows >= 1
        assert all(bool(g.to_dense().isfinite().all()) for g in mine.gradients())
