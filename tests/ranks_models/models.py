"""Models, data and settings of unusual kinds, as people bring them; each is trained on two unequal ranks.

A case is small: 24 samples, a fast rank with three steps a round and a slow one with one.
"""

from __future__ import annotations

import copy
import math
import random
from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

F = nn.functional
N, D = 24, 8


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        model: makes it; its values may differ from rank to rank, since rank 0's are where all start.
        data: makes (train, test).
        given: further arguments of ``hvd_hetero.train``.
        settings: of the configuration.
        local: names of tensors that are each rank's own.
    """

    model: Callable[[], nn.Module]
    data: Callable[[], Any] = field(default=lambda: (xy(), xy(1)))
    given: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    local: tuple[str, ...] = ()


def xy(seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long()


def net(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 6), nn.ReLU(), *more, nn.Linear(6, 2))


class Wrapped(nn.Module):
    """A small net with something beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


# ---- buffers of unusual types and layouts ---------------------------------------------------------------------------


def with_buffers(**buffers: Tensor) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made = Wrapped()
        for name, buffer in buffers.items():
            made.register_buffer(name, buffer.clone() if 0 not in buffer.stride() else buffer)
        return made

    return make


TYPES = {
    str(t).removeprefix("torch."): t
    for t in (torch.bool, torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64, torch.bfloat16,
              torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128)
}  # fmt: skip


class Counting(Wrapped):
    """Buffers that change in every step, each in another way."""

    def __init__(self, replace: bool) -> None:
        super().__init__()
        self.replace = replace
        self.register_buffer("steps", torch.tensor(2**24, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(2, 3, dtype=torch.uint8))
        self.register_buffer("flag", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("narrow", torch.zeros(D, dtype=torch.bfloat16))
        self.register_buffer("lowest", torch.full((D,), math.inf))
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            new = {
                "steps": self.steps + 1, "seen": self.seen + 1, "flag": ~self.flag, "phase": self.phase * 1j,
                "mean": 0.9 * self.mean + 0.1 * x.mean(0), "narrow": (self.narrow + x[0]).to(torch.bfloat16),
                "lowest": torch.minimum(self.lowest, x.min(0).values), "total": self.total + 0.1,
            }  # fmt: skip
            for name, value in new.items():
                if self.replace:
                    setattr(self, name, value)
                else:
                    getattr(self, name).copy_(value)
        return super().forward(x - self.mean)


class MaxNorm(Wrapped):
    """Puts a new tensor under a weight in every step."""

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.net[0]
        layer.weight.data = torch.renorm(layer.weight.data, 2, 0, 0.5)
        return super().forward(x)


class NewParameter(Wrapped):
    """Replaces a parameter in every step."""

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.net[0]
        layer.bias = nn.Parameter(layer.bias.detach().clamp(-0.1, 0.1))
        return super().forward(x)


class Flattens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.lstm.flatten_parameters()
        return self.head(self.lstm(x.view(-1, 2, 4))[0][:, -1])


class MadeLater(Wrapped):
    """Makes buffers when it first sees data: one that was announced, one that was not, and a cache that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = x.detach().std(0) + 0.1
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(3))
        if self.training:
            self.late += 1
        self.register_buffer("cache", torch.arange(min(self.late[0], 5.0)), persistent=False)
        return super().forward(x / self.scale)


class Teacher(nn.Module):
    """A momentum encoder, and a queue with a pointer into it."""

    def __init__(self, through_data: bool = False) -> None:
        super().__init__()
        self.through_data = through_data
        self.student = net()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(2, 16), dim=0))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                for own, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                    if self.through_data:
                        own.data = own.data * 0.9 + other.data * 0.1
                    else:
                        own.mul_(0.9).add_(other, alpha=0.1)
                at = int(self.pointer)
                self.queue[:, at : at + 4] = F.normalize(self.teacher(x), dim=1).T[:, :4]
                self.pointer.fill_((at + 4) % 16)
        return self.student(x) + 0.1 * self.teacher(x).detach()


class Unseen(Wrapped):
    """A teacher, and a mean of all that it sees, written so that PyTorch does not count it as written."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.data.lerp_(x.mean(), 0.1)
        if self.training:
            for own, other in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                own.data.mul_(0.9).add_(other.data, alpha=0.1)
        return super().forward(x - self.mean) + 0.1 * self.teacher(x)


class AlwaysTraining(nn.BatchNorm1d):
    """Normalizes by the batch, in evaluation too, and follows what it sees there."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)


class Renewed(Wrapped):
    """Puts another module in the place of one now and then, as target networks are renewed."""

    def __init__(self) -> None:
        super().__init__()
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            if self.steps % 2 == 0:
                self.target = copy.deepcopy(self.net).requires_grad_(False)
                self.net = copy.deepcopy(self.net)
        return super().forward(x) + 0.1 * self.target(x).detach()


class FrozenAlias(nn.Module):
    """An output layer that is not trained, and is the memory of an embedding that is."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.head = nn.Linear(D, 2)
        self.out.weight = nn.Parameter(self.body.weight.data, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        assert self.out.weight.data_ptr() == self.body.weight.data_ptr()
        return self.head(self.out(torch.relu(self.body(x))))


class InitializedByData(Wrapped):
    """Takes its scale from the first batch that it is trained on, and never again."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(D))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.ready:
            self.scale.copy_(x.std(0) + 0.5)
            self.ready.fill_(True)
        return super().forward(x / self.scale)


class Observes(Wrapped):
    """Follows the range of its inputs, of a shape that the first batch tells, and in evaluation too: an observer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor([]))
        self.register_buffer("range", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        low = x.detach().min(0).values
        if self.low.numel() == 0:
            self.low.resize_(low.shape).copy_(low)
        self.low.copy_(torch.minimum(self.low, low))
        self.range.resize_(low.shape).copy_(self.low.abs())
        return super().forward(x / self.range.clamp(min=1.0))


class Centered(nn.Module):
    """A loss that follows the mean of the outputs, as that of a self-distillation does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(2))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.center = 0.5 * self.center + 0.5 * outputs.detach().mean(0)
        return F.cross_entropy(outputs - self.center, targets, reduction="none")


class WritesParameters(Wrapped):
    """Keeps averages of its weights in parameters that count as trained, and one that follows each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.ema = copy.deepcopy(self.net)
        self.center = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.center.lerp_(x.mean(0), 0.1)
                for own, other in zip(self.ema.parameters(), self.net.parameters(), strict=True):
                    own.lerp_(other, 0.5)
        return super().forward(x - self.center.detach()) + 0 * self.ema(x).detach()


class Spare(Wrapped):
    """Has a part that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)


class Tied(nn.Module):
    """Weights shared as one parameter, and as one memory under two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2)
        self.b.weight = self.a.weight
        self.c.bias.data = self.a.bias.data

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(torch.relu(self.b(torch.relu(self.a(x))))))


class Overlap(Wrapped):
    """Buffers that are views of one another, and expanded ones."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.arange(12.0).view(3, 4)
        self.register_buffer("whole", whole)
        self.register_buffer("part", whole[1:])
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).t())
        self.register_buffer("ids", torch.arange(5).expand(3, -1))
        self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
        self.register_buffer("none", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.whole += 1
        return super().forward(x) + self.part.sum() * 0


class Complex(nn.Module):
    """Trained complex weights, as of a Fourier neural operator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D // 2 + 1, dtype=torch.complex64))
        self.head = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=D))


class Extra(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.count, self.history = 0, [0.0]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.history.append(self.count / 3)
        return super().forward(x) * (1 + 0.01 * self.count)

    def get_extra_state(self) -> dict[str, Any]:
        return {"count": self.count, "history": self.history, "tensor": torch.tensor(self.count)}

    def set_extra_state(self, state: Any) -> None:
        self.count, self.history = int(state["count"]), list(state["history"])


class Checkpointed(nn.Module):
    """A layer that is used twice, with its activations computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.block, self.o = nn.Linear(D, 6), nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.i(x))
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=False)
        return self.o(x)


class Backbone(Wrapped):
    """A frozen backbone in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)).requires_grad_(False)
        self.backbone.eval()

    def forward(self, x: Tensor) -> Tensor:
        assert not self.backbone[1].training
        return super().forward(self.backbone(x))


class Skips(nn.Module):
    """Layers of which each step leaves out some."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(D, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.i(x))
        for block in self.blocks:
            if not self.training or torch.rand(()) < 0.4:
                x = x + torch.relu(block(x))
        return self.o(x)


class Noisy(Wrapped):
    """Draws from the generators of numpy and Python."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * (1 + 0.1 * float(np.random.rand()) + 0.1 * random.random())
        return super().forward(x)


class Odd(Wrapped):
    """Returns more than a tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        return {
            "none": (out, None), "number": {"logits": out, "aux": 0.0}, "text": {"logits": out, "name": "head"},
            "nested": (out, [(out, out)], {"a": (out,)}), "object": Result(out), "deque": deque([out]),
            "named": Named(out, None),
        }[self.kind]  # fmt: skip


class Result:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


Named = namedtuple("Named", ["logits", "cache"])


def of_odd(outputs: Any, targets: Tensor) -> Tensor:
    if isinstance(outputs, dict):
        logits = outputs["logits"]
    else:
        logits = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    return F.cross_entropy(logits, targets, reduction="none")


def odd(kind: str) -> Case:
    return Case(lambda: Odd(kind), given={"loss": of_odd}, settings={"eval.metrics": {}})


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Items made by a function of the index."""

    def __init__(self, item: Callable[[int, Tensor, int], Any], seed: int = 0) -> None:
        self.item = item
        self.x, self.y = xy(seed)

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return self.item(i, self.x[i], int(self.y[i]))


def rows(item: Callable[[int, Tensor, int], Any]) -> Callable[[], Any]:
    return lambda: (Rows(item), Rows(item, 1))


class Keywords(Wrapped):
    def forward(self, pixel_values: Tensor, **rest: Any) -> Tensor:
        return super().forward(pixel_values)


class Warmup(torch.optim.lr_scheduler.LRScheduler):
    """A scheduler that keeps a function."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.factor = lambda epoch: min(1.0, (epoch + 1) / 3)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]


class WithModes(torch.optim.SGD):
    """Steps only in its training mode, as schedule-free optimizers do."""

    mode = ""

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"

    def step(self, closure: Any = None) -> Any:
        assert self.mode == "train", "call optimizer.train() first"
        return super().step(closure)


class Lookahead(torch.optim.SGD):
    """Keeps copies of what the parameters were when it was made, and goes back to them in part in every second step.

    They are to be what all ranks begin with, and not what a rank had made before.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.05)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["slow"] = param.detach().clone()
            group["steps"] = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"] if group["steps"] == 0 else ():
                assert torch.equal(param, self.state[param]["slow"])
        super().step()
        for group in self.param_groups:
            group["steps"] += 1
            for param in group["params"] if group["steps"] % 2 == 0 else ():
                slow = self.state[param]["slow"]
                param.copy_(slow.lerp_(param, 0.5))


def regression() -> Any:
    x, _ = xy()
    return (x, x @ torch.arange(8.0)), (x, x @ torch.arange(8.0))


def padded() -> Any:
    g = torch.Generator().manual_seed(1)
    t = torch.randint(20, (N, 5), generator=g)
    y = t % 4
    y[torch.arange(5)[None] >= torch.randint(0, 6, (N, 1), generator=g)] = -100
    return (t, y), (t, y)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.o = nn.Embedding(20, 8), nn.Linear(8, 4)

    def forward(self, t: Tensor) -> Tensor:
        return self.o(self.e(t)).transpose(1, 2)


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.h = nn.Embedding(20, 6, sparse=True), nn.Linear(6, 2)

    def forward(self, t: Tensor) -> Tensor:
        return self.h(self.e(t).mean(1))


def tokens() -> tuple[Tensor, Tensor]:
    t = torch.randint(20, (N, 4), generator=torch.Generator().manual_seed(2))
    return t, (t[:, 0] > 9).long()

def sgd(**args: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=0.05, **args)


def made(name: str, **args: Any) -> dict[str, Any]:
    return {"optimizer": lambda params: getattr(torch.optim, name)(params, **args)}


def two_groups(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": params[:2], "lr": 0.01}, {"params": params[2:], "momentum": 0.9}], lr=0.05)


def narrow(dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: tuple((x.to(dtype), y) for x, y in (xy(), xy(1)))


class SparseCounting(Sparse):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, t: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return super().forward(t)


AVERAGED = {"aggregation.optimizer_state": "average"}
SOLO = {"aggregation.mode": "majority"}
SYNC = {"algorithm.name": "sync_sgd", "train.tau": 1}
EAGER = {"algorithm.name": "eager_sgd", "train.tau": 1}
ASGD = {"algorithm.name": "asgd", "train.tau": 1}
INT8 = {"aggregation.wire": "int8"}

CASES: dict[str, Case] = {
    "buffers of all types": Case(with_buffers(**{f"of_{name}": torch.ones(3).to(t) for name, t in TYPES.items()})),
    "an expanded integer buffer": Case(with_buffers(ids=torch.arange(8).expand(4, -1))),
    "an expanded bool buffer": Case(with_buffers(mask=torch.ones(8, 8, dtype=torch.bool).tril().expand(2, 8, 8))),
    "large integers": Case(with_buffers(hash=torch.tensor([2**24 + 1, 2**31 + 1, 2**62 + 1]))),
    "views, masks and empty tensors": Case(Overlap),
    "buffers written in place": Case(lambda: Counting(False)),
    "buffers replaced": Case(lambda: Counting(True)),
    "buffers replaced, sync": Case(lambda: Counting(True), settings=SYNC),
    "buffers replaced, delayed": Case(lambda: Counting(True), settings={"aggregation.delayed": True}),
    "buffers by policy": Case(lambda: Counting(True), local=("mean",), settings={"aggregation.state": {
        "steps": "sum", "seen": "max", "narrow": "average", "mean": "local", "phase": "average"}}),
    "a weight's memory replaced": Case(MaxNorm),
    "a weight's memory replaced, outer": Case(MaxNorm, settings={"aggregation.outer_momentum": 0.5}),
    "a parameter replaced": Case(NewParameter),
    "an LSTM that flattens": Case(Flattens),
    "buffers made later": Case(MadeLater, local=("cache",)),
    "a teacher and a queue": Case(Teacher),
    "a teacher through .data": Case(lambda: Teacher(True)),
    "statistics that an evaluation changes": Case(lambda: nn.Sequential(AlwaysTraining(D), net())),
    "weights that an evaluation changes": Case(
        lambda: nn.Sequential(nn.EmbeddingBag(20, 6, max_norm=1.0), nn.Linear(6, 2)), lambda: (tokens(), tokens())),
    "written unseen": Case(Unseen),
    "written unseen, sync": Case(Unseen, settings=SYNC),
    "a teacher, sync": Case(Teacher, settings=SYNC),
    "a module replaced": Case(Renewed),
    "an observer": Case(Observes),
    "an observer, sync": Case(Observes, settings=SYNC),
    "a loss with a buffer": Case(net, given={"loss": Centered()}),
    "parameters written in forward": Case(WritesParameters),
    "parameters written in forward, sync": Case(WritesParameters, settings=SYNC),
    "parameters written in forward, partial gradients": Case(WritesParameters, settings=EAGER),
    "a scale taken from data": Case(InitializedByData),
    "a scale taken from data, sync": Case(InitializedByData, settings=SYNC),
    "counted, sync": Case(lambda: Counting(False), settings={
        **SYNC, "aggregation.state": {"steps": "sum"}, "checkpoint.every_rounds": 2}),
    "tied weights": Case(Tied),
    "a frozen alias of a trained weight": Case(FrozenAlias),
    "complex weights": Case(Complex),
    "complex weights, sync": Case(Complex, settings=SYNC),
    "bfloat16 weights": Case(lambda: net().to(torch.bfloat16), lambda: tuple(
        (x.to(torch.bfloat16), y) for x, y in (xy(), xy(1)))),
    "bfloat16 weights, frozen in part": Case(lambda: nn.Sequential(
        nn.Linear(D, D, dtype=torch.bfloat16).requires_grad_(False), Cast(), net()), lambda: tuple(
        (x.to(torch.bfloat16), y) for x, y in (xy(), xy(1)))),
    "mixed types, sync": Case(lambda: nn.Sequential(
        nn.Linear(D, D, dtype=torch.bfloat16), Cast(), net()), lambda: tuple(
        (x.to(torch.bfloat16), y) for x, y in (xy(), xy(1))), settings=SYNC),
    "extra state": Case(Extra),
    "spectral norm": Case(lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(D, 6)), nn.Linear(6, 2))),
    "weight norm": Case(lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(D, 6)), nn.Linear(6, 2))),
    "a checkpointed layer used twice": Case(Checkpointed),
    "a backbone in eval mode": Case(Backbone),
    "layers left out, Adam averaged": Case(Skips, given=made("Adam", lr=0.01), settings=AVERAGED),
    "layers left out, momentum averaged": Case(Skips, given={"optimizer": sgd(momentum=0.9)}, settings=AVERAGED),
    "NAdam averaged": Case(net, given=made("NAdam", lr=0.01), settings=AVERAGED),
    "random numbers of numpy and Python": Case(Noisy),
    "BatchNorm": Case(lambda: net(nn.BatchNorm1d(6))),
    "BatchNorm without running statistics": Case(lambda: net(nn.BatchNorm1d(6, track_running_stats=False))),
    "instance norm with statistics": Case(lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(), nn.Linear(D, 2))),
    "Adagrad": Case(net, given=made("Adagrad", lr=0.05)),
    "Adagrad, sparse embedding": Case(lambda: Sparse(), lambda: (tokens(), tokens()), given=made("Adagrad", lr=0.05)),
    "an optimizer with modes": Case(net, given={"optimizer": lambda params: WithModes(params, lr=0.05)}),
    "a part that is not used, sync": Case(Spare, given=made("AdamW", lr=0.01, weight_decay=0.1), settings=SYNC),
    "a class that only sums": Case(net, settings={"algorithm.name": "byteps", "train.tau": 1}),
    "a rate that is a tensor": Case(net, given=made("Adam", lr=torch.tensor(0.01))),
    "an optimizer with copies of the start": Case(net, given={"optimizer": Lookahead}),
    "a scheduler with a function": Case(net, given={"scheduler": Warmup}),
    "a scheduler of several": Case(net, given={"scheduler": lambda o: torch.optim.lr_scheduler.SequentialLR(o, [
        torch.optim.lr_scheduler.ConstantLR(o, 0.1, 1), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [1])}),
    **{f"outputs with {kind}": odd(kind) for kind in ("none", "number", "text", "nested", "object", "deque", "named")},
    "items with texts": Case(Keywords, rows(lambda i, x, y: {"pixel_values": x, "labels": y, "name": f"{i}.png"})),
    "items of a mapping": Case(Keywords, rows(lambda i, x, y: UserDict(pixel_values=x, labels=y))),
    "an ordered mapping": Case(Keywords, rows(lambda i, x, y: OrderedDict(pixel_values=x, labels=y))),
    "numpy items": Case(net, rows(lambda i, x, y: (x.numpy(), np.int64(y)))),
    "padding in the targets": Case(Tagger, padded, settings={"eval.metrics": {}}),
    "regression": Case(lambda: nn.Sequential(nn.Linear(D, 1), nn.Flatten(0)), regression, settings={
        "train.loss": "mse_loss", "eval.metrics": {}}),
    "class weights": Case(net, settings={"train.loss_args": {"weight": [1.0, 2.0]}}),
    "partial rounds, buffers replaced": Case(lambda: Counting(True), settings=SOLO),
    "partial rounds, bfloat16": Case(lambda: net().to(torch.bfloat16), lambda: tuple(
        (x.to(torch.bfloat16), y) for x, y in (xy(), xy(1))), settings=SOLO),
    "partial gradients, complex": Case(Complex, settings=EAGER),
    # with what travels in fewer bits, in parts, or to a server
    "buffers replaced, int8": Case(lambda: Counting(True), settings=INT8),
    "bfloat16 weights, averaged iterates": Case(lambda: net().to(torch.bfloat16), narrow(torch.bfloat16), settings={
        "eval.average": "ema", "eval.half_life": 1000.0}),
    "float16 weights, float16": Case(lambda: net().to(torch.float16), narrow(torch.float16), settings={
        "aggregation.wire": "float16"}),
    "float16 weights, sync, float16": Case(lambda: net().to(torch.float16), narrow(torch.float16), settings={
        **SYNC, "aggregation.wire": "float16"}),
    "complex weights, sync, int8": Case(Complex, settings={**SYNC, **INT8}),
    "a module replaced, int8": Case(Renewed, settings=INT8),
    "BatchNorm in parts, sync": Case(lambda: net(nn.BatchNorm1d(6)), settings={**SYNC, "train.micro_batches": 2}),
    "layers left out, sync": Case(Skips, settings=SYNC),
    "layers left out in parts, sync": Case(Skips, settings={**SYNC, "train.micro_batches": 2}),
    "padding in parts": Case(Tagger, padded, settings={"train.micro_batches": 2, "eval.metrics": {}}),
    "outputs with none in parts": Case(lambda: Odd("none"), given={"loss": of_odd}, settings={
        "train.micro_batches": 2, "eval.metrics": {}}),
    "padding, pruned": Case(Tagger, padded, settings={"sampling.scheme": "infobatch", "eval.metrics": {}}),
    "a quorum, buffers replaced": Case(lambda: Counting(True), settings={
        "aggregation.mode": "quorum", "aggregation.quorum": 1}),
    "a server, buffers replaced": Case(lambda: Counting(True), settings=ASGD),
    "a server, a teacher": Case(Teacher, settings={"algorithm.name": "ringleader_asgd"}),
    "a server, layers left out, extra groups": Case(Skips, given={"optimizer": two_groups}, settings=ASGD),
    "a server of models, a module replaced": Case(Renewed, settings={"algorithm.name": "async_diloco"}),
    "a server, sparse, summed": Case(SparseCounting, lambda: (tokens(), tokens()), settings={
        **ASGD, "aggregation.state": {"steps": "sum"}}),
}  # fmt: skip

NOT_REPEATABLE = (
    "parameters written in forward, partial gradients", "partial rounds, buffers replaced", "partial rounds, bfloat16",
    "partial gradients, complex", "a quorum, buffers replaced",
    *(name for name in CASES if name.startswith("a server")),
)  # fmt: skip
"""Which rank joins which round is decided by the clock there: resumed is not the same bit by bit."""

