"""Models and settings that are something else on a GPU; rank 0 is on it, the others as a kind says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES, SIDE, TARGETS = 60, 12, 3
SETTINGS: Mapping[str, Any] = {
    "train.tau": {"fast": 3, "slow": 1}, "train.batch_size": 4, "train.epochs": 3, "train.lr": 0.05,
    "train.loss_args": {}, "train.optimizer_args": {"momentum": 0.9}, "eval.every_epochs": 10,
    "checkpoint.every_rounds": 1, "checkpoint.keep": 1, "run.resume": "auto",
}  # fmt: skip


def images(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(SAMPLES, 3, SIDE, SIDE, generator=generator),
            torch.randint(TARGETS, (SAMPLES,), generator=generator))


def sequences(seed: int = 0) -> tuple[Tensor, Tensor]:
    inputs, targets = images(seed)
    return inputs.reshape(SAMPLES, 3 * SIDE, SIDE), targets


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2),
                         nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8 * 5 * 5, TARGETS))


class Recurrent(nn.Module):
    """Lays its weights together anew in each forward pass, which puts other tensors into their places."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(SIDE, 16, num_layers=2, batch_first=True), nn.Linear(16, TARGETS)

    def forward(self, x: Tensor) -> Tensor:
        self.lstm.flatten_parameters()
        return self.head(self.lstm(x)[0][:, -1])


class OnGpus(nn.Module):
    """Works on a GPU alone, as with a kernel that there is for nothing else."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.net, self.device = conv(), device

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != self.device:
            raise RuntimeError(f"there is no kernel for {x.device.type}")
        return self.net(x)


class OwnLoss(nn.Module):
    """Its output is the loss of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).square().mean(1)


def as_it_is(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs


@dataclass(frozen=True)
class Kind:
    """What is trained.

    Attributes:
        model: makes it, for ranks on this kind of device.
        gpus: the ranks that are on the GPU.
        resumed: trained a second time, stopped and resumed.
        given: further arguments of ``hvd_hetero.train``.
    """

    model: Callable[[str], nn.Module] = field(default=lambda device: conv())
    data: Callable[[int], tuple[Tensor, Tensor]] = images
    settings: Mapping[str, Any] = field(default_factory=dict)
    gpus: Sequence[int] = (0,)
    resumed: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)


EVERY = (0, 1, 2)
FUSED = {"train.channels_last": True, "train.optimizer_args": {"momentum": 0.9, "fused": True}}
GRAPHS = {"train.compile": "reduce-overhead"}
NO_METRIC = {"eval.metrics": {}}
KINDS: Mapping[str, Kind] = {
    "resumed": Kind(resumed=True),
    "resumed, channels_last, fused": Kind(settings=FUSED, resumed=True),
    "LSTM": Kind(lambda device: Recurrent(), sequences),
    "needs a GPU": Kind(OnGpus, gpus=EVERY),
    "compile": Kind(settings={"train.compile": "default"}, gpus=EVERY),
    "graphs": Kind(settings={**GRAPHS, **FUSED}, gpus=EVERY),
    "graphs, own loss": Kind(lambda device: OwnLoss(), settings={**GRAPHS, **NO_METRIC}, gpus=EVERY,
                             given={"loss": as_it_is}),
}  # fmt: skip
SMALL = ("resumed, channels_last, fused",)
"""What stands for them where there is no GPU."""
COMPILED = [name for name, kind in KINDS.items() if "train.compile" in kind.settings]
