"""Collectives among the ranks of a cluster. The only place that imports Horovod.

Every collective is named: Horovod's automatic names are counters of each process, which deadlock as soon as ranks call
a different number of times. Waiting polls and sleeps, because Horovod's own wait spins, which costs the other ranks of
a busy CPU host their cores.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor

from hvd_hetero.cluster import Cluster, RankFacts
from hvd_hetero.comm.finite import LeftOut
from hvd_hetero.comm.flat import FlatState
from hvd_hetero.errors import ConfigError
from hvd_hetero.pulse import Pulse

POLL_SEC = 5e-5
STOP = "stop"


class PeerLost(RuntimeError):
    """A collective could not finish because another rank is gone."""


PEER_LOST = (PeerLost, HorovodInternalError)
"""What a collective may raise, when it is begun or while it is waited for, because another rank is gone."""


class Comm:
    """The job's ranks: one process set a device class, one for the classes' leaders.

    The leader of a class is its lowest rank. A set of all ranks is Horovod's global set; a class of one rank has
    nobody to talk to within it.

    Args:
        path: how weighted sums travel: ``flat`` (scale locally, one global sum; host tensors only),
            ``hierarchical`` (within classes, among leaders, back), or ``auto`` (flat where all classes are on the CPU).
        pulse: told of every collective.
        nan: what happens if a rank's numbers have gone bad: ``leave_out`` or ``stop``.

    Attributes:
        left_out: what this rank was left out of.

    Raises:
        ConfigError: this Horovod cannot make these sets on these hosts.
    """

    def __init__(
        self, cluster: Cluster, rank: int, path: str = "auto", pulse: Pulse | None = None, nan: str = "leave_out"
    ) -> None:
        self.rank, self.size, self.pulse = rank, cluster.size, pulse or Pulse()
        self.left_out = LeftOut(rank, nan == STOP)
        mine = cluster.class_of(rank)
        self._peers = mine.ranks
        self._leaders = tuple(sorted(c.ranks[0] for c in cluster.classes))
        on_cpu = all(c.device == "cpu" for c in cluster.classes)
        if path == "flat" and not on_cpu:
            problem = "host and device tensors cannot be summed in one call"
            raise ConfigError("aggregation.path", path, problem, "set aggregation.path=hierarchical or auto")
        self.path = "flat" if path == "flat" or (path == "auto" and on_cpu) else "hierarchical"
        members = dict.fromkeys([*(c.ranks for c in cluster.classes), self._leaders])
        sets = {ranks: hvd.ProcessSet(list(ranks)) for ranks in members if 1 < len(ranks) < self.size}
        check_mixed_hosts(list(sets), cluster.facts)
        with self.pulse.waiting("init"):
            hvd.init(process_sets=list(sets.values()))
        sets[tuple(range(self.size))] = hvd.global_process_set
        self._sets = sets
        self._staging: dict[tuple[torch.dtype, int], Tensor] = {}

    # ---- the aggregation --------------------------------------------------------------------------------------------

    def weighted_sum_(self, vector: Tensor, weight: float, name: str, ranks: tuple[int, ...] | None = None) -> None:
        """In place, on every rank: the sum over all ranks of weight times vector, bit-identical everywhere.

        Args:
            vector: ``[P]``, on the rank's own device.
            weight: equal within a class.
            ranks: those that take part: all, or one class.
        """
        ranks = ranks or tuple(range(self.size))
        if self.path == "flat" or len(ranks) < self.size or self.size == 1:
            if weight != 1:
                vector.mul_(weight)
            self._sum_(vector, ranks, f"{name}.flat")
            return
        group = self._sets.get(self._peers)
        if group is None:
            vector.mul_(weight)
        else:
            mine = f"{name}.class.{self._peers[0]}"
            self._wait(
                lambda: hvd.allreduce_async_(vector, op=hvd.Sum, prescale_factor=weight, process_set=group, name=mine),
                mine,
            )
        if len(self._leaders) == 1:
            return
        if self.rank in self._leaders:
            host = self.on_host(vector)
            self._sum_(host, self._leaders, f"{name}.leaders")
            if host is not vector:
                vector.copy_(host)
        if group is not None:
            back = f"{name}.back.{self._peers[0]}"
            self._wait(lambda: hvd.broadcast_async_(vector, self._peers[0], process_set=group, name=back), back)

    def _sum_(self, vector: Tensor, ranks: tuple[int, ...], name: str) -> None:
        if len(ranks) > 1:
            self._wait(lambda: hvd.allreduce_async_(vector, op=hvd.Sum, process_set=self.group(ranks), name=name), name)

    def group(self, ranks: tuple[int, ...]) -> hvd.ProcessSet:
        """The process set of all ranks, of a class of several, or of the leaders."""
        return self._sets[ranks]

    def on_host(self, vector: Tensor) -> Tensor:
        """The vector itself, or a copy in pinned memory that is reused from call to call."""
        if vector.device.type == "cpu":
            return vector
        key = (vector.dtype, vector.numel())
        if key not in self._staging:
            self._staging[key] = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
        return self._staging[key].copy_(vector)

    # ---- everything else --------------------------------------------------------------------------------------------

    def broadcast(self, tensor: Tensor, name: str, root: int = 0) -> Tensor:
        """Gives every rank the root's tensor; shape and dtype are the same on all, the contents only matter on root.

        Tensors travel through the host: CPU and CUDA ranks cannot meet in one call otherwise. A tensor that lies there
        already is overwritten.
        """
        if self.size == 1:
            return tensor
        host = tensor.detach().cpu().contiguous()
        self._wait(lambda: hvd.broadcast_async_(host, root, name=name), name)
        return host

    def broadcast_state(self, state: FlatState, root: int = 0) -> None:
        """Gives every rank the root's model."""
        for i, tensor in enumerate(state.everything()):
            with torch.no_grad():
                tensor.copy_(self.broadcast(tensor, f"model.{i}", root).view(tensor.shape))

    def gather(self, tensor: Tensor, name: str, sizes: Sequence[int] | None = None) -> list[Tensor]:
        """Gives every rank the tensors of all ranks, by rank.

        Args:
            tensor: ``[K]`` on the host.
            sizes: K of every rank, if they are not the same.
        """
        if self.size == 1:
            return [tensor]
        whole = self._wait(lambda: hvd.allgather_async(tensor, name=name), name)
        return list(whole.split(list(sizes) if sizes is not None else len(tensor)))

    def sum(self, values: Sequence[float], name: str) -> list[float]:
        """The sums over all ranks of a few numbers."""
        total = torch.tensor(values, dtype=torch.float64)
        self._sum_(total, tuple(range(self.size)), name)
        return [float(x) for x in total]

    def max(self, values: Sequence[float], name: str) -> list[float]:
        """The maxima over all ranks of a few numbers."""
        most = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            self._wait(lambda: hvd.allreduce_async_(most, op=hvd.Max, name=name), name)
        return [float(x) for x in most]

    def max_(self, tensor: Tensor, name: str, ranks: tuple[int, ...] | None = None) -> None:
        """In place, for each element of a host tensor: the maximum over all ranks, or those of one class."""
        ranks = ranks or tuple(range(self.size))
        if len(ranks) > 1:
            self._wait(lambda: hvd.allreduce_async_(tensor, op=hvd.Max, process_set=self.group(ranks), name=name), name)

    def alltoall_async(self, tensor: Tensor, counts: Tensor, name: str) -> int:
        """Begins to send consecutive pieces of a host tensor ``[K]`` to the other ranks.

        Args:
            counts: ``[ranks]``, int32: elements for each rank; they add up to K.

        Returns:
            A handle for :meth:`received`.
        """
        handle: int = guarded(lambda: hvd.alltoall_async(tensor, counts, name=name))
        return handle

    def received(self, handle: int) -> Tensor:
        """Waits for what the other ranks sent to this one, in the order of the senders."""
        received: Tensor = self._wait(lambda: handle, "alltoall")[0]
        return received

    def agree(self, digest: str, name: str, what: str) -> None:
        """Makes sure that all ranks hold the same thing.

        Args:
            digest: 16 hexadecimal digits.

        Raises:
            RuntimeError: naming the first rank that differs from rank 0.
        """
        number = torch.tensor([int(digest, 16) >> 1])
        said = [int(x) for x in self.gather(number, name)]
        odd = [r for r, value in enumerate(said) if value != said[0]]
        if odd:
            raise RuntimeError(f"rank {odd[0]} has another {what} than rank 0")

    def beside(self) -> Comm:
        """The same ranks, for a thread beside the rank's own: its waiting is not the rank's."""
        other = copy.copy(self)
        other.pulse, other._staging = Pulse(), {}
        return other

    def barrier(self, name: str) -> None:
        self.sum([0.0], name)

    def close(self) -> None:
        """Waits for all ranks, then leaves: a rank that leaves early takes the others down with it."""
        self.barrier("close")
        hvd.shutdown()

    def _wait(self, begin: Callable[[], int], name: str) -> Any:
        # to begin is guarded too: Horovod refuses it, of a set that has lost a rank
        with self.pulse.waiting(name):
            return guarded(lambda: _done(begin()))


def wait_until(handle: int) -> None:
    """Returns when the operation is done, without taking its result."""
    while not hvd.poll(handle):
        time.sleep(POLL_SEC)


def _done(handle: int) -> Any:
    wait_until(handle)
    return hvd.synchronize(handle)


def guarded(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except HorovodInternalError as error:
        raise PeerLost(f"another rank is gone ({str(error).splitlines()[0]})") from error
    except ValueError as error:
        # what Horovod says of a set that it gave up after a member died
        if "Process set provided does not exist" in str(error):
            raise PeerLost("another rank is gone (its process set was given up)") from error
        raise


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
            if places.setdefault(here.index(rank), among_all) != among_all and not carries_fixes():
                problem = f"this Horovod hangs on a process set of these ranks on hosts {', '.join(sorted(hosts))}"
                remedy = "build Horovod with scripts/setup, which fixes it, or give GPU ranks the last slots of a host"
                raise ConfigError("cluster.classes", list(ranks), problem, remedy)


def carries_fixes() -> bool:
    """Whether this Horovod was built with this project's patch."""
    try:
        from horovod import _hvd_hetero_fixes  # noqa: F401
    except ImportError:
        return False
    return True


def build_info() -> dict[str, Any]:
    """What Horovod was built with."""
    import horovod

    return {"version": horovod.__version__, "gloo": bool(hvd.gloo_built()), "mpi": bool(hvd.mpi_built()),
            "nccl": bool(hvd.nccl_built()), "fixes": carries_fixes()}
