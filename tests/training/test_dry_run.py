"""The dry run: it takes whatever trains, refuses in one line what would fail in a step, and leaves nothing behind."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, lr_scheduler
from torch.utils.checkpoint import checkpoint

from hvd_hetero import algorithms
from hvd_hetero.config.load import load
from hvd_hetero.errors import ConfigError
from hvd_hetero.random_state import RandomState, seed_all
from hvd_hetero.training.dry_run import build
from hvd_hetero.worker.components import Components, UserObjects

pytestmark = pytest.mark.horovod

X = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(24 * 4).reshape(24, 4) % 20
Y = torch.arange(24) % 3
TWO = {"fast": {"ranks": [0]}, "slow": {"ranks": [1]}}
BASE = {"cluster.classes": TWO, "train.tau": {"fast": 2, "slow": 1}, "train.batch_size": 4, "train.loss_args": {},
        "train.epochs": 3, "train.optimizer_args": {}}  # fmt: skip


def tried(model: Any, settings: dict[str, Any] | None = None, data: Any = (X, Y), **given: Any) -> Components:
    """Dry run of a model on two classes; ``settings`` are configuration keys, ``given`` what a program epochs."""
    config = load((), BASE | (settings or {}), algorithms.method)
    return build(config, UserObjects(model=model, train_data=data, test_data=data, **given))


class Net(nn.Module):
    """Head of three classes behind some layers, and a forward pass made of a function."""

    def __init__(self, *layers: nn.Module, run: Callable[[Net, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.layers, self.head, self.run = nn.Sequential(*layers), nn.Linear(8, 3), run

    def forward(self, x: Tensor) -> Any:
        return self.head(self.layers(x)) if self.run is None else self.run(self, x)


class Keeps(Net):
    """Keeps what cannot be copied, and changes whatever it holds in every forward pass."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.lock, self.file, self.generator = threading.Lock(), open(__file__), torch.Generator()  # noqa: SIM115
        self.calls, self.seen, self.last, self.array = 0, list[int](), dict[str, Any](), np.zeros(3)
        self.register_buffer("teacher", torch.zeros(8).expand(4, 8))
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)
        self.register_forward_hook(lambda module, inputs, output: self.seen.append(len(output)))

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            self.calls += 1
            self.last["inputs"], self.array[0] = x, self.calls
            self.teacher = self.teacher + torch.rand(8, generator=self.generator)
            self.frozen.data = self.frozen.data * 0.5
            random.random(), np.random.rand()
            out: Tensor = super().forward(x)
            return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.out(self.embedding(tokens).mean(1))
        return out


class Bag(nn.Module):
    """Gradients of the embedding are sparse."""

    def __init__(self, head: bool = True) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8 if head else 3, sparse=True), nn.Linear(8, 3) if head else None

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.embedding(tokens).mean(1)
        return found if self.head is None else self.head(found)


class Free(SGD):
    """Steps in training mode only, as schedule-free optimizers do; keeps what its parameter groups do not tell."""

    def __init__(self, params: Any, lr: float, power: int) -> None:
        super().__init__(params, lr=lr)
        self.power, self.mode = power, "none"

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"

    def step(self) -> None:  # type: ignore[override]
        assert self.mode == "train" and self.power == 3
        super().step()


def twice(net: Net, x: Tensor) -> Tensor:
    out: Tensor = net.head(net.layers(net.layers(x)))
    return out


def checkpointed(reentrant: bool) -> Callable[[Net, Tensor], Any]:
    def run(net: Net, x: Tensor) -> Any:
        first = checkpoint(net.layers, x.requires_grad_(), use_reentrant=reentrant)
        return net.head(checkpoint(net.layers, first, use_reentrant=reentrant))

    return run


def linear(**options: Any) -> Net:
    return Net(nn.Linear(8, 8), nn.ReLU(), **options)


def hooked() -> nn.Module:
    net = linear()
    net.layers.register_forward_pre_hook(lambda module, inputs: None)
    net.layers[0].register_full_backward_hook(lambda module, inward, outward: None)
    return net


def warm_restarts(optimizer: Any) -> Any:
    return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2)


def sequence(optimizer: Any) -> Any:
    parts = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)]
    return lr_scheduler.SequentialLR(optimizer, parts, [1])


def chain(optimizer: Any) -> Any:
    parts = [lr_scheduler.StepLR(optimizer, 1), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts)


def groups(params: list[nn.Parameter]) -> Any:
    return torch.optim.Adam([{"params": params[:1], "lr": 0.1}, {"params": params[1:2]}], lr=0.01)


SOLO, NORM = {"aggregation.mode": "solo"}, {"train.clip_norm": 1.0}
SYNC, EAGER = {"algorithm.name": "sync_sgd"}, {"algorithm.name": "eager_sgd"}
OPTIMIZER = "train.optimizer"
def max_norm(net: Net, x: Tensor) -> Tensor:
    """Bounds the weights in every step."""
    if net.training:
        net.head.weight.data = torch.renorm(net.head.weight.data, 2, 0, 0.1)
    out: Tensor = net.head(x)
    return out


SCALED = {"train.groups": [{"match": "*.bias", "lr_scale": 0.1}]}
TAKEN: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "old weight norm": (lambda: Net(nn.utils.weight_norm(nn.Linear(8, 8))), {}),
    "weight norm": (lambda: Net(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))), {}),
    "old spectral norm": (lambda: Net(nn.utils.spectral_norm(nn.Linear(8, 8))), {}),
    "spectral norm": (lambda: Net(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))), {}),
    "lazy": (lambda: Net(nn.LazyLinear(8), nn.LazyBatchNorm1d()), {}),
    "tied": (Tied, {"data": (TOKENS, Y)}),
    "a layer twice": (lambda: linear(run=twice), {}),
    "checkpointed": (lambda: linear(run=checkpointed(False)), {"settings": SYNC}),
    "checkpointed reentrantly": (lambda: linear(run=checkpointed(True)), {}),
    "hooks": (hooked, {}),
    "what cannot be copied": (Keeps, {}),
    "wholly in evaluation mode": (lambda: Net(nn.Linear(8, 8), nn.Dropout()).eval(), {}),
    "frozen in evaluation mode": (lambda: Net(nn.BatchNorm1d(8).requires_grad_(False).eval()), {}),
    "norm of one pixel row": (lambda: Net(nn.Unflatten(1, (2, 4)), nn.BatchNorm1d(2), nn.Flatten()), {
        "settings": {"train.batch_size": 1}}),
    "sparse": (Bag, {"data": (TOKENS, Y)}),
    "sparse, Adagrad": (Bag, {"data": (TOKENS, Y), "settings": {OPTIMIZER: "Adagrad"}}),
    "sparse alone": (lambda: Bag(False), {"data": (TOKENS, Y), "settings": {OPTIMIZER: "SparseAdam"}}),
    "sparse into flat gradients": (Bag, {"data": (TOKENS, Y), "settings": {**EAGER, **NORM, OPTIMIZER: "Adam"}}),
    "Adagrad": (linear, {"settings": {OPTIMIZER: "Adagrad"}}),
    "modes": (linear, {"optimizer": lambda params: Free(params, 0.1, power=3)}),
    "modes, synchronous": (linear, {"optimizer": lambda params: Free(params, 0.1, power=3), "settings": SYNC}),
    "two groups, not everything": (linear, {"optimizer": groups}),
    "warm restarts": (linear, {"scheduler": warm_restarts}),
    "sequence with a lambda": (linear, {"scheduler": sequence}),
    "chain": (linear, {"scheduler": chain}),
    "one cycle": (linear, {"scheduler": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=4)}),
    "one cycle and groups": (linear, {"settings": SCALED, "scheduler": lambda o: lr_scheduler.OneCycleLR(
        o, [group["lr"] for group in o.param_groups], total_steps=4)}),
    "writes to its weights": (lambda: linear(run=max_norm), {}),
    "writes to its weights, models are pushed": (lambda: linear(run=max_norm), {
        "settings": {"algorithm.name": "async_diloco"}}),
    "no scheduler after all": (linear, {"scheduler": lambda optimizer: None}),
}  # fmt: skip


def content(model: nn.Module) -> list[tuple[str, Any]]:
    """Everything that a model holds, and the very objects."""
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found.append((f"{name}.{key}", (id(value), repr(value) if not isinstance(value, Tensor) else "")))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    places = [(name, (id(t), t.data_ptr(), t.requires_grad, t.grad is None, t.clone())) for name, t in tensors.items()]
    return found + places


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return all(map(same, a, b)) if isinstance(a, tuple) else bool(a == b)


@pytest.mark.parametrize("name", TAKEN)
def test_what_trains_is_taken_and_left_as_it_was(name: str) -> None:
    make, how = TAKEN[name]
    model = make()
    before = content(model) if name != "lazy" else []
    assert tried(model, **how).model is model
    if name == "lazy":
        assert model.layers[0].weight.shape == (8, 8) and model.layers[1].num_batches_tracked == 0
        return
    after = content(model)
    assert [key for key, _ in before] == [key for key, _ in after]
    changed = [key for (key, a), (_, b) in zip(before, after, strict=True) if not same(a, b)]
    assert not changed


def test_random_generators_are_left_as_they_were() -> None:
    """They are the seed's, with what the model's weights have drawn from it."""
    tried(Keeps, {"run.seed": 3})
    state = RandomState.capture()
    seed_all(3)
    Keeps()
    expected = RandomState.capture()
    assert state.python == expected.python and str(state.numpy) == str(expected.numpy)
    assert torch.equal(state.cpu, expected.cpu)


def test_lazy_modules_get_the_same_weights_everywhere() -> None:
    torch.manual_seed(7)
    first, second = (tried(lambda: Net(nn.LazyLinear(8))).model for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# ---- what is refused ------------------------------------------------------------------------------------------------


def fails_in_place(net: Net, x: Tensor) -> Tensor:
    hidden = torch.sigmoid(net.layers(x))
    out: Tensor = net.head(hidden * hidden)
    hidden += 1
    return out


def remembers(net: Net, x: Tensor) -> Tensor:
    net.hidden = torch.tanh(net.layers(x) + getattr(net, "hidden", 0))  # type: ignore[assignment]
    out: Tensor = net.head(net.hidden)
    return out


def no_gradient(optimizer: SGD) -> None:
    raise NotImplementedError("this optimizer only looks on")


class Closure(SGD):
    def step(self, closure: Any = None) -> None:
        closure()


class Forgets(lr_scheduler.LRScheduler):
    """Cannot be saved: it holds a lock."""

    def __init__(self, optimizer: Any) -> None:
        self.lock = threading.Lock()
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return list(self.base_lrs)


def unstable(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none") / outputs.std(0).mean()


class Bare:
    """A schedule whose state nobody could save."""

    def __init__(self, optimizer: Any) -> None:
        pass

    def step(self) -> None:
        pass


def grows(net: Net, x: Tensor) -> Tensor:
    if net.training and not hasattr(net, "late"):
        net.late = nn.Linear(3, 3)
    out = net.head(net.layers(x))
    late: Tensor = net.late(out) if hasattr(net, "late") else out  # type: ignore[operator]
    return late


def learned(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return nn.functional.cross_entropy(outputs, targets, reduction="none"), outputs.softmax(1).amax(1)


ASGD = {"algorithm.name": "asgd", "train.tau": 1}
SMALL = {"train.batch_size": {"fast": 4, "slow": 1}}
PAIRS = {"data": (X, Y.float()), "loss": lambda o, y: (o[:, 0] - y) ** 2}
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "auxiliary outputs": (
        lambda: linear(run=lambda net, x: (net.head(x), net.head(x)) if net.training else net.head(x)), {},
        "train.loss='cross_entropy': the loss fails on the model's outputs ([2, 3] float32, [2, 3] float32) for a "
        "batch of 2 in training"),
    "one number a sample, and a loss of classes": (
        lambda: linear(run=lambda net, x: net.head(x)[:, 0]), {},
        "train.loss='cross_entropy': the loss fails on the model's outputs [2] float32 for a batch of 2 in evaluation"),
    "complex classes": (linear, {"data": (X, Y.to(torch.complex64))},
                        "train.loss='cross_entropy': the loss fails on the model's outputs [2, 3]"),
    "classes of a type that torch cannot index": (linear, {"data": (X, Y.to(torch.uint16))},
                                                  "train_data='tuple': its first training samples cannot be read"),
    "outputs without a shape": (
        lambda: linear(run=lambda net, x: torch.nested.nested_tensor(list(net.head(x)))), {},
        "train.loss='cross_entropy': the loss fails on the model's outputs Tensor for a batch of 2 in evaluation"),
    "the accuracy of outputs without a shape": (
        lambda: linear(run=lambda net, x: torch.nested.as_nested_tensor(list(net.head(x)))),
        {"loss": lambda o, y: nn.functional.cross_entropy(torch.stack(o.unbind()), y, reduction="none")},
        "eval.metrics.accuracy='accuracy': takes tensors, and there are outputs Tensor and targets [4]"),
    "training mode alone": (
        lambda: linear(run=lambda net, x: net.head(x[:, :5] if net.training else x)), {},
        "model='Net': the model fails on a batch of 2 in training (inputs [2, 8] float32, targets [2] int64)"),
    "in place": (lambda: linear(run=fails_in_place), {}, "(test_dry_run.py, line "),
    "kept from step to step": (lambda: linear(run=remembers), {}, "backward through the graph a second time"),
    "one sample": (lambda: Net(nn.BatchNorm1d(8)), {"settings": SMALL},
                   "train.batch_size={'fast': 4, 'slow': 1}: a step of one sample fails: the model fails on a batch "
                   "of 1 in training (inputs [1, 8] float32, targets [1] int64): ValueError: Expected more than 1"),
    "one sample, no number": (linear, {"settings": SMALL, "loss": unstable},
                              "train.batch_size={'fast': 4, 'slow': 1}: a step of one sample fails: is not a number"),
    "sparse, synchronous": (Bag, {"data": (TOKENS, Y), "settings": SYNC},
                            "model='Bag': embedding.weight has sparse gradients, and sync_sgd sums dense ones"),
    "sparse, clipped": (Bag, {"data": (TOKENS, Y), "settings": NORM},
                        "train.clip_norm=1.0: embedding.weight has sparse gradients"),
    "sparse, Adam": (Bag, {"data": (TOKENS, Y), "settings": {OPTIMIZER: "Adam"}}, "train.optimizer='Adam': fails in a"),
    "shared and checkpointed, synchronous": (
        lambda: linear(run=checkpointed(True)), {"settings": SYNC},
        "model='Net': the gradient of layers.0.weight is made in 2 pieces, and sync_sgd sends the first one"),
    "lazy, and not used": (lambda: Net(nn.LazyLinear(8), run=lambda net, x: net.head(x)), {},
                           "model='Net': layers.0.weight is lazy, and its forward pass does not use it"),
    "lazy, and does not fit": (lambda: Net(nn.LazyConv2d(8, 3)), {}, "model='Net': it has lazy modules, and fails"),
    "asks for a closure": (linear, {"optimizer": lambda params: Closure(params, 0.1)}, "optimizer='<lambda>': fails"),
    "a metric of the whole set, all pairs": (lambda: nn.Linear(8, 1), PAIRS | {"metrics": {"rmse": {
        "target": lambda o, y: ((o - y) ** 2).mean().sqrt(), "over": "dataset"}}},
        "metrics.rmse='<lambda>': broadcasts outputs [4, 1] and targets [4] against each other"),
    "a metric of samples, all pairs": (
        lambda: nn.Linear(8, 1), PAIRS | {"metrics": {"far": lambda o, y: (o - y).abs().mean(1)}},
        "metrics.far='<lambda>': broadcasts outputs [4, 1] and targets [4] against each other"),
    "a parameter in two groups": (
        linear, {"optimizer": lambda params: SGD([{"params": params}, {"params": params[:1]}], 0.1)},
        "optimizer='<lambda>': cannot be made: ValueError: some parameters appear in more than one"),
    "modes and partial averages": (linear, {"optimizer": lambda params: Free(params, 0.1, power=3), "settings": SOLO},
                                   "optimizer='<lambda>': has modes, train() and eval(), which do not go with "
                                   "aggregation.mode=solo"),
    "a schedule too short": (linear, {"scheduler": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=2)},
                             "scheduler='<lambda>': does not last through the epochs: ValueError: Tried to step 3"),
    "a schedule of one rate": (linear, {"settings": {**SCALED, "train.scheduler": "OneCycleLR",
                                                     "train.scheduler_args": {"max_lr": 0.1, "total_steps": 4}}},
                               "train.scheduler='OneCycleLR': sets one rate for all parameters, so that lr_scale of"),
    "writes to its weights, server": (lambda: linear(run=max_norm), {"settings": ASGD},
                                      "model='Net': it writes to its trained parameter head.weight, and asgd takes"),
    "a schedule that needs figures": (linear, {"scheduler": lr_scheduler.ReduceLROnPlateau},
                                      "scheduler='ReduceLROnPlateau': does not last"),
    "a schedule without a state": (linear, {"scheduler": Bare},
                                   "scheduler='Bare': makes a Bare, which has no state_dict()"),
    "a layer made while training": (lambda: linear(run=grows), {},
                                    "model='late.weight': has a gradient, but the optimizer was made without it"),
    "weights that are learned": (linear, {"loss": learned},
                                 "loss='learned': returns (values, weights), and its weights are learned"),
    "a schedule that cannot be saved": (linear, {"scheduler": Forgets},
                                        "scheduler='Forgets': no checkpoint can hold scheduler.lock, a _thread.lock"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_fail_is_refused_and_left_as_it_was(name: str) -> None:
    make, how, printed = REFUSED[name]
    model = make()
    before = None if name.startswith("lazy") else content(model)
    with pytest.raises(ConfigError) as caught:
        tried(model, **how)
    message = str(caught.value)
    assert printed in message and "\n" not in message and "; " in message, message
    assert before is None or all(same(a, b) for (_, a), (_, b) in zip(before, content(model), strict=True))


def test_a_default_device_that_is_left_behind_is_refused() -> None:
    def make() -> nn.Module:
        made = linear()
        torch.set_default_device("meta")
        return made

    try:
        with pytest.raises(ConfigError, match=r"model='.*make': has left torch.set_default_device\('meta'\) behind"):
            tried(make)
    finally:
        torch.set_default_device(None)


def test_gradients_that_are_switched_off_are_told() -> None:
    with torch.no_grad(), pytest.raises(ConfigError, match="model='Net': is made, or trained, where gradients are"):
        tried(linear())
    assert tried(linear(), data=(X.clone().requires_grad_(), Y))


def test_what_cannot_be_saved_is_no_matter_where_nothing_is() -> None:
    tried(linear, {"checkpoint.every_sec": None}, scheduler=Forgets)


@pytest.mark.parametrize(("settings", "least"), [
    ({}, 1), ({"cluster.too_slow": "shrink_batch", "train.tau": 4}, 2), ({"algorithm.name": "dlb"}, 2),
    ({"train.batch_size": 2}, 2),
])
def test_what_a_norm_needs_is_found_out_where_it_matters(settings: dict[str, Any], least: int) -> None:
    assert tried(lambda: Net(nn.BatchNorm1d(8)), settings).min_batch == least
    assert tried(linear, settings).min_batch == 1


def test_what_needs_a_gpu_is_not_tried_where_there_is_none(without_gpus: None) -> None:
    """Data are read all the same. Where one class is on CPUs, the model has to work there."""
    def run(net: Net, x: Tensor) -> Any:
        raise RuntimeError("this kernel is for GPUs")

    on_gpu = {name: {**ranks, "device": "cuda"} for name, ranks in TWO.items()}
    tried(linear(run=run), {"cluster.classes": on_gpu})
    with pytest.raises(ConfigError, match="for GPUs"):
        tried(linear(run=run), {"cluster.classes": {**on_gpu, "slow": TWO["slow"]}})
    with pytest.raises(ConfigError, match="empty split"):
        tried(linear(run=run), {"cluster.classes": on_gpu}, data=(X[:0], Y[:0]))


# ---- modes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def heard() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def test_what_learns_in_evaluation_mode_is_told(heard: list[warnings.WarningMessage]) -> None:
    net = Net(nn.Sequential(nn.Linear(8, 8), nn.Dropout()), nn.BatchNorm1d(8).requires_grad_(False))
    net.layers.eval()
    tried(net)
    printed = [str(one.message) for one in heard]
    assert len(printed) == 1 and printed[0].startswith("layers is in evaluation mode and has trainable parameters")
    tried(Net(nn.Linear(8, 8), nn.BatchNorm1d(8).requires_grad_(False).eval()))
    tried(Net(nn.Linear(8, 8)).eval())
    assert len(heard) == 1, "frozen ones, and a whole model in that mode, are nothing to be told of"
