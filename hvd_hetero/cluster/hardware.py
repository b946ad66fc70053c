"""Find out what a machine has: GPUs, cores, NUMA nodes, number formats. The only place that looks for devices."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hvd_hetero.cluster.cgroups import cpu_limit


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


def has_bf16(device: str) -> bool:
    """Whether a device (``cpu`` or ``cuda:INDEX``) computes in bfloat16 itself and does not just emulate it."""
    import torch

    if device != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = f"{_cpu_info('flags')} {_cpu_info('Features')}".split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def autocast_type(wanted: str | None, device: str) -> Any:
    """The type in which a device computes by ``train.autocast``; None: in that of the tensors.

    Args:
        wanted: bf16: bfloat16 where the device computes in it itself; fp16: float16 on GPUs; auto: the first of the two
            that is possible; None: neither.
        device: ``cpu`` or ``cuda:INDEX``.
    """
    import torch

    if wanted in ("auto", "bf16") and has_bf16(device):
        return torch.bfloat16
    return torch.float16 if wanted in ("auto", "fp16") and device != "cpu" else None


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
