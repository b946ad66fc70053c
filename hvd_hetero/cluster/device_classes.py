"""Tell which rank belongs to which device class. Nothing here branches on what a class is called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from typing import Any

from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.config.schema import AUTO, TRAIN, ClassConfig
from hvd_hetero.errors import ConfigError


@dataclass(frozen=True)
class DeviceClass:
    """Ranks that run at one speed: they take the same local steps and carry the same weight.

    Attributes:
        role: ``train``; of helpers, what they do beside the training.
    """

    name: str
    device: str
    ranks: tuple[int, ...]
    slowdown: float = 1.0
    threads: int | None = None
    role: str = TRAIN


@dataclass(frozen=True)
class Cluster:
    """N device classes over all ranks, as data.

    Attributes:
        classes: those that train, in the order of the configuration; each has at least one rank, and every rank is in
            exactly one of these or of the helpers.
        facts: one entry a rank, by rank, those of helpers too.
        empty: names of classes that were configured but matched no rank.
        helpers: classes that do something else than train; their ranks come after all others.
    """

    classes: tuple[DeviceClass, ...]
    facts: tuple[RankFacts, ...]
    empty: tuple[str, ...] = ()
    helpers: tuple[DeviceClass, ...] = ()

    @property
    def size(self) -> int:
        """Number of ranks that train."""
        return len(self.facts) - sum(len(c.ranks) for c in self.helpers)

    @property
    def emulated(self) -> bool:
        return any(c.slowdown > 1 for c in (*self.classes, *self.helpers))

    @cached_property
    def _owners(self) -> dict[int, DeviceClass]:
        """By rank: it is asked for every rank, and a search for each would take long with many."""
        return {rank: c for c in (*self.classes, *self.helpers) for rank in c.ranks}

    @cached_property
    def _hosts(self) -> dict[str, list[int]]:
        ranks: dict[str, list[int]] = {}
        for fact in self.facts:
            ranks.setdefault(fact.host, []).append(fact.rank)
        return ranks

    def class_of(self, rank: int) -> DeviceClass:
        return self._owners[rank]

    def on_host(self, host: str) -> list[int]:
        return self._hosts.get(host, [])


def assign(classes: Any, facts: Sequence[RankFacts], share_gpus: bool = False) -> Cluster:
    """Gives every rank its device class.

    Args:
        classes: :data:`AUTO` or a mapping of class name to :class:`ClassConfig`.
        facts: one entry a rank, in rank order.
        share_gpus: several ranks may have one GPU, where a host has more GPU ranks than GPUs.

    Raises:
        ConfigError: a rank is in two classes or in none, does not exist, or wants a GPU that its host lacks.
    """
    chosen = _automatic(facts) if classes == AUTO else [_select(name, c, facts) for name, c in classes.items()]
    owner: dict[int, str] = {}
    for item in chosen:
        for rank in item.ranks:
            if rank in owner:
                problem = f"rank {rank} is in class {owner[rank]} too"
                raise ConfigError(f"cluster.classes.{item.name}", list(item.ranks), problem, "take it out of one")
            owner[rank] = item.name
    left = [f.rank for f in facts if f.rank not in owner]
    if left:
        ranks_of = {item.name: list(item.ranks) for item in chosen}
        remedy = f"add rank {left[0]} to a class, or start {len(owner)} ranks"
        raise ConfigError("cluster.classes", ranks_of, f"rank {left[0]} of {len(facts)} belongs to no class", remedy)
    used = [item for item in chosen if item.ranks]
    training, helpers = (tuple(c for c in used if (c.role == TRAIN) == trains) for trains in (True, False))
    _check_helpers(training, helpers)
    cluster = Cluster(training, tuple(facts), tuple(item.name for item in chosen if not item.ranks), helpers)
    for host in dict.fromkeys(fact.host for fact in facts):
        _check_gpus(cluster, host, share_gpus)
    return cluster


def _check_helpers(training: Sequence[DeviceClass], helpers: Sequence[DeviceClass]) -> None:
    """Refuse helpers without anybody to help, and ranks that train behind them.

    Ranks that train are numbered without gaps, so that methods need not know of the others.
    """
    for item in helpers:
        key, last = f"cluster.classes.{item.name}.role", max((max(c.ranks) for c in training), default=-1)
        if not training:
            problem = "no class is left that trains" if len(helpers) > 1 else "it is the only class, which has to train"
            raise ConfigError(key, item.role, problem, f"leave the role of one class at {TRAIN}")
        if min(item.ranks) < last:
            problem = f"rank {min(item.ranks)}, which is to help, comes before rank {last}, which trains"
            raise ConfigError(key, item.role, problem, "give helpers the last ranks: the last host, or its last slots")


def _check_gpus(cluster: Cluster, host: str, share_gpus: bool) -> None:
    ranks = gpu_ranks(cluster, host)
    gpus = len(cluster.facts[ranks[0]].gpus) if ranks else 0
    if len(ranks) <= gpus or (gpus and share_gpus):
        return
    item, why = cluster.class_of(ranks[gpus]), cluster.facts[ranks[0]].gpu_problem  # the first rank without a GPU
    problem = f"host {host} shows {gpus} GPU(s), its ranks want {len(ranks)}{f' ({why})' if why else ''}"
    remedy = "set device: cpu, or install a CUDA build of PyTorch and Horovod on a machine with GPUs"
    if gpus:
        remedy = "set device: cpu, or cluster.share_gpus=true to let several ranks have one GPU"
    elif why:
        remedy = "set device: cpu, or install a driver and a PyTorch that fit together"
    raise ConfigError(f"cluster.classes.{item.name}.device", "cuda", problem, remedy)


def _select(name: str, spec: ClassConfig, facts: Sequence[RankFacts]) -> DeviceClass:
    key = f"cluster.classes.{name}"
    if (spec.ranks is None) == (spec.hosts is None and spec.slots is None):
        raise ConfigError(key, {"ranks": spec.ranks, "hosts": spec.hosts, "slots": spec.slots},
                          "needs either ranks, or hosts and slots", "write ranks: [0] or hosts: 'node*', slots: [0]")
    if spec.ranks is not None:
        ranks = integers(f"{key}.ranks", spec.ranks)
        for rank in ranks:
            if rank >= len(facts):
                problem = f"there is no rank {rank} among {len(facts)}"
                raise ConfigError(f"{key}.ranks", ranks, problem,
                                  f"start {rank + 1} ranks (horovodrun -np {rank + 1}), or leave it out")
    else:
        slots = None if spec.slots is None else integers(f"{key}.slots", spec.slots)
        on_hosts = [f for f in facts if fnmatch(f.host, spec.hosts or "*")]
        ranks = [f.rank for f in on_hosts if slots is None or f.local_rank in slots]
    return DeviceClass(name, spec.device, tuple(sorted(ranks)), spec.slowdown, spec.threads, spec.role)


def integers(key: str, value: Any) -> list[int]:
    """Reads 3, [0, 2] or "0-3,6" as a list of distinct integers."""
    numbers: list[int] = []
    for item in value if isinstance(value, (list, tuple)) else str(value).split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", str(item))
        if match is None:
            raise ConfigError(key, value, f"{item!r} is not a number or a range", "write for example [0, 1] or '0-3'")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(key, value, f"{item!r} is an empty range", f"write '{last}-{first}'")
        numbers += range(first, last + 1)
    if len(set(numbers)) < len(numbers):
        raise ConfigError(key, value, "names one twice", "name each once")
    return numbers


def _automatic(facts: Sequence[RankFacts]) -> list[DeviceClass]:
    """Each visible GPU gets a rank, the other slots are CPU ranks; one class a device model."""
    groups: dict[tuple[str, str], list[int]] = {}
    for fact in facts:
        gpu = fact.gpus[fact.local_rank] if fact.local_rank < len(fact.gpus) else None
        groups.setdefault(("cpu", fact.cpu) if gpu is None else ("cuda", gpu), []).append(fact.rank)
    names = {"cpu": "cpu", "cuda": "gpu"}
    several = {device: len({m for d, m in groups if d == device}) > 1 for device in names}
    return [
        DeviceClass(names[device] + (f"-{_slug(model)}" if several[device] else ""), device, tuple(ranks))
        for (device, model), ranks in groups.items()
    ]


def gpu_index(cluster: Cluster, rank: int) -> int:
    """The index of a rank's GPU: the rank's among the host's GPU ranks, since local_rank counts CPU ranks too.

    Where there are more of them than GPUs, they begin with the first GPU again.
    """
    fact = cluster.facts[rank]
    place = gpu_ranks(cluster, fact.host).index(rank)
    return place % len(fact.gpus) if fact.gpus else place


def shares_a_gpu(cluster: Cluster, ranks: Sequence[int]) -> bool:
    """Whether two of these GPU ranks have the same GPU, so that NCCL refuses to sum among them."""
    places = [(cluster.facts[rank].host, gpu_index(cluster, rank)) for rank in ranks]
    return len(set(places)) < len(places)


def gpu_ranks(cluster: Cluster, host: str) -> list[int]:
    return [rank for rank in cluster.on_host(host) if cluster.class_of(rank).device == "cuda"]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"
