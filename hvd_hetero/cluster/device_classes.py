"""Which rank belongs to which device class, and which device, threads and cores it gets.

The only place that looks for devices. Nothing here branches on what a class is called.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hvd_hetero.cluster.cgroups import cpu_limit
from hvd_hetero.config.schema import AUTO, ClassConfig
from hvd_hetero.errors import ConfigError


@dataclass(frozen=True)
class RankFacts:
    """What one rank knows of itself before the job starts; all ranks exchange theirs.

    Attributes:
        gpus: names of the GPUs that the rank's host shows, by index.
        cores: the CPU cores that the rank's process may run on, NUMA node by NUMA node.
        cpus: so many of them at once, with all that runs in its container; None: all.
        gpu_cores: of its cores, those on each GPU's own NUMA node, by GPU; none where that is not known.
        gpu_problem: why no GPU can be used, as PyTorch says it.
    """

    rank: int
    host: str
    local_rank: int
    gpus: tuple[str, ...]
    cpu: str
    cores: tuple[int, ...]
    cpus: float | None = None
    gpu_cores: tuple[tuple[int, ...], ...] = ()
    gpu_problem: str = ""

    @property
    def usable(self) -> int:
        """For how many threads there are CPUs at once, one at least: more would be halted all together."""
        return len(self.cores) if self.cpus is None else max(1, int(self.cpus))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RankFacts:
        lists = {name: tuple(content[name]) for name in ("gpus", "cores")}
        return cls(**{**content, **lists, "gpu_cores": tuple(map(tuple, content["gpu_cores"]))})


@dataclass(frozen=True)
class DeviceClass:
    """Ranks that run at one speed: they take the same local steps and carry the same weight."""

    name: str
    device: str
    ranks: tuple[int, ...]
    slowdown: float = 1.0
    threads: int | None = None


@dataclass(frozen=True)
class Placement:
    """Where one rank computes: ``cpu`` or ``cuda:INDEX``, its thread count, its cores (None: wherever it may)."""

    device: str
    threads: int
    cores: tuple[int, ...] | None


@dataclass(frozen=True)
class Cluster:
    """N device classes over all ranks, as data.

    Attributes:
        classes: in the order of the configuration; each has at least one rank, and every rank is in exactly one.
        facts: one entry a rank, by rank.
        empty: names of classes that were configured but matched no rank.
    """

    classes: tuple[DeviceClass, ...]
    facts: tuple[RankFacts, ...]
    empty: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return len(self.facts)

    @property
    def emulated(self) -> bool:
        return any(c.slowdown > 1 for c in self.classes)

    def class_of(self, rank: int) -> DeviceClass:
        return next(c for c in self.classes if rank in c.ranks)

    def on_host(self, host: str) -> list[int]:
        return [f.rank for f in self.facts if f.host == host]


def local_facts(rank: int, host: str, local_rank: int) -> RankFacts:
    """Looks at this machine: its GPUs (without claiming one), its CPU model, the cores this process may use."""
    nodes, (gpus, problem) = numa_nodes(), _gpus()
    cores = sorted(os.sched_getaffinity(0), key=lambda core: (nodes.get(core, -1), core))
    beside = [pci_node(gpu.pci_domain_id, gpu.pci_bus_id, gpu.pci_device_id) for gpu in gpus]
    gpu_cores = tuple(tuple(c for c in cores if node is not None and nodes.get(c) == node) for node in beside)
    names = tuple(gpu.name for gpu in gpus)
    limit = cpu_limit()
    cpus = limit.value if limit is not None and limit.value < len(cores) else None
    return RankFacts(rank, host, local_rank, names, _cpu_model(), tuple(cores), cpus, gpu_cores, problem)


def _gpus() -> tuple[list[Any], str]:
    """The properties of each GPU here, or why there is none to be used, where there may be one."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return [], ""
    try:
        torch.cuda.init()  # the driver may be missing, or too old for this PyTorch; counting GPUs does not show that
    except RuntimeError as error:
        return [], str(error).strip().splitlines()[0]
    return [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())], ""


def usable_cores() -> int:
    """For how many threads of this process there are CPUs at once."""
    cores, limit = len(os.sched_getaffinity(0)), cpu_limit()
    return cores if limit is None else max(1, min(cores, int(limit.value)))


def limit_threads() -> None:
    """Lets torch compute in no more threads than there are CPUs for at once; by itself it looks at cores alone."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


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
        given = {item.name: list(item.ranks) for item in chosen}
        remedy = f"add rank {left[0]} to a class, or start {len(owner)} ranks"
        raise ConfigError("cluster.classes", given, f"rank {left[0]} of {len(facts)} belongs to no class", remedy)
    used = tuple(item for item in chosen if item.ranks)
    cluster = Cluster(used, tuple(facts), tuple(item.name for item in chosen if not item.ranks))
    for host in dict.fromkeys(fact.host for fact in facts):
        _check_gpus(cluster, host, share_gpus)
    return cluster


def _check_gpus(cluster: Cluster, host: str, share_gpus: bool) -> None:
    ranks = _gpu_ranks(cluster, host)
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


def place(cluster: Cluster, rank: int, gpu_cores: int, affinity: bool) -> Placement:
    """Divides a host's cores among its ranks: GPU ranks keep ``gpu_cores`` each, CPU ranks share the rest evenly.

    Where there are no CPU ranks, GPU ranks share all of them.

    A rank's cores follow one another in the order of the host's NUMA nodes, so that few ranks have cores of two; a GPU
    rank is given those first that are on its GPU's node. No two ranks share a core where there are enough; with more
    ranks than cores each gets one thread and no fixed core. Where a container may have only some of its cores at once,
    so many are divided, and none is fixed: other containers of the host would choose the same ones.
    """
    mine = cluster.class_of(rank)
    fact = cluster.facts[rank]
    local = cluster.on_host(fact.host)
    gpu_ranks = _gpu_ranks(cluster, fact.host)
    device = f"cuda:{gpu_index(cluster, rank)}" if mine.device == "cuda" else "cpu"
    cores = list(fact.cores)[: fact.usable]
    if len(local) > len(cores):
        return Placement(device, mine.threads or 1, None)
    cpu_ranks = [r for r in local if r not in gpu_ranks]
    for_gpu = (len(cores) - len(cpu_ranks)) // len(gpu_ranks) if gpu_ranks else 0
    for_gpu = min(gpu_cores, for_gpu) if cpu_ranks else for_gpu
    for_cpu, spare = divmod(len(cores) - for_gpu * len(gpu_ranks), len(cpu_ranks)) if cpu_ranks else (0, 0)
    shares = {r: for_gpu for r in gpu_ranks} | {r: for_cpu + (i < spare) for i, r in enumerate(cpu_ranks)}
    fixed = affinity and len(cores) == len(fact.cores)
    own: tuple[int, ...] = ()
    for other, share in shares.items():
        near = fact.gpu_cores[gpu_index(cluster, other)] if other in gpu_ranks and fact.gpu_cores else ()
        own = tuple(sorted(cores, key=lambda core: core not in near)[:share])
        if other == rank:
            break
        cores = [core for core in cores if core not in own]
    return Placement(device, mine.threads or len(own), own if fixed else None)


def parse_hosts(text: str) -> list[tuple[str, int]]:
    """Reads ``host:slots,host:slots`` as horovodrun's -H does; a host without a number has one slot.

    Raises:
        ConfigError: malformed, a host named twice, no slot at all.
    """
    hosts = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*([A-Za-z0-9._-]+)(?::([0-9]+))?\s*", item)
        if match is None or match[2] == "0":
            raise ConfigError("cluster.hosts", text, f"{item!r} is not host:slots", "write for example node1:2,node2:4")
        hosts.append((match[1], int(match[2] or 1)))
    names = [name for name, _ in hosts]
    if len(set(names)) < len(names):
        raise ConfigError("cluster.hosts", text, "a host is named twice", "give each host once, with all its slots")
    return hosts


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
    return DeviceClass(name, spec.device, tuple(sorted(ranks)), spec.slowdown, spec.threads)


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
    place = _gpu_ranks(cluster, fact.host).index(rank)
    return place % len(fact.gpus) if fact.gpus else place


def shares_a_gpu(cluster: Cluster, ranks: Sequence[int]) -> bool:
    """Whether two of these GPU ranks have the same GPU, so that NCCL refuses to sum among them."""
    places = [(cluster.facts[rank].host, gpu_index(cluster, rank)) for rank in ranks]
    return len(set(places)) < len(places)


def _gpu_ranks(cluster: Cluster, host: str) -> list[int]:
    return [rank for rank in cluster.on_host(host) if cluster.class_of(rank).device == "cuda"]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"


def has_bf16(device: str) -> bool:
    """Whether a device (``cpu`` or ``cuda:INDEX``) computes in bfloat16 itself and does not just emulate it."""
    import torch

    if device != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = f"{_cpu_info('flags')} {_cpu_info('Features')}".split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def numa_nodes(system: Path = Path("/sys/devices/system/node")) -> dict[int, int]:
    """The NUMA node of each core; empty where the kernel tells of none."""
    nodes = {}
    for path in system.glob("node[0-9]*/cpulist"):
        for part in filter(None, path.read_text().strip().split(",")):
            first, _, last = part.partition("-")
            nodes.update(dict.fromkeys(range(int(first), int(last or first) + 1), int(path.parent.name[4:])))
    return nodes


def pci_node(domain: int, bus: int, device: int, system: Path = Path("/sys/bus/pci/devices")) -> int | None:
    """The NUMA node that a PCI device is on; None where the kernel does not tell."""
    path = system / f"{domain:04x}:{bus:02x}:{device:02x}.0" / "numa_node"
    node = int(path.read_text()) if path.exists() else -1
    return node if node >= 0 else None


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.machine()


def _cpu_info(name: str) -> str:
    """What the kernel says of the first core under this name, or nothing."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":", 1)[1].strip() for x in lines if x.partition(":")[0].strip() == name), "")
