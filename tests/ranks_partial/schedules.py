"""What the scripted runs do, and what must come of it, computed in one process without threads or Horovod."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from ranks_methods.oracle import Replica
from ranks_methods.problem import BASE, model
from torch import Tensor

from hvd_hetero import algorithms
from hvd_hetero.algorithms.asynchronous import Asynchronous, AsynchronousLocal
from hvd_hetero.algorithms.server_rule import Rule
from hvd_hetero.cluster.device_classes import Cluster, DeviceClass
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.config.schema import AggregationConfig, Config

Worked = Sequence[tuple[Tensor, Tensor]]
"""Of one rank: its samples ``[steps, B]`` and the round of each step."""


@dataclass(frozen=True)
class Schedule:
    """One epoch in which ranks take turns.

    Attributes:
        order: whose turn it is, again and again.
        settings: beyond those of the methods' cases.
        poisoned: as the methods' cases have it.
    """

    method: str
    order: list[int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    tau: tuple[int, ...] = (1, 1)
    model: str = "mlp"
    poisoned: tuple[int, ...] = ()

    @property
    def waits(self) -> bool:
        """Whether a rank may have to wait for others."""
        return bool(self.quorum) or self.method == "wagma_sgd"

    def overrides(self) -> dict[str, Any]:
        classes = {f"c{rank}": {"device": "cpu", "ranks": [rank]} for rank in range(len(self.tau))}
        tau = {name: self.tau[rank] for rank, name in enumerate(classes)}
        method = {"algorithm.name": self.method, "cluster.classes": classes, "train.tau": tau, "train.epochs": 1}
        partial = {"aggregation.sync_every": 1000, "aggregation.patience_sec": 60}
        if self.rule is not None or self.method in ("m_sync_sgd", "wagma_sgd"):
            partial = {}
        return {**BASE, **method, **partial, **self.settings}

    def steps_a_turn(self, rank: int) -> int:
        """A turn is one step where gradients are sent or with a quorum, one round of local steps elsewhere."""
        return 1 if self.quorum or (self.rule and self.method != "async_diloco") else self.tau[rank]

    @property
    def rule(self) -> Rule | None:
        """A server's, where there is one."""
        kind = algorithms.get(self.method)
        if not issubclass(kind, Asynchronous | AsynchronousLocal):
            return None
        own = {key.partition(".")[2]: value for key, value in self.settings.items() if key.startswith("algorithm.")}
        spec = AggregationConfig(outer_lr=self.settings.get("aggregation.outer_lr", 1.0),
                                 outer_momentum=self.settings.get("aggregation.outer_momentum", 0.0))  # fmt: skip
        classes = tuple(DeviceClass(f"c{rank}", "cpu", (rank,)) for rank in range(len(self.tau)))
        options = kind.Options(self.method, **own)
        cluster = Cluster(classes, tuple(facts(len(self.tau))))
        return kind(Config(algorithm=options, aggregation=spec), cluster, 120).server_rule()

    @property
    def quorum(self) -> int:
        """Ranks that a round waits for; 0: the first one."""
        return int(self.settings.get("aggregation.quorum", self.settings.get("algorithm.quorum", 0)))

    @property
    def sums_gradients(self) -> bool:
        return self.method in ("eager_sgd", "m_sync_sgd", "nonblocking_sgd")

    @property
    def has_partial(self) -> bool:
        """Whether the method's executor has the partial collective, and no strategy of its own for averages."""
        return self.sums_gradients or self.method == "wagma_sgd"


SOLO = {"aggregation.mode": "solo"}
STSYN = {"aggregation.mode": "quorum", "aggregation.quorum": 2}
OUTER = {"aggregation.outer_lr": 0.7, "aggregation.outer_momentum": 0.5}
WAGMA = {"aggregation.sync_every": 4, "train.batch_size": 2}
APART = [0, 0, 1, 0, 2, 1, 0, 2, 2, 2, 1, 3, 3, 1, 3, 3]
"""Four turns of each rank: in the last one all of them meet."""
CASES = {
    "eager": Schedule("eager_sgd", [0, 0, 0, 1]),
    "eager, three ranks": Schedule("eager_sgd", [0, 1, 0, 2, 0, 1, 1], tau=(1, 1, 1)),
    "eager, AdamW": Schedule("eager_sgd", [0, 0, 1], {"train.optimizer": "AdamW", "train.optimizer_args": {}}),
    "merging": Schedule("biased_local_sgd", [0, 0, 0, 1], SOLO, tau=(3, 1)),
    "merging, now one first, now the other": Schedule("biased_local_sgd", [0, 1, 1, 0, 0], SOLO, tau=(2, 2)),
    "merging, uniform": Schedule("unbalanced_local_sgd", [0, 0, 1], SOLO, tau=(3, 1)),
    "quorum, drops late": Schedule("m_sync_sgd", [0, 1, 2, 1, 2, 0], {"algorithm.quorum": 2}, tau=(1, 1, 1)),
    "quorum, uneven": Schedule(
        "m_sync_sgd", [0, 1, 2], {"algorithm.quorum": 2, "train.batch_size": {"c0": 4, "c1": 2, "c2": 3}}, tau=(1, 1, 1)
    ),
    "quorum, keeps late": Schedule(
        "eager_sgd", [0, 1, 2, 1, 2, 0], {"algorithm.mode": "quorum", "algorithm.quorum": 2}, tau=(1, 1, 1)
    ),
    "micro-batches": Schedule("nonblocking_sgd", [0, 1, 0, 0, 2], {"algorithm.micro_batches": 4}, tau=(1, 1, 1)),
    "quorum of models": Schedule("biased_local_sgd", [0, 0, 1, 0, 2, 1], STSYN, tau=(2, 2, 2)),
    "quorum of models, uniform": Schedule("balanced_local_sgd", [0, 1, 1, 2], {**STSYN, "train.tau": 2}, tau=(2, 2, 2)),
    "server, every gradient": Schedule("asgd", [0, 0, 0, 1], {"algorithm.adaptive": True}),
    "server, not the oldest": Schedule("ringmaster_asgd", [0, 1, 0, 0, 2], {"algorithm.max_delay": 2}, tau=(1, 1, 1)),
    "server, of one model": Schedule("rennala_sgd", [0, 1, 0, 2, 1], {"algorithm.gradients": 2}, tau=(1, 1, 1)),
    "server, of every rank": Schedule("malenia_sgd", [0, 0, 1], tau=(2, 1)),
    "server, tables": Schedule("ringleader_asgd", [0, 1, 0, 0, 2], tau=(3, 1, 1)),
    "server, models": Schedule("async_diloco", [0, 0, 1], {
        "aggregation.outer_lr": 0.7, "aggregation.outer_momentum": 0.5, "algorithm.buffer": 3}, tau=(3, 2)),
    "groups": Schedule("wagma_sgd", APART, WAGMA, tau=(1, 1, 1, 1)),
    "groups, code": Schedule("wagma_sgd", APART, {**WAGMA, "algorithm.mode": "code"}, tau=(1, 1, 1, 1)),
    "groups of all": Schedule("wagma_sgd", [0, 1, 0, 1, 1, 0, 0, 1], WAGMA),
    "server, progress of steps": Schedule("omnilearn_asp", [0, 0, 1], {"algorithm.min_local_batch": 4}),
    "server, ordered momentum": Schedule("asgd", [0, 1, 0, 0, 2], {
        "algorithm.ordered_momentum": 0.5, "train.optimizer_args": {}}, tau=(1, 1, 1)),
    "merging, outer": Schedule("biased_local_sgd", [0, 0, 1, 0, 2], {**SOLO, **OUTER}, tau=(3, 1, 2)),
}


def facts(size: int) -> list[RankFacts]:
    return [RankFacts(rank, "localhost", rank, (), "cpu", (0,)) for rank in range(size)]


def turns(order: Sequence[int], left: Sequence[int]) -> list[int]:
    """Who does something when: each rank as often as it did in all, in the given order."""
    result, remaining, turn = [], list(left), 0
    while any(remaining):
        rank = order[turn % len(order)]
        turn += 1
        if remaining[rank]:
            remaining[rank] -= 1
            result.append(rank)
    return result


class Case(Replica):
    """A replica whose weights and gradients are single vectors."""

    def vector(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.net.parameters()])

    def set(self, vector: Tensor) -> None:
        torch.nn.utils.vector_to_parameters(vector.clone(), self.net.parameters())

    def flat_gradient(self, rows: Tensor) -> Tensor:
        return torch.cat([g.reshape(-1) for g in self.gradient(rows)])

    def step_along(self, vector: Tensor) -> None:
        parts = vector.split([p.numel() for p in self.net.parameters()])
        self.step([part.view_as(p) for part, p in zip(parts, self.net.parameters(), strict=True)])


def eager(case: Schedule, worked: Sequence[Worked]) -> tuple[Tensor, list[list[int]], list[int]]:
    """The final weights, by rank the round of each step, and by rank how many gradients were dropped."""
    one, drops = Case(case), case.method == "m_sync_sgd"  # type: ignore[arg-type]
    ranks, sizes = len(worked), [w[0][0].shape[1] for w in worked]
    history, buffers, versions = [one.vector()], [torch.zeros(())] * ranks, [0] * ranks
    there, dropped, weights = set[int](), [0] * ranks, [0.0] * ranks
    parts = int(case.settings.get("algorithm.micro_batches", 1))

    def finish_round() -> None:
        nonlocal buffers, weights
        one.set(history[-1])
        one.step_along(sum(buffers) / (sum(weights) if drops or parts > 1 else 1))  # type: ignore[arg-type, operator]
        history.append(one.vector())
        buffers, weights = [torch.zeros(())] * ranks, [0.0] * ranks
        there.clear()

    done: list[list[int]] = [[] for _ in worked]
    rows = [[part for row in w[0][0] for part in row.view(parts, -1)] for w in worked]
    for rank in turns(case.order, [len(r) for r in rows]):
        one.set(history[versions[rank]])
        gradient = one.flat_gradient(rows[rank].pop(0)) * sizes[rank] / sum(sizes) / parts
        is_whole = len(rows[rank]) % parts == 0
        if is_whole:
            done[rank].append(versions[rank])
        is_late = versions[rank] < len(history) - 1
        if is_late and drops:
            dropped[rank] += 1
        else:
            buffers[rank] = buffers[rank] + gradient
            weights[rank] += sizes[rank] / sum(sizes) / parts
        if is_late:
            versions[rank] = len(history) - 1
            continue
        if not is_whole:
            continue
        there.add(rank)
        if len(there) >= case.quorum:
            waited = {rank, *there}
            finish_round()
            for other in waited:
                versions[other] = len(history) - 1
    if any(b.dim() for b in buffers):
        finish_round()
    return history[-1], done, dropped


def served(case: Schedule, worked: Sequence[Worked]) -> tuple[Tensor, list[list[int]], list[int]]:
    """The same for a server: its model and optimizer, and what each rank has of them when it computes."""
    rule, server = case.rule, Case(case)  # type: ignore[arg-type]
    assert rule is not None
    replicas = [Case(case) for _ in worked]  # type: ignore[arg-type]
    rows, taken = [list(w[0][0]) for w in worked], [server.vector() for _ in worked]
    done: list[list[int]] = [[] for _ in worked]
    dropped = [0] * len(worked)

    def step(direction: Tensor, factor: float) -> None:
        if rule.is_outer:
            server.set(server.vector() - factor * direction)
        else:
            server.step_along(factor * direction)

    rule.step = step
    rounds = [-(-len(r) // case.steps_a_turn(rank)) for rank, r in enumerate(rows)]
    version = [0] * len(worked)
    for rank in turns(case.order, rounds):
        mine, before = replicas[rank], rule.made_at[rank]
        mine.set(taken[rank])
        for _ in range(case.steps_a_turn(rank)):
            done[rank].append(version[rank])
            pushed = mine.flat_gradient(rows[rank].pop(0))
            if rule.is_outer:
                mine.step_along(pushed)
        dropped[rank] += not rule.arrive(rank, taken[rank] - mine.vector() if rule.is_outer else pushed)
        version[rank] = rule.version
        if rule.made_at[rank] != before:
            taken[rank] = server.vector()
    return server.vector(), done, dropped


def merging(case: Schedule, worked: Sequence[Worked]) -> tuple[Tensor, list[list[int]], list[int]]:
    """The same for models: x, each rank's own progress on top of it, and who is merged when."""
    settings = case.overrides()
    lr, momentum = settings.get("aggregation.outer_lr", 1.0), settings.get("aggregation.outer_momentum", 0.0)
    replicas = [Case(case) for _ in worked]  # type: ignore[arg-type]
    start = replicas[0].vector()
    history, velocity = [start], torch.zeros_like(start)
    own = [start for _ in worked]  # what each rank trains
    progress = [torch.zeros_like(start) for _ in worked]  # of each since it was last merged
    steps, versions = [0] * len(worked), [0] * len(worked)
    done: list[list[int]] = [[] for _ in worked]
    rows = [list(w[0][0]) for w in worked]

    def merge() -> None:
        nonlocal velocity
        weights = [float(s) if case.method == "biased_local_sgd" else float(s > 0) for s in steps]
        step = sum(w * d for w, d in zip(weights, progress, strict=True)) / sum(weights)
        velocity = momentum * velocity - step
        history.append(history[-1] - lr * velocity)
        for rank in range(len(worked)):
            progress[rank], steps[rank] = torch.zeros_like(start), 0
        there.clear()

    there, since = set[int](), [0] * len(worked)
    rounds = [-(-len(r) // case.steps_a_turn(rank)) for rank, r in enumerate(rows)]
    for rank in turns(case.order, rounds):
        mine = replicas[rank]
        mine.set(own[rank])
        for _ in range(min(case.steps_a_turn(rank), len(rows[rank]))):
            done[rank].append(versions[rank])
            mine.step_along(mine.flat_gradient(rows[rank].pop(0)))
            steps[rank] += 1
            since[rank] += 1
        progress[rank] = progress[rank] + mine.vector() - own[rank]
        if versions[rank] == len(history) - 1 and (not case.quorum or since[rank] >= case.tau[rank]):
            there.add(rank)
            if len(there) >= case.quorum:
                merge()
        if versions[rank] < len(history) - 1:
            versions[rank], since[rank] = len(history) - 1, 0
        own[rank] = history[-1] + progress[rank]
    if any(steps):
        merge()
    return history[-1], done, [0] * len(worked)


def grouped(case: Schedule, worked: Sequence[Worked]) -> tuple[Tensor, list[list[int]], list[int]]:
    """The same for averages of models in groups, by windows of two ranks, or of all."""
    size, every, is_paper = len(worked), case.settings["aggregation.sync_every"], "algorithm.mode" not in case.settings
    phases = [[{0, 1}, {2, 3}], [{0, 2}, {1, 3}]] if size == 4 else [[set(range(size))]]
    replicas = [Case(case) for _ in worked]  # type: ignore[arg-type]
    x = [replica.vector() for replica in replicas]
    buffers, gradients = list(x), list(x)
    sums: dict[int, tuple[int, list[Tensor]]] = {}
    done, rows = [0] * size, [list(w[0][0]) for w in worked]

    def stepped(rank: int, start: Tensor) -> Tensor:
        replicas[rank].set(start)
        replicas[rank].step_along(gradients[rank])
        return replicas[rank].vector()

    for rank in turns(case.order, [len(r) for r in rows]):
        t = done[rank]
        replicas[rank].set(x[rank])
        gradients[rank] = replicas[rank].flat_gradient(rows[rank].pop(0))
        buffers[rank] = own = stepped(rank, x[rank]) if is_paper else x[rank]
        done[rank] += 1
        if (t + 1) % every == 0:
            if min(done) == t + 1:
                mean = sum(buffers) / size
                x = [mean if is_paper else stepped(other, mean) for other in range(size)]  # type: ignore[arg-type]
            continue
        first, sent = sums.setdefault(t, (rank, list(buffers)))
        group = next(g for g in phases[t % len(phases)] if rank in g)
        total = sum(sent[other] for other in group)
        mean = total / len(group) if rank == first and is_paper else (total + own) / (len(group) + 1)
        x[rank] = mean if is_paper else stepped(rank, mean)
    return sum(x) / size, [list(range(number)) for number in done], [0] * size  # type: ignore[return-value]


def final(state: Mapping[str, Tensor]) -> Tensor:
    """A run's weights as one vector."""
    return torch.cat([state[name].reshape(-1) for name, _ in model("mlp").named_parameters()])
