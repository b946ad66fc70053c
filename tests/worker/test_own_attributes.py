"""What model, loss and optimizer keep outside of what is averaged and saved is told of, where training changes it."""

from __future__ import annotations

import copy
import random
import warnings
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvd_hetero.worker.own_attributes import LOSS, MODEL, OPTIMIZER, held, warn_of_changes

X = torch.ones(3, 2)


def no_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs[:, 0]


def looked(model: nn.Module, loss: Any = no_loss, optimizer: Any = None) -> dict[str, dict[str, Any]]:
    optimizer = optimizer or torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    return held(model, loss, optimizer)  # type: ignore[return-value]


class Counts(nn.Linear):
    """Counts, keeps a mean that is no buffer, and looks at its activations."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.count, self.name, self.mean, self.seen = 0, "one", torch.zeros(2), torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.mean = 0.9 * self.mean + x.mean(0)
        self.seen = super().forward(x)
        return self.seen


class Saves(Counts):
    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = state


class Hides(nn.Linear):
    """Keeps what it changes where ``named_buffers`` does not find it, and some things that stay."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.teacher = [copy.deepcopy(nn.Linear(2, 2))]
        self.queue = deque([torch.zeros(2)] * 3, maxlen=3)
        self.means = {"x": np.zeros(2), "inner": (torch.zeros(2),)}
        self.noise, self.draws, self.dice = np.random.default_rng(0), torch.Generator(), random.Random(0)
        self.weights, self.log, self.vocabulary = [self.weight], list[float](), {"word": 0}
        self.parent, self.empty, self.nothing = [self], torch.empty(0), None

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher[0].weight.lerp_(self.weight, 0.5)
            self.weight.mul_(0.9)
            self.means["inner"][0].add_(1)
        self.queue.append(x.mean(0))
        self.means["x"] = self.means["x"] + 1
        self.noise.random(), self.dice.random(), torch.rand(1, generator=self.draws)
        self.log.append(float(x[0, 0]))
        return super().forward(x)


def test_what_changes_is_told_by_its_name() -> None:
    model = nn.Sequential(Counts(), Saves(), nn.Dropout())
    before = looked(model)
    assert {"0.count", "0.name", "0.mean", "2.p"} <= before[MODEL].keys() and "1.count" not in before[MODEL]
    model(X)
    with pytest.warns(UserWarning, match=r"the model's 0.count, 0.mean change in training"):
        warn_of_changes(before, looked(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_changes(looked(model), looked(model))


def test_containers_generators_arrays_and_hidden_modules_are_looked_into() -> None:
    model = nn.Sequential(Hides(), nn.LSTM(2, 2))  # which has a list of its parameters
    before = looked(model)
    model[0](X)
    with pytest.warns(UserWarning, match=r"the model's 0.teacher, 0.queue, 0.means, 0.noise, 0.draws, 0.dice change"):
        warn_of_changes(before, looked(model))


class Follows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(2))
        self.register_buffer("classes", torch.ones(2))
        self.calls = 0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.center = self.center + 1
        self.calls += 1
        return outputs[:, 0]


def test_what_a_loss_keeps_is_told() -> None:
    model, module, stay = nn.Linear(2, 2), Follows(), {"scale": 1.0}
    for loss in (module, module.forward, lambda o, y: module(o, y) * stay["scale"] * model.weight.sum()):
        before = looked(model, loss)
        loss(X, X)
        with pytest.warns(UserWarning, match=r"the loss's (calls, center|module) change in training: each rank"):
            warn_of_changes(before, looked(model, loss))
    assert not looked(model, nn.functional.cross_entropy)[LOSS]


class Slow(torch.optim.SGD):
    """Slow weights in an attribute; Saved has them in its state."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        self.steps, self.mode, self.slow = 0, "eval", [p.detach().clone() for p in self.param_groups[0]["params"]]

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.steps, self.mode = self.steps + 1, "train"
        for slow, fast in zip(self.slow, self.param_groups[0]["params"], strict=True):
            slow.lerp_(fast.detach(), 0.5)


class Saved(Slow):
    def state_dict(self) -> Any:
        return super().state_dict() | {"slow": self.slow}


def test_what_an_optimizer_does_not_save_is_told() -> None:
    for kind, told in ((Slow, "steps, slow"), (Saved, "")):
        model = nn.Linear(2, 2)
        optimizer = kind(model.parameters())
        before = looked(model, optimizer=optimizer)
        model(X).sum().backward()
        optimizer.step()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            warn_of_changes(before, looked(model, optimizer=optimizer))
        assert [str(one.message).partition(" change")[0] for one in heard] == [f"the {OPTIMIZER}'s {told}"] * bool(told)
