"""Options that make steps faster, and change nothing but rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from store_helpers import save_round
from torch import Tensor, nn

from hvd_hetero.checkpoint import Store
from hvd_hetero.data import TensorSource
from hvd_hetero.training.startup import set_precision
from hvd_hetero.worker.step_benchmark import FIRST_STEPS, warm_up
from hvd_hetero.worker.worker import Worker

MOMENTUM = {"momentum": 0.9}


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


class Own(nn.Module):
    """No container: it has no length, which PyTorch's compiled modules pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = convolutions()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Empty(Own):
    """One that is empty, in its own words."""

    def __len__(self) -> int:
        return 0


def worker(
    optimizer: str = "SGD", arguments: Mapping[str, Any] = MOMENTUM, model: Callable[[], nn.Module] = convolutions,
    **options: Any,
) -> Worker:  # fmt: skip
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    make = getattr(torch.optim, optimizer)
    return Worker(model(), loss, lambda params: make(params, lr=0.1, **arguments), None, **options)


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


class Counting(torch.optim.SGD):
    """Keeps something beside the tensors of parameters."""

    def step(self, closure: Any = None) -> None:
        self.state["calls"] = self.state.get("calls", 0) + 1
        super().step(closure)


def test_an_optimizer_may_keep_what_belongs_to_no_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "Counting", Counting, raising=False)
    first, again = worker("Counting"), worker("Counting")
    first.local_steps(iter(batches(3)), 3)
    again.load_state_dict(first.state_dict())
    assert again.optimizer.state["calls"] == 3


@pytest.mark.parametrize(("optimizer", "arguments"), [("SGD", MOMENTUM | {"fused": True}), ("AdamW", {"fused": True})])
def test_gone_on_from_a_file_they_are_the_same_steps(
    tmp_path: Path, optimizer: str, arguments: Mapping[str, Any]
) -> None:
    """A fused optimizer takes its tensors as they lie in memory, and files keep no strides."""
    first, again = (worker(optimizer, arguments, channels_last=True) for _ in range(2))
    first.local_steps(iter(batches(3)), 3)
    store = Store(tmp_path)
    save_round(store, 3, [first.state_dict()])
    again.load_state_dict(store.at(3).load(0))
    for one in (first, again):
        one.local_steps(iter(batches(5)[3:]), 2)
    assert torch.equal(first.state.vectors[0], again.state.vectors[0])


@pytest.mark.parametrize(("precision", "tf32"), [("highest", False), ("high", True)])
def test_precision_is_of_convolutions_too(precision: str, tf32: bool) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = not tf32
        set_precision(precision)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (precision, tf32)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("model", [convolutions, Own, Empty])
def test_compiled_steps_are_the_same_steps(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, model: Callable[[], nn.Module]
) -> None:
    """Traced as always; the code that is made of it is left to a backend that needs no compiler."""
    calls: list[str] = []
    real = torch.compile

    def compile_with(model: Any, *, mode: str, dynamic: bool) -> Any:
        calls.append(mode)
        return real(model, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile_with)
    compiled, plain = worker(compile_mode="default", model=model), worker(model=model)
    torch.testing.assert_close(trained(compiled), trained(plain), rtol=1e-4, atol=1e-5)
    assert calls == ["default"] and not [w for w in recwarn if "train.compile" in str(w.message)]


def test_a_step_is_compiled_before_training_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def compile_with(model: nn.Module, **options: Any) -> Any:
        def call(x: Tensor) -> Tensor:
            shapes.append(tuple(x.shape))
            return model(x)

        return call

    monkeypatch.setattr(torch, "compile", compile_with)
    source = TensorSource(*(torch.cat(parts) for parts in zip(*batches(4), strict=True)))
    compiled, plain = worker(compile_mode="default"), worker()
    warm_up(compiled, source, 6)
    assert not any(compiled.watch.drain()[0].values())
    assert shapes == [(6, 3, 8, 8)] * FIRST_STEPS
    torch.testing.assert_close(trained(compiled), trained(plain), rtol=0, atol=0)
    assert len(compiled.pop_losses()[0]) == len(plain.pop_losses()[0])
    warm_up(plain, source, 6)
    warm_up(compiled, source, 0)  # a class that does not train
    assert len(shapes) == FIRST_STEPS + len(batches(3))


def test_what_cannot_be_compiled_trains_without_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, **options: Any) -> Any:
        def call(*inputs: Any) -> Any:
            raise RuntimeError("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="train.compile.*no compiler here") as output:
        result = trained(worker(compile_mode="default"))
    assert len(output) == 1
    torch.testing.assert_close(result, trained(worker()))
