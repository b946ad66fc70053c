"""What averages in groups must come to, where ranks go in lockstep: plain loops of one process, as ``oracle.py``."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from ranks_methods.oracle import Dealt, Replica, mean_of, rate, set_all
from ranks_methods.problem import Case
from torch import Tensor


def wagma_sgd(case: Case, dealt: Dealt) -> dict[str, Tensor]:
    """Where all are waited for in every iteration: the mean of all models, after the step or before it."""
    replicas = [Replica(case) for _ in dealt]
    is_paper = case.settings.get("algorithm.mode") != "code"
    for epoch in zip(*dealt.values(), strict=True):
        for rows in zip(*epoch, strict=True):
            gradients = [replica.gradient(own) for replica, own in zip(replicas, rows, strict=True)]
            if not is_paper:
                set_all(replicas, equal_mean(replicas))
            for replica, gradient in zip(replicas, gradients, strict=True):
                replica.step(gradient)
            if is_paper:
                set_all(replicas, equal_mean(replicas))
        set_all(replicas, equal_mean(replicas))
    return replicas[0].net.state_dict()


CADENCES = ((4, 1, 1), (2, 1, 1), (1, 1, 1), (8, 2, 2))
"""gs, ls and btw of DASO, epoch by epoch, where the loss is always stuck."""


def daso(case: Case, dealt: Dealt) -> dict[str, Tensor]:
    replicas, size = [Replica(case) for _ in dealt], case.settings["algorithm.group_size"]
    hosts = [replicas[i : i + size] for i in range(0, len(dealt), size)]
    warmup = case.settings.get("algorithm.warmup_epochs", 4)
    place, apart = 0, False
    for number, epoch in enumerate(zip(*dealt.values(), strict=True)):
        blocking = number < warmup or number >= case.overrides()["train.epochs"] - 1
        skips, local, wait = (0, 1, 0) if blocking else CADENCES[number]
        last, sent = len(epoch[0]) - 1, None
        for b, rows in enumerate(zip(*epoch, strict=True)):
            gradients = [replica.gradient(own) for replica, own in zip(replicas, rows, strict=True)]
            for i, replica in enumerate(replicas):
                whole = gradients[i]
                if b == last or (b + 1) % local == 0:
                    of_host = gradients[i // size * size : i // size * size + size]
                    whole = [sum(parts) / size for parts in zip(*of_host, strict=True)]
                replica.step(whole)
            apart |= local > 1  # momentum keeps a host's models apart
            starts = b == last or skips == 0 or b % skips == 0
            if sent is not None and (starts or b >= sent[1]):
                begun, _, column, total = sent
                for host in hosts:
                    if apart:
                        set_all(host, equal_mean(host))
                    weight, own = 2 * (b - begun), host[column].net.state_dict()
                    merged = {name: (weight * own[name] + total[name]) / (weight + len(hosts))
                              if own[name].is_floating_point() else own[name] for name in own}  # fmt: skip
                    set_all(host, merged)
                sent = None
            if b == last or (starts and skips == 0):
                if b != last:  # running statistics are those of the ranks that send
                    for host in hosts if apart else ():
                        set_all(host, equal_mean(host))
                    set_all(replicas, equal_mean([host[place] for host in hosts]))
                    place = (place + 1) % size
                else:
                    set_all(replicas, equal_mean(replicas))
            elif starts:
                if apart:
                    for host in hosts:
                        set_all(host, equal_mean(host))
                mean = equal_mean([host[place] for host in hosts])
                sent = (b, b + min(wait, last - b), place, {name: len(hosts) * value for name, value in mean.items()})
                place = (place + 1) % size
    return replicas[0].net.state_dict()


def decentlam(case: Case, dealt: Dealt) -> dict[str, Tensor]:
    """By the paper's lines: trial step, exchange, decentralised gradient, momentum."""
    replicas, settings = [Replica(case) for _ in dealt], case.overrides()
    args, size = settings["train.optimizer_args"], len(dealt)
    momenta = [[torch.zeros_like(p) for p in replica.params] for replica in replicas]
    done = 0
    for number, epoch in enumerate(zip(*dealt.values(), strict=True)):
        for rows in zip(*epoch, strict=True):
            before = [[p.detach().clone() for p in replica.params] for replica in replicas]
            lr = rate(settings, number, done + 1)
            for replica, own in zip(replicas, rows, strict=True):
                gradient = replica.gradient(own)
                norm, most = torch.sqrt(sum((g**2).sum() for g in gradient)), settings.get("train.clip_norm")
                factor = 1.0 if most is None else min(1.0, most / (float(norm) + 1e-6))
                for p, g in zip(replica.params, gradient, strict=True):
                    p.data -= lr * (factor * g + args.get("weight_decay", 0.0) * p.data)
            sent = [copy.deepcopy(replica) for replica in replicas]
            for i, replica in enumerate(replicas):
                near = sent if "algorithm.topology" in settings else [sent[i], sent[i ^ (1 << done % 2)]]
                set_all([replica], equal_mean(near))
                for p, x, m in zip(replica.params, before[i], momenta[i], strict=True):
                    m.mul_(args.get("momentum", 0.0)).add_((x - p.data) / lr)
                    p.data = x - lr * m
            done += 1
        set_all(replicas, equal_mean(replicas))
    assert size == 4
    return replicas[0].net.state_dict()


def equal_mean(replicas: Sequence[Replica]) -> dict[str, Tensor]:
    return mean_of([replica.net for replica in replicas], [1 / len(replicas)] * len(replicas))
