"""Give each rank its device, threads and cores."""

from __future__ import annotations

from dataclasses import dataclass

from hvd_hetero.cluster.device_classes import Cluster, gpu_index, gpu_ranks


@dataclass(frozen=True)
class Placement:
    """Where one rank computes: ``cpu`` or ``cuda:INDEX``, its thread count, its cores (None: wherever it may)."""

    device: str
    threads: int
    cores: tuple[int, ...] | None


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
    on_gpus = gpu_ranks(cluster, fact.host)
    device = f"cuda:{gpu_index(cluster, rank)}" if mine.device == "cuda" else "cpu"
    cores = list(fact.cores)[: fact.usable]
    if len(local) > len(cores):
        return Placement(device, mine.threads or 1, None)
    cpu_ranks = [r for r in local if r not in on_gpus]
    for_gpu = (len(cores) - len(cpu_ranks)) // len(on_gpus) if on_gpus else 0
    for_gpu = min(gpu_cores, for_gpu) if cpu_ranks else for_gpu
    for_cpu, spare = divmod(len(cores) - for_gpu * len(on_gpus), len(cpu_ranks)) if cpu_ranks else (0, 0)
    core_counts = {r: for_gpu for r in on_gpus} | {r: for_cpu + (i < spare) for i, r in enumerate(cpu_ranks)}
    fixed = affinity and len(cores) == len(fact.cores)
    bound: tuple[int, ...] = ()
    for other, count in core_counts.items():
        near = fact.gpu_cores[gpu_index(cluster, other)] if other in on_gpus and fact.gpu_cores else ()
        bound = tuple(sorted(cores, key=lambda core: core not in near)[:count])
        if other == rank:
            break
        cores = [core for core in cores if core not in bound]
    return Placement(device, mine.threads or len(bound), bound if fixed else None)
