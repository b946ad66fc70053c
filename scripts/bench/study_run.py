"""One run of scripts/bench/study: ranks of two speeds in one process, whose steps a GPU does as recorded graphs.

The plan, the weights and the draws are the trainer's (hvd_hetero.planning); only the work of ranks is done here, one
rank after the other from the round's start, so that many runs share a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_hetero.cluster.device_classes import Cluster, DeviceClass
from hvd_hetero.models import build
from hvd_hetero.planning.local_steps import derive_tau
from hvd_hetero.planning.plan import NORMALISED, make_plan, progress_factors
from hvd_hetero.planning.sampling import Sampler

MOMENTUM, DECAY, WARM_UP = 0.9, 1e-4, 0.03
PADDING = 4
EVAL_BATCH = 1000
LOCKSTEP_TAU = 16
"""Steps between two looks at the clock where all ranks step together."""
LOOKED_AT = 16
"""Times in a run that it is evaluated."""
AHEAD = 2
"""Rounds that are launched before the device has done them."""


@dataclass(frozen=True)
class Task:
    """Images and labels on the device; the images of training with a border of zeros, from which crops are taken."""

    train: Tensor
    labels: Tensor
    held_back: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    model: str
    flips: bool = True

    @property
    def pixels(self) -> int:
        """Of a side of an image, as models see it."""
        return self.train.shape[-1] - 2 * PADDING

    @property
    def device(self) -> torch.device:
        return self.train.device


@dataclass(frozen=True)
class Method:
    """What is compared.

    Attributes:
        kind: ``fast``: the fast ranks alone, all steps together; ``sync``: all ranks so, at the pace of the slowest;
            ``dlb``: so with batches by speed; ``local``: local SGD.
        tau: local steps of the fast class.
        scheme: of sampling; ``weights``: of aggregation.
    """

    kind: str
    tau: int = LOCKSTEP_TAU
    weights: str = "steps"
    scheme: str = "uniform"
    ratio: float = 0.5
    until: float = 1.0


@dataclass(frozen=True)
class Setting:
    """A cluster of fast ranks and slow ones of a speed below 1, and what a run has.

    Attributes:
        budget: in steps of a fast rank.
        average_cost: what one average takes, in steps of a fast rank.
    """

    fast: int
    slow: int
    speed: float
    batch: int
    budget: int
    average_cost: float = 0.0

    @property
    def cluster(self) -> Cluster:
        ranks = range(self.fast + self.slow)
        classes = [DeviceClass("fast", "cpu", tuple(ranks[: self.fast]))]
        if self.slow:
            classes.append(DeviceClass("slow", "cpu", tuple(ranks[self.fast :])))
        return Cluster(tuple(classes), ())


@dataclass(frozen=True)
class Rank:
    """What one rank does in a round, and how much its model and its running statistics count in the average."""

    group: str
    tau: int
    weight: float
    coefficient: float


@dataclass(frozen=True)
class Shape:
    """A method on a cluster: who does what in a round, which takes so many steps of a fast rank."""

    ranks: tuple[Rank, ...]
    batch: int
    cost: float


def shape_of(method: Method, at: Setting, samples: int) -> Shape:
    """Lay out a round of a method."""
    power = at.fast + at.slow * at.speed
    if method.kind != "local":
        whole = {"fast": at.fast, "sync": at.fast + at.slow, "dlb": power}[method.kind] * at.batch
        step = 1 / at.speed if method.kind == "sync" else 1.0
        meets = at.fast if method.kind == "fast" else at.fast + at.slow
        cost = method.tau * (step + (at.average_cost if meets > 1 else 0.0))
        return Shape((Rank("fast", method.tau, 1.0, 1.0),), round(whole), cost)
    seconds = {"fast": 1.0} | ({"slow": 1 / at.speed} if at.slow else {})
    batches = dict.fromkeys(seconds, at.batch)
    plan = make_plan(at.cluster, samples, derive_tau(method.tau, seconds), batches, weights=method.weights)
    factors = progress_factors(plan, 2.0) if method.weights == NORMALISED else {}
    ranks = [Rank(c.name, c.tau, c.weight, c.weight * factors.get(c.name, 1.0)) for c in plan.by_rank()]
    slowest = max(r.tau * seconds[r.group] for r in ranks)
    return Shape(tuple(ranks), at.batch, slowest + at.average_cost)


class Machine:
    """A model, its training step and its evaluation, recorded where the device can do that; for one run at a time.

    Attributes:
        weights: ``[P]`` all parameters; ``momentum``: as many; ``stats``: the running statistics.
        losses: ``[n]`` of each sample when it was last trained on.
        rows, moves, rates: samples, their crops and flips, and learning rates of an epoch, as the steps take them.
        at: the step of the epoch.
    """

    def __init__(self, task: Task, batch: int) -> None:
        device, samples = task.device, len(task.labels)
        self.task, self.batch = task, batch
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        with self.on_stream():
            self.model = self._build().to(device)
            self.parameters = list(self.model.parameters())
            self.weights = flattened(self.parameters)
            self.stats = flattened(list(self.model.buffers()))
            self.momentum = torch.zeros_like(self.weights)
            self.losses = torch.full((samples,), math.inf, device=device)
            self.sample_weights = torch.ones(samples, device=device)
            self.at = torch.zeros(1, dtype=torch.long, device=device)
            self.span, self.grid = torch.arange(batch, device=device), torch.arange(task.pixels, device=device)
            self.right = torch.zeros(2, device=device)
            self.rows = torch.zeros(samples, dtype=torch.long, device=device)
            self.moves = torch.zeros(samples, 3, dtype=torch.long, device=device)
            self.rates = torch.zeros(samples // batch, device=device)
            self.step, self.evaluate = recorded(self._step, device), recorded(self._evaluate, device)

    def _build(self) -> nn.Module:
        model = build(self.task.model, None, {"in_channels": self.task.train.shape[1]})
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = None
        return model

    def reset(self, seed: int) -> None:
        """Begin a run: new weights, and nothing known of any sample."""
        torch.manual_seed(seed)
        new = self._build()
        for mine, fresh in ((self.weights, new.parameters()), (self.stats, new.buffers())):
            mine.copy_(torch.cat([tensor.detach().reshape(-1) for tensor in fresh]))
        self.momentum.zero_()
        self.losses.fill_(math.inf)
        self.sample_weights.fill_(1)

    def on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _step(self) -> None:
        place = self.at * self.batch + self.span
        rows, moves = self.rows[place], self.moves[place]
        y = moves[:, :1] + self.grid
        x = moves[:, 1:2] + torch.where(moves[:, 2:] > 0, self.task.pixels - 1 - self.grid, self.grid)
        channels = torch.arange(self.task.train.shape[1], device=rows.device)
        images = self.task.train[rows[:, None, None, None], channels[None, :, None, None], y[:, None, :, None],
                                 x[:, None, None, :]]  # fmt: skip
        self.model.train()
        each = F.cross_entropy(self.model(images), self.task.labels[rows], reduction="none")
        gradients = torch.autograd.grad((each * self.sample_weights[rows]).mean(), self.parameters)
        with torch.no_grad():
            self.losses[rows] = each
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            self.momentum.mul_(MOMENTUM).add_(flat).add_(self.weights, alpha=DECAY)
            self.weights.sub_(self.momentum * self.rates[self.at])
            self.at.add_(1)

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Leave the share of right answers, of what is held back and of the test set."""
        self.model.eval()
        self.right.zero_()
        for which, (images, labels) in enumerate((self.task.held_back, self.task.test)):
            for part, wanted in zip(images.split(EVAL_BATCH), labels.split(EVAL_BATCH), strict=True):
                self.right[which] += (self.model(part).argmax(1) == wanted).sum() / len(labels)


def flattened(tensors: list[Any]) -> Tensor:
    """Put tensors into one vector, of which they are views from then on."""
    with torch.no_grad():
        vector = torch.cat([tensor.reshape(-1) for tensor in tensors])
        at = 0
        for tensor in tensors:
            tensor.data = vector[at : at + tensor.numel()].view_as(tensor)
            at += tensor.numel()
    return vector


def recorded(call: Any, device: torch.device) -> Any:
    """Return what does the same as a call, with one launch where that is possible."""
    call()
    if device.type != "cuda":
        return call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()  # and not torch.cuda.graph, which collects garbage each time
    call()
    graph.capture_end()
    return graph.replay


def rate_at(t: float, budget: float, highest: float) -> float:
    """Return the learning rate after t of the budget: linear warm-up, then a cosine to zero."""
    warm = WARM_UP * budget
    if t < warm:
        return highest * t / warm
    return highest * 0.5 * (1 + math.cos(math.pi * min(1.0, (t - warm) / (budget - warm))))


class Run:
    """One method with one learning rate and one seed."""

    def __init__(self, task: Task, method: Method, setting: Setting, rate: float, seed: int) -> None:
        self.task, self.method, self.setting, self.rate, self.seed = task, method, setting, rate, seed
        self.samples = len(task.labels)
        self.shape = shape_of(method, setting, self.samples)
        self.curve: list[list[float]] = []
        self.taken = 0

    def advance(self, machine: Machine) -> Iterator[None]:
        """Launch the run round by round; yields where others may go on."""
        shape, device = self.shape, self.task.device
        rng = np.random.default_rng(self.seed + 1)
        sampler = Sampler(self.samples, self.method.scheme, self.method.ratio, "fast", self.seed + 2,
                          until=self.method.until)  # fmt: skip
        counts: dict[str, int] = {}
        for rank in shape.ranks:
            counts[rank.group] = counts.get(rank.group, 0) + rank.tau * shape.batch
        in_round = sum(counts.values())
        longest = self.samples // in_round
        with machine.on_stream():
            machine.reset(self.seed)
            momenta = torch.zeros(len(shape.ranks), len(machine.weights), device=device)
            scores = torch.zeros(LOOKED_AT + 1, 2, device=device)
        budget, t, looks, launched = self.setting.budget, 0.0, list[float](), list[Any]()
        while t + shape.cost <= budget:
            sampler.fraction_done = t / budget
            if self.method.scheme != "uniform":
                while launched and not launched[-1].query():
                    yield
                sampler.losses[:] = machine.losses.cpu().numpy()
            rounds = min(longest, sampler.prepare(in_round) // in_round)
            drawn = sampler.draw({name: rounds * count for name, count in counts.items()})
            rows, rates = self._epoch(drawn, rounds, t)
            with machine.on_stream():
                fill(machine.rows, rows)
                places = [2 * PADDING + 1, 2 * PADDING + 1, 1 + self.task.flips]
                fill(machine.moves, rng.integers(places, size=(len(rows), 3)))
                fill(machine.rates, rates)
                fill(machine.sample_weights, sampler.weights)
                machine.at.zero_()
            for _ in range(rounds):
                if t + shape.cost > budget:
                    break
                with machine.on_stream():
                    self._round(machine, momenta)
                    t += shape.cost
                    self.taken += in_round
                    last = t + shape.cost > budget
                    if last or t >= (len(looks) + 1) * budget / LOOKED_AT:
                        machine.evaluate()
                        scores[len(looks)].copy_(machine.right)
                        looks.append(t)
                    if machine.stream is not None:
                        launched.append(torch.cuda.Event())
                        launched[-1].record()
                while len(launched) > AHEAD and not launched[-1 - AHEAD].query():
                    yield
                launched = launched[-1 - AHEAD :]
                yield
        while launched and not launched[-1].query():
            yield
        self.curve = [[at, *found] for at, found in zip(looks, scores.tolist(), strict=False)]

    def _epoch(self, drawn: Mapping[str, Any], rounds: int, t: float) -> tuple[Any, Any]:
        """Order an epoch's samples and learning rates as the ranks take them, one rank after the other."""
        shape, rows, rates, of_group = self.shape, [], [], dict[str, int]()
        members = {name: sum(rank.group == name for rank in shape.ranks) for name in drawn}
        for rank in shape.ranks:
            j = of_group.setdefault(rank.group, 0)
            of_group[rank.group] += 1
            rows.append(drawn[rank.group].reshape(members[rank.group], rounds, rank.tau * shape.batch)[j])
            begin = t + shape.cost * np.arange(rounds)[:, None] + shape.cost * np.arange(rank.tau) / rank.tau
            rates.append(np.vectorize(rate_at)(begin, self.setting.budget, self.rate))
        return np.concatenate(rows, 1).reshape(-1), np.concatenate(rates, 1).reshape(-1)

    def _round(self, machine: Machine, momenta: Tensor) -> None:
        ranks = self.shape.ranks
        if len(ranks) == 1:
            for _ in range(ranks[0].tau):
                machine.step()
            return
        start, stats = machine.weights.clone(), machine.stats.clone()
        weights = start * (1 - sum(rank.coefficient for rank in ranks))
        averaged = torch.zeros_like(stats)
        for momentum, rank in zip(momenta, ranks, strict=True):
            machine.weights.copy_(start)
            machine.stats.copy_(stats)
            machine.momentum.copy_(momentum)
            for _ in range(rank.tau):
                machine.step()
            momentum.copy_(machine.momentum)
            weights.add_(machine.weights, alpha=rank.coefficient)
            averaged.add_(machine.stats, alpha=rank.weight)
        machine.weights.copy_(weights)
        machine.stats.copy_(averaged)


def fill(tensor: Tensor, values: Any) -> None:
    """Copy values to the beginning of a tensor, without waiting for the device."""
    there = torch.from_numpy(np.ascontiguousarray(values))
    if tensor.is_cuda:
        there = there.pin_memory()
    tensor[: len(there)].copy_(there, non_blocking=True)
