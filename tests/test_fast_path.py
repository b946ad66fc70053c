"""Options that make steps faster, and change nothing but rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_hetero.worker import Worker


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


def worker(**options: Any) -> Worker:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    return Worker(convolutions(), loss, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), None, **options)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, 8, 8, generator=generator), torch.randint(4, (6,), generator=generator))
            for _ in range(count)]


def trained(one: Worker, flat: bool = False) -> dict[str, Tensor]:
    if flat:
        one.flat_gradients()
    one.local_steps(iter(batches(3)), 3)
    return one.model.state_dict()


@pytest.mark.parametrize("flat", [False, True])
def test_channels_last_is_another_order_of_the_same(flat: bool) -> None:
    one = worker(channels_last=True)
    torch.testing.assert_close(trained(one, flat), trained(worker(), flat), rtol=1e-4, atol=1e-5)
    weight = next(one.model.parameters())
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert weight.data_ptr() == one.state.vectors[0].data_ptr(), "still a view of what is averaged"
    assert weight.grad is not None and (not flat or weight.grad.stride() == weight.stride())


def test_compiled_steps_are_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as always; the code that is made of it is left to a backend that needs no compiler."""
    calls: list[str] = []
    real = torch.compile

    def compile_with(model: Any, *, mode: str, dynamic: bool) -> Any:
        calls.append(mode)
        return real(model, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile_with)
    torch.testing.assert_close(trained(worker(compile_mode="default")), trained(worker()), rtol=1e-4, atol=1e-5)
    assert calls == ["default"]


def test_what_cannot_be_compiled_trains_without_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, **options: Any) -> Any:
        def call(*inputs: Any) -> Any:
            raise RuntimeError("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="train.compile.*no compiler here") as said:
        result = trained(worker(compile_mode="default"))
    assert len(said) == 1
    torch.testing.assert_close(result, trained(worker()))
