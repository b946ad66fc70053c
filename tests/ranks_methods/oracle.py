"""What each case must come to, computed in one process by plain loops: no flat vectors, no ranks, no Horovod."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ranks_methods.problem import CLASSES, Case, data, model
from torch import Tensor, nn

Dealt = Mapping[int, Sequence[Tensor]]
"""By rank and epoch: ``[steps, B]`` indices."""


class Replica:
    """A model with its own optimizer, stepped by hand."""

    def __init__(self, case: Case) -> None:
        self.settings = case.overrides()
        self.net = model(case.model)
        kind = getattr(torch.optim, self.settings.get("train.optimizer", "SGD"))
        args = self.settings["train.optimizer_args"]
        self.scales = [1.0]
        params: Any = self.net.parameters()
        if "train.groups" in self.settings:  # what cases.GROUPS comes to
            first, last = self.net[0], self.net[2]
            last.bias.requires_grad_(False)
            params = [{"params": [first.weight]}, {"params": [first.bias], "weight_decay": 0.0},
                      {"params": [last.weight]}]  # fmt: skip
            self.scales = [1.0, 3.0, 0.5]
        self.optimizer = kind(params, lr=self.settings["train.lr"], **args)
        self.params = [p for p in self.net.parameters() if p.requires_grad]
        self.inputs, self.targets = data(case.poisoned)

    def gradient(self, rows: Tensor) -> list[Tensor]:
        """Of the mean loss of these samples."""
        smoothing = self.settings.get("train.loss_args", {}).get("label_smoothing", 0.0)
        of = {"label_smoothing": smoothing, "reduction": "none"}
        losses = nn.functional.cross_entropy(self.net(self.inputs[rows]), self.targets[rows], **of)
        if "sampling.sample_weights" in self.settings:
            counts = self.targets.double() + 1
            losses = losses * (counts / counts.mean()).float()[rows]
        return list(torch.autograd.grad(losses.mean(), self.params))

    def step(self, gradient: Sequence[Tensor], lr: float | None = None) -> None:
        norm, most = torch.sqrt(sum((g**2).sum() for g in gradient)), self.settings.get("train.clip_norm")
        factor = 1.0 if most is None else min(1.0, most / (float(norm) + 1e-6))
        for p, g in zip(self.params, gradient, strict=True):
            p.grad = g * factor
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = (lr or self.settings["train.lr"]) * scale
        self.optimizer.step()


    def is_finite(self) -> bool:
        """Whether there is no NaN and no Inf in the model."""
        return _is_finite(self.net)


def _is_finite(net: nn.Module) -> bool:
    return all(bool(t.isfinite().all()) for t in net.state_dict().values())


def joined(case: Case, dealt: Dealt) -> dict[str, Tensor]:
    """SGD of one process on the batches of all ranks, joined; without the batches in which a sample is poisoned."""
    one = Replica(case)
    done = 0
    for number, steps in enumerate(together(dealt)):
        for step in steps:
            done += 1
            clean = [rows for rows in step if not set(case.poisoned) & set(rows.tolist())]
            one.step(one.gradient(torch.cat(clean)), rate(one.settings, number, done))
    return one.net.state_dict()


def rate(settings: Mapping[str, Any], number: int, step: int) -> float:
    """The learning rate of a step (from 1) of an epoch (from 0): cosine over the epochs, if so set, times the
    warm-up."""
    lr: float = settings["train.lr"]
    if "train.scheduler" in settings:
        lr *= (1 + math.cos(math.pi * number / settings["train.scheduler_args"]["T_max"])) / 2
    return lr * min(1.0, step / settings.get("train.warmup_rounds", 1))


def normalized(case: Case, dealt: Dealt) -> dict[str, Tensor]:
    """The same where each rank normalizes its own share; running statistics are averaged after each epoch."""
    replicas = {rank: Replica(case) for rank, steps in dealt.items() if steps[0].numel()}
    for steps in together(dealt):
        for step in steps:
            sizes = [len(rows) for rows in step]
            finite = [not set(case.poisoned) & set(rows.tolist()) for rows in step]
            before = [mean_of([replica.net], [1.0]) for replica in replicas.values()]
            parts = [replica.gradient(rows) for replica, rows in zip(replicas.values(), step, strict=True)]
            clean = sum(size for size, ok in zip(sizes, finite, strict=True) if ok)
            if _rounds(case):
                whole = [_sum_in_float16([s / sum(sizes) * g for s, g, ok in zip(sizes, gs, finite, strict=True) if ok])
                         * (sum(sizes) / clean) for gs in zip(*parts, strict=True)]  # fmt: skip
            else:
                whole = [sum(s / clean * g for s, g, ok in zip(sizes, gs, finite, strict=True) if ok)
                         for gs in zip(*parts, strict=True)]  # fmt: skip
            for replica, ok, kept in zip(replicas.values(), finite, before, strict=True):
                if not ok:
                    tracked = {name: t for name, t in replica.net.state_dict().items() if not t.is_floating_point()}
                    replica.net.load_state_dict({**kept, **tracked})
            for replica in replicas.values():
                replica.step(whole)
        shares = [size / sum(sizes) for size in sizes]
        set_all(replicas.values(), mean_of([r.net for r in replicas.values()], shares))
    return next(iter(replicas.values())).net.state_dict()


def _rounds(case: Case) -> bool:
    """Whether sums are rounded here as on the wire: of two ranks, of which it does not matter who comes first."""
    return case.settings.get("aggregation.wire") == "float16" and sum(map(len, CLASSES[case.classes].values())) == 2


def _sum_in_float16(parts: Sequence[Tensor]) -> Tensor:
    """The sum of two, or one as it is, each of them and the sum to the 11 bits of float16 at any scale."""
    total = torch.zeros_like(parts[0])
    for part in parts:
        total = _to_11_bits(total + _to_11_bits(part))
    return total


def _to_11_bits(numbers: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(numbers)
    return torch.ldexp(torch.round(mantissa * 2**11) / 2**11, exponent)


def together(dealt: Dealt) -> list[list[tuple[Tensor, ...]]]:
    """By epoch and step: the batches of all ranks that train."""
    training = [steps for steps in dealt.values() if steps[0].numel()]
    return [list(zip(*epochs, strict=True)) for epochs in zip(*training, strict=True)]


def local(case: Case, dealt: Dealt) -> dict[str, Tensor]:
    """Local SGD: tau steps of each replica, the weighted average, the outer optimizer, what happens to momentum."""
    settings, classes = case.overrides(), CLASSES[case.classes]
    given = settings["train.tau"]
    tau = {r: given[name] if isinstance(given, dict) else given for name, ranks in classes.items() for r in ranks}
    weights = [1 / len(tau)] * len(tau)
    normalised = settings.get("aggregation.weights") == "normalised"
    is_biased = case.method == "biased_local_sgd" and settings.get("aggregation.weights") != "uniform"
    if normalised or is_biased or settings.get("algorithm.normalise") == "done":
        weights = [tau[r] / sum(tau.values()) for r in sorted(tau)]
    most = settings.get("aggregation.max_extrapolation", 2.0)
    coefficients = every_gradient_alike([tau[r] for r in sorted(tau)], most)
    replicas = {rank: Replica(case) for rank in sorted(tau)}
    x = list(replicas[0].net.parameters())
    common = [p.detach().clone().requires_grad_() for p in x]
    outer = torch.optim.SGD(
        common, lr=settings.get("aggregation.outer_lr", 1.0), momentum=settings.get("aggregation.outer_momentum", 0.0),
        nesterov=settings.get("aggregation.outer_nesterov", False),
    )
    for number in range(len(dealt[0])):
        for done in range(len(dealt[0][number]) // tau[0]):
            for rank, replica in replicas.items():
                for rows in dealt[rank][number][done * tau[rank] : (done + 1) * tau[rank]]:
                    replica.step(replica.gradient(rows))
            finite = [replica.is_finite() for replica in replicas.values()]
            kept = sum(w for w, ok in zip(weights, finite, strict=True) if ok)
            scaled = [w / kept if ok else 0.0 for w, ok in zip(weights, finite, strict=True)]
            mean = mean_of([r.net for r in replicas.values()], scaled)
            if _rounds(case):
                for p, (name, _) in zip(common, replicas[0].net.named_parameters(), strict=True):
                    sent = [w * (dict(r.net.named_parameters())[name] - p).detach()
                            for r, w, ok in zip(replicas.values(), weights, finite, strict=True) if ok]  # fmt: skip
                    mean[name] = p.detach() + _sum_in_float16(sent) / kept
            if normalised:
                for p, (name, _) in zip(common, replicas[0].net.named_parameters(), strict=True):
                    moved = sum(c * (dict(r.net.named_parameters())[name].detach() - p.detach())
                                for c, r in zip(coefficients, replicas.values(), strict=True))  # fmt: skip
                    mean[name] = p.detach() + moved
            for p, (name, _) in zip(common, replicas[0].net.named_parameters(), strict=True):
                p.grad = p.detach() - mean[name]
            outer.step()
            for p, (name, _) in zip(common, replicas[0].net.named_parameters(), strict=True):
                mean[name] = p.detach().clone()
            set_all(replicas.values(), mean)
            _OPTIMIZER_STATE[settings.get("aggregation.optimizer_state", "local")](list(replicas.values()), scaled)
    return replicas[0].net.state_dict()


def reduced(case: Case, dealt: Dealt) -> dict[str, Tensor]:
    """BVR-L-SGD by its equations, on vectors of all parameters."""
    settings, ranks = case.overrides(), sorted(dealt)
    steps, lr = settings["train.tau"], settings["train.lr"]
    count, every = settings.get("algorithm.anchor_batches", steps), settings.get("algorithm.stage_rounds", 16)
    one = Replica(case)

    def gradient(x: Tensor, rows: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(x, one.params)
        return nn.utils.parameters_to_vector(one.gradient(rows))

    x = nn.utils.parameters_to_vector(one.params).detach().clone()
    before = v = torch.zeros_like(x)
    number = 0
    for epoch in range(len(dealt[0])):
        for start in range(0, len(dealt[0][epoch]), count + steps - 1):
            batches = {rank: dealt[rank][epoch][start : start + count + steps - 1] for rank in ranks}
            at_x, at_before = (torch.stack([gradient(at, rows) for rank in ranks for rows in batches[rank][:count]])
                               .mean(0) for at in (x, before))  # fmt: skip
            v = at_x if number % every == 0 else v + at_x - at_before
            ends = []
            for rank in ranks:
                u, last, y = v, x, x - lr * v
                for rows in batches[rank][count:]:
                    u = u + gradient(y, rows) - gradient(last, rows)
                    last, y = y, y - lr * u
                ends.append(y)
            before, x = x, ends[int(np.random.default_rng((0, number)).integers(len(ranks)))]
            number += 1
    nn.utils.vector_to_parameters(x, one.params)
    return one.net.state_dict()


def every_gradient_alike(taus: Sequence[int], most: float) -> list[float]:
    """The coefficient of each rank's progress: max tau / sum tau, as far towards tau / sum tau as their bound asks."""
    bound, alike = 1 + (most - 1) * min(1.0, 8 / max(taus)), max(taus) / sum(taus)
    part = min(1.0, (bound - 1) / (len(taus) * alike - 1)) if len(taus) * alike > 1 else 1.0
    return [(1 - part) * tau / sum(taus) + part * alike for tau in taus]


def delayed(case: Case, dealt: Dealt) -> dict[str, Tensor]:
    """Local SGD of which each average is taken in a round later; with fixed weights."""
    settings, classes = case.overrides(), CLASSES[case.classes]
    tau = {r: settings["train.tau"][name] for name, ranks in classes.items() for r in ranks}
    by_steps = case.method == "biased_local_sgd"
    weights = [tau[r] / sum(tau.values()) if by_steps else 1 / len(tau) for r in sorted(tau)]
    replicas = {rank: Replica(case) for rank in sorted(tau)}
    steps, kept = settings.get("aggregation.delay_steps"), settings.get("aggregation.own_weight", 0.0)
    delay = {r: t if steps is None else round(steps * t / max(tau.values())) for r, t in tau.items()}
    most, normalised = settings.get("aggregation.max_extrapolation", 2.0), (
        settings.get("aggregation.weights") == "normalised")  # fmt: skip
    alike = every_gradient_alike([tau[r] for r in sorted(tau)], most) if normalised else None
    for number in range(len(dealt[0])):
        sent: list[nn.Module] = []
        base = {name: p.detach().clone() for name, p in replicas[0].net.named_parameters()}
        for done in range(len(dealt[0][number]) // tau[0]):
            for later in (False, True):
                for rank, replica in replicas.items():
                    own = dealt[rank][number][done * tau[rank] : (done + 1) * tau[rank]]
                    for rows in own[delay[rank] :] if later else own[: delay[rank]]:
                        replica.step(replica.gradient(rows))
                if not later:
                    _take_in(sent, weights, list(replicas.values()), alike, base, kept)
            sent = [copy.deepcopy(replica.net) for replica in replicas.values()]
            if settings.get("aggregation.optimizer_state") == "reset":
                _reset_momentum(list(replicas.values()), weights)
        _take_in(sent, weights, list(replicas.values()), alike, base, kept)
        set_all(replicas.values(), mean_of([r.net for r in replicas.values()], weights))
    return replicas[0].net.state_dict()


def _take_in(
    sent: Sequence[nn.Module], weights: Sequence[float], replicas: Sequence[Replica],
    alike: Sequence[float] | None = None, base: dict[str, Tensor] | None = None, own_weight: float = 0.0,
) -> None:  # fmt: skip
    """What a replica has done since it sent its model comes on top of the mean of what was sent.

    One whose numbers were bad then has nothing to add, and begins anew.
    """
    if not sent:
        return
    finite = [_is_finite(net) for net in sent]
    kept = sum(w for w, ok in zip(weights, finite, strict=True) if ok)
    mean = mean_of(sent, [w / kept if ok else 0.0 for w, ok in zip(weights, finite, strict=True)])
    if alike is not None and base is not None:
        for name, before in base.items():
            moved = sum(c * (dict(net.named_parameters())[name].detach() - before)
                        for c, net in zip(alike, sent, strict=True))  # fmt: skip
            mean[name] = before + moved
            base[name] = mean[name].clone()
    for net, replica, ok in zip(sent, replicas, finite, strict=True):
        own = replica.net.state_dict()
        for name, before in net.state_dict().items():
            if ok and name in dict(net.named_parameters()):
                own[name] += (1 - own_weight) * (mean[name] - before)
            elif before.is_floating_point():
                own[name].copy_(mean[name])
        if not ok:
            replica.optimizer.state.clear()


def mean_of(nets: Sequence[nn.Module], weights: Sequence[float]) -> dict[str, Tensor]:
    """Floating tensors weighted, those of weight 0 left out; integers the maximum."""
    states = [net.state_dict() for net in nets]
    result = {}
    for name, first in states[0].items():
        parts = [state[name] for state in states]
        if first.is_floating_point():
            result[name] = sum(w * part for w, part in zip(weights, parts, strict=True) if w)
        else:
            result[name] = torch.stack(parts).max()
    return result


def set_all(replicas: Any, state: Mapping[str, Tensor]) -> None:
    for replica in replicas:
        replica.net.load_state_dict(copy.deepcopy(dict(state)))


def _average_momentum(replicas: Sequence[Replica], weights: Sequence[float]) -> None:
    for params in zip(*(r.net.parameters() for r in replicas), strict=True):
        states = [r.optimizer.state[p] for r, p in zip(replicas, params, strict=True)]
        for key in states[0]:
            parts = [state[key] for state in states]
            mean = torch.stack(parts).max()
            if key != "step":
                mean = sum(w * part for w, part in zip(weights, parts, strict=True) if w)
            for state in states:
                state[key] = mean.clone()


def _reset_momentum(replicas: Sequence[Replica], weights: Sequence[float]) -> None:
    for replica in replicas:
        replica.optimizer.state.clear()


def _seed_second_moment(replicas: Sequence[Replica], weights: Sequence[float]) -> None:
    _average_momentum(replicas, weights)
    for replica in replicas:
        for state in replica.optimizer.state.values():
            state["exp_avg_sq"] = state["max_exp_avg_sq"].clone()


_OPTIMIZER_STATE: dict[str, Callable[[Sequence[Replica], Sequence[float]], None]] = {
    "local": lambda rs, weights: _reset_momentum([r for r, w in zip(rs, weights, strict=True) if not w], weights),
    "average": _average_momentum,
    "average_seed": _seed_second_moment,
    "reset": _reset_momentum,
}
