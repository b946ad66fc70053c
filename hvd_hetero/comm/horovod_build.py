"""What the installed Horovod was built with, and what it would hang on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvd_hetero.cluster.device_classes import Cluster, shares_a_gpu
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.errors import ConfigError

MIXED_HOSTS = "mixed-hosts"


def check_mixed_hosts(sets: Sequence[Sequence[int]], facts: Sequence[RankFacts]) -> None:
    """Refuses process sets that an unpatched Horovod 0.28.1 with Gloo would hang on, instead of hanging.

    Its sets meet across hosts under a key made of the rank's place within the set on its host, but with the members
    that have the same place among all the host's ranks; where the two disagree, ``hvd.init`` waits in vain.

    Raises:
        ConfigError: naming the set and the remedy.
    """
    for ranks in sets:
        places: dict[int, int] = {}
        hosts = {facts[r].host for r in ranks}
        for rank in ranks if len(hosts) > 1 else ():
            here = [r for r in ranks if facts[r].host == facts[rank].host]
            among_all = facts[rank].local_rank
            if places.setdefault(here.index(rank), among_all) != among_all and MIXED_HOSTS not in fixes():
                problem = f"this Horovod hangs on a process set of these ranks on hosts {', '.join(sorted(hosts))}"
                remedy = "build Horovod with scripts/setup, which fixes it, or give GPU ranks the last slots of a host"
                raise ConfigError("cluster.classes", list(ranks), problem, remedy)


def check_gpu_sums(cluster: Cluster) -> None:
    """Refuses classes of several GPU ranks where Horovod cannot sum on GPUs.

    Built without CUDA, Horovod 0.28.1 copies their tensors without waiting for them, and ends the process thereafter
    (by its source, not tried); scripts/setup builds with CUDA and NCCL, or with neither.

    Raises:
        ConfigError: naming the class.
    """
    for item in cluster.classes:
        if sums_on_gpus(cluster, item.ranks) and not build_info()["nccl"]:
            problem = f"its {len(item.ranks)} GPU ranks sum among themselves, and this Horovod was built without NCCL"
            remedy = "run scripts/setup where nvcc is, or give each GPU a class of its own"
            raise ConfigError(f"cluster.classes.{item.name}", list(item.ranks), problem, remedy)


def sums_on_gpus(cluster: Cluster, ranks: Sequence[int]) -> bool:
    """Whether these ranks are to sum among themselves on their GPUs: several ranks, and each has a GPU of its own."""
    on_gpus = all(cluster.class_of(rank).device == "cuda" for rank in ranks)
    return len(ranks) > 1 and on_gpus and not shares_a_gpu(cluster, ranks)


def fixes() -> tuple[str, ...]:
    """The names of those of this project's changes that this Horovod was built with (docs/install.md)."""
    try:
        from horovod._hvd_hetero_fixes import FIXES
    except ImportError:
        return ()
    return tuple(FIXES)


def build_info() -> dict[str, Any]:
    """What Horovod was built with."""
    import horovod
    import horovod.torch as hvd

    return {"version": horovod.__version__, "gloo": bool(hvd.gloo_built()), "mpi": bool(hvd.mpi_built()),
            "nccl": bool(hvd.nccl_built()), "fixes": list(fixes())}
