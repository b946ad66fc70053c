"""Collectives among the ranks of a cluster. Only this room imports Horovod.

Every collective is named: Horovod's automatic names are counters of each process, which deadlock as soon as ranks call
a different number of times.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor

from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.comm.async_ops import begin, finished
from hvd_hetero.comm.flat_params import FlatState
from hvd_hetero.comm.horovod_build import check_gpu_sums, check_mixed_hosts, sums_on_gpus
from hvd_hetero.comm.kv_store import forget_addresses, job_env
from hvd_hetero.comm.nonfinite import Exclusions
from hvd_hetero.comm.paths import FLAT, paths_of
from hvd_hetero.comm.tensor_slots import as_bytes, from_bytes
from hvd_hetero.config.schema import AggregationConfig
from hvd_hetero.telemetry.stopwatch import Stopwatch

STOP = "stop"


@dataclass
class Traffic:
    """Bytes that a rank has given to sums and averages, of gradients and models, since they were last taken."""

    sent: int = 0

    def pop(self) -> int:
        taken, self.sent = self.sent, 0
        return taken


class Comm:
    """The job's ranks: one process set a device class, one for the classes' leaders, one a group.

    The leader of a class is its lowest rank. A set of all ranks is Horovod's global set; a class of one rank has
    nobody to talk to within it.

    Args:
        spec: how weighted sums travel, and what happens if a rank's values are non-finite. ``path`` is ``flat`` (scale
            locally, one global sum; host tensors only), ``hierarchical`` (within classes, among leaders, back),
            ``auto`` (flat where all classes are on the CPU) or ``measured``.
        watch: books the time in what is :meth:`timed`; its heartbeat is told of every collective.
        groups: ranks that meet among themselves too.

    Attributes:
        paths: those to choose between, one if there is nothing to choose.
        path: that weighted sums take, ``flat`` or ``hierarchical``; the same on all ranks, changed between two sums.
        all_ranks: all ranks of the job, helpers too; ``size`` is the number of those that train, which all else is of.
        excluded: what this rank was left out of.
        traffic: what it has sent.

    Raises:
        ConfigError: this Horovod cannot make these sets on these hosts, or cannot sum on GPUs.
    """

    def __init__(
        self, cluster: Cluster, rank: int, spec: AggregationConfig | None = None, watch: Stopwatch | None = None,
        groups: Sequence[tuple[int, ...]] = (),
    ) -> None:  # fmt: skip
        spec = spec or AggregationConfig()
        self.rank, self.size, self.watch = rank, cluster.size, watch or Stopwatch()
        self.heartbeat = self.watch.heartbeat
        self.excluded, self.traffic = Exclusions(rank, spec.nan == STOP), Traffic()
        mine = cluster.class_of(rank)
        self._peers, self._training = mine.ranks, tuple(range(self.size))
        self.all_ranks = tuple(range(len(cluster.facts)))
        self._hosts, self._local_ranks = {f.host for f in cluster.facts}, {f.local_rank for f in cluster.facts}
        self._leaders = tuple(sorted(c.ranks[0] for c in cluster.classes))
        self.paths = paths_of(spec, cluster)
        self.path = self.paths[0]
        self._chunk_mb = spec.chunk_mb
        members = dict.fromkeys([*(c.ranks for c in cluster.classes), self._leaders, self._training, *groups])
        sets = {ranks: hvd.ProcessSet(list(ranks)) for ranks in members if 1 < len(ranks) < len(self.all_ranks)}
        check_mixed_hosts(list(sets), cluster.facts)
        check_gpu_sums(cluster)
        with self.heartbeat.waiting("init"):
            hvd.init(process_sets=list(sets.values()))
        sets[self.all_ranks] = hvd.global_process_set
        self._sets = sets
        self._sums_on = cache(lambda ranks: sums_on_gpus(cluster, ranks) and bool(hvd.nccl_built()))
        self._staging: dict[tuple[torch.dtype, int], Tensor] = {}
        self._copying: torch.cuda.Stream | None = None

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Book all collectives of a block, with the time since the last span, as one in which all ranks meet."""
        yield
        self.watch.collective()

    def skip_collective(self) -> None:
        """Take no part in what the other ranks book as one collective."""
        self.watch.skip_collective()

    def set_path(self, path: str) -> None:
        """Take this path from now on, if it is one of :attr:`paths`; all ranks are told the same."""
        self.path = path if path in self.paths else self.path

    # ---- the aggregation --------------------------------------------------------------------------------------------

    def weighted_sum_(self, vector: Tensor, weight: float, name: str, ranks: tuple[int, ...] | None = None) -> None:
        """In place, on every rank: the sum over all ranks of weight times vector, bit-identical everywhere.

        Args:
            vector: ``[P]``, on the rank's own device.
            weight: equal within a class.
            ranks: those that take part: all, a class or a group. GPU ranks of a class that share a GPU go through the
                host, since NCCL refuses them, and so does a group that is not all on GPUs.
        """
        ranks = ranks or self._training
        among = self._peers if len(ranks) == self.size else ranks
        if vector.device.type != "cpu" and len(among) > 1 and not self._sums_on(among):
            host = self.on_host(vector)
            self.weighted_sum_(host, weight, name, ranks)
            vector.copy_(host)
            return
        if self.path == FLAT or len(ranks) < self.size or self.size == 1:
            if weight != 1:
                vector.mul_(weight)
            self._sum_(vector, ranks, f"{name}.flat")
            return
        self._sum_by_class_(vector, weight, name)

    def _sum_by_class_(self, vector: Tensor, weight: float, name: str) -> None:
        """Within classes, among leaders, and back.

        Piece by piece: while the leaders sum one, their classes sum the next one, and are given the one before.
        """
        group, root = self._sets.get(self._peers), self._peers[0]
        back = f"{name}.back.{root}"
        size = vector.numel() if self._chunk_mb is None else int(self._chunk_mb * 1e6 / vector.element_size())
        pieces, returning = vector.split(max(size, 1)), []
        for i, piece in enumerate(self._within_class(pieces, weight, f"{name}.class.{root}")):
            if len(self._leaders) == 1:
                continue
            if self.rank in self._leaders:
                host = self.on_host(piece)
                self._sum_(host, self._leaders, f"{name}.leaders.{i}")
                if host is not piece:
                    piece.copy_(host)
            if group is not None:
                returning.append(begin(hvd.broadcast_async_, piece, root, process_set=group, name=f"{back}.{i}"))
        for handle in returning:
            self._finish(handle, back)

    def _within_class(self, pieces: Sequence[Tensor], weight: float, name: str) -> Iterator[Tensor]:
        """Pieces that are weighted and summed over the class; the next one is on its way already.

        Not all at once: Horovod would join again what it finds waiting together.
        """
        group = self._sets.get(self._peers)

        def begun(i: int) -> int:
            self.traffic.sent += pieces[i].nbytes
            return begin(hvd.allreduce_async_, pieces[i], op=hvd.Sum, prescale_factor=weight, process_set=group,
                          name=f"{name}.{i}")  # fmt: skip

        handle = begun(0) if group is not None else None
        for i, piece in enumerate(pieces):
            if handle is None:
                if weight != 1:
                    piece.mul_(weight)
            else:
                self._finish(handle, name)
                handle = begun(i + 1) if i + 1 < len(pieces) else handle
            yield piece

    def _sum_(self, vector: Tensor, ranks: tuple[int, ...], name: str) -> None:
        if len(ranks) > 1:
            self.traffic.sent += vector.nbytes
            self._call(hvd.allreduce_async_, vector, op=hvd.Sum, process_set=self.group(ranks), name=name)

    def group(self, ranks: tuple[int, ...]) -> hvd.ProcessSet:
        """The process set of all ranks, of a class or a group of several, or of the leaders."""
        return self._sets[ranks]

    def on_host(self, vector: Tensor) -> Tensor:
        """The vector itself, or a copy in pinned memory that is reused from call to call.

        Copied on a stream of its own: what is put to the device meanwhile does not wait for it.
        """
        if vector.device.type == "cpu":
            return vector
        key = (vector.dtype, vector.numel())
        if key not in self._staging:
            self._staging[key] = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
        if self._copying is None:
            self._copying = torch.cuda.Stream(vector.device)
        self._copying.wait_stream(torch.cuda.current_stream(vector.device))
        with torch.cuda.stream(self._copying):
            staged = self._staging[key].copy_(vector, non_blocking=True)
        self._copying.synchronize()
        return staged

    # ---- everything else --------------------------------------------------------------------------------------------

    def broadcast(self, tensor: Tensor, name: str, root: int = 0, ranks: tuple[int, ...] | None = None) -> Tensor:
        """Gives every rank the root's tensor; shape and dtype are the same on all, the contents only matter on root.

        Tensors travel through the host: CPU and CUDA ranks cannot meet in one call otherwise. A tensor that lies there
        already is overwritten.

        Args:
            ranks: those that take part: all, or one class.
        """
        ranks = ranks or self._training
        if len(ranks) == 1:
            return tensor
        host = tensor.detach().cpu().contiguous()
        self._call(hvd.broadcast_async_, host, root, process_set=self.group(ranks), name=name)
        return host

    def broadcast_state(self, state: FlatState, root: int = 0) -> None:
        """Gives every rank the root's model, bit by bit, whatever types its tensors have."""
        state.refresh()
        with torch.no_grad():
            for i, vector in enumerate(state.vectors):
                received = self.broadcast(vector.view(torch.uint8), f"model.{i}", root)
                vector.view(torch.uint8).copy_(received)
        kinds = json.loads(self.broadcast_text(json.dumps(state.untrained.kinds()), "model.kinds", root))
        parts = [as_bytes(tensor).cpu() for tensor in state.untrained.tensors().values()]
        size = sum(math.prod(shape) * getattr(torch, kind).itemsize for _, kind, shape, *_ in kinds)
        data = torch.cat(parts) if parts and self.rank == root else torch.empty(size, dtype=torch.uint8)
        if size:
            state.untrained.receive(kinds, self.broadcast(data, "model.others", root))
        state.untrained.remember()

    def broadcast_text(self, text: str, name: str, root: int = 0) -> str:
        """Gives every rank the root's text."""
        encoded = torch.tensor(list(text.encode()), dtype=torch.uint8)
        size = int(self.broadcast(torch.tensor([len(encoded)]), f"{name}.size", root))
        received = self.broadcast(encoded if self.rank == root else torch.empty(size, dtype=torch.uint8), name, root)
        return bytes(received.tolist()).decode()

    def gather(
        self, tensor: Tensor, name: str, sizes: Sequence[int] | None = None, ranks: tuple[int, ...] | None = None
    ) -> list[Tensor]:
        """Gives every rank the tensors of all ranks, by rank.

        Args:
            tensor: ``[K]`` on the host.
            sizes: K of every rank, if they are not the same.
            ranks: those that take part: all, or one class.
        """
        ranks = ranks or self._training
        if len(ranks) == 1:
            return [tensor]
        gathered = self._call(hvd.allgather_async, tensor, process_set=self.group(ranks), name=name)
        return list(gathered.split(list(sizes) if sizes is not None else len(tensor)))

    def gather_text(self, text: str, name: str, ranks: tuple[int, ...] | None = None) -> list[str]:
        """Gives every rank the texts of all ranks, by rank.

        Args:
            ranks: those that take part: all, or one class.
        """
        encoded = torch.tensor(list(text.encode()), dtype=torch.uint8)
        sizes = [int(size) for size in self.gather(torch.tensor([len(encoded)]), f"{name}.sizes", ranks=ranks)]
        return [bytes(part.tolist()).decode() for part in self.gather(encoded, name, sizes, ranks)]

    def gather_tensors(self, tensor: Tensor, name: str) -> list[Tensor]:
        """Gives every rank the tensors of all ranks, by rank, of whatever shapes and types, on its tensor's device."""
        kind = str(tensor.dtype).removeprefix("torch.")
        kinds = self.gather_text(json.dumps([kind, list(tensor.shape)]), f"{name}.kinds")
        formats = [(getattr(torch, kind), shape) for kind, shape in map(json.loads, kinds)]
        sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in formats]
        parts = self.gather(as_bytes(tensor).cpu(), name, sizes)
        return [from_bytes(part, *of).to(tensor.device) for part, of in zip(parts, formats, strict=True)]

    def gather_bytes(self, content: bytes, name: str, root: int = 0) -> list[bytes]:
        """Gives the root the bytes of all ranks, by rank, fewer than 2**31 of each; the others get nothing."""
        sizes = [int(size) for size in self.gather(torch.tensor([len(content)]), f"{name}.sizes")]
        counts = torch.zeros(self.size, dtype=torch.int32)
        counts[root] = len(content)
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        received = self.received(self.alltoall_async(data, counts, name))
        return [part.numpy().tobytes() for part in received.split(sizes)] if self.rank == root else []

    def sum_(self, tensor: Tensor, name: str, ranks: tuple[int, ...] | None = None) -> None:
        """Adds up a host tensor over all ranks, or those of one class, in place."""
        self._sum_(tensor, ranks or self._training, name)

    def sum(self, values: Sequence[float], name: str) -> list[float]:
        """The sums over all ranks of a few numbers."""
        total = torch.tensor(values, dtype=torch.float64)
        self._sum_(total, self._training, name)
        return [float(x) for x in total]

    def max(self, values: Sequence[float], name: str) -> list[float]:
        """The maxima over all ranks of a few numbers."""
        most = torch.tensor(values, dtype=torch.float64)
        self.max_async_(most, name)()
        return [float(x) for x in most]

    def max_async_(self, tensor: Tensor, name: str, ranks: tuple[int, ...] | None = None) -> Callable[[], None]:
        """Begins, in place and for each element of a host tensor, the maximum over all ranks, or those of one class.

        Returns:
            What waits for it.
        """
        return self._begun_(hvd.Max, tensor, name, ranks)

    def sum_async_(self, tensor: Tensor, name: str, ranks: tuple[int, ...] | None = None) -> Callable[[], None]:
        """Begins the sum in the same way."""
        return self._begun_(hvd.Sum, tensor, name, ranks)

    def _begun_(self, op: Any, tensor: Tensor, name: str, ranks: tuple[int, ...] | None) -> Callable[[], None]:
        ranks = ranks or self._training
        if len(ranks) == 1:
            return lambda: None
        self.traffic.sent += tensor.nbytes
        handle = begin(hvd.allreduce_async_, tensor, op=op, process_set=self.group(ranks), name=name)
        return lambda: self._finish(handle, name)

    def alltoall_async(self, tensor: Tensor, counts: Tensor, name: str) -> int:
        """Begins to send consecutive pieces of a host tensor ``[K]`` to the other ranks.

        Args:
            counts: ``[ranks]``, int32: elements for each rank; they add up to K.

        Returns:
            A handle for :meth:`received`.
        """
        self.traffic.sent += tensor.nbytes
        return begin(hvd.alltoall_async, tensor, counts, process_set=self.group(self._training), name=name)

    def received(self, handle: int) -> Tensor:
        """Waits for what the other ranks sent to this one, in the order of the senders."""
        received: Tensor = self._finish(handle, "alltoall")[0]
        return received

    def agree(self, digest: str, name: str, what: str) -> None:
        """Makes sure that all ranks hold the same thing.

        Args:
            digest: 16 hexadecimal digits.

        Raises:
            RuntimeError: naming the first rank that differs from rank 0.
        """
        number = torch.tensor([int(digest, 16) >> 1])
        values = [int(x) for x in self.gather(number, name)]
        odd = [r for r, value in enumerate(values) if value != values[0]]
        if odd:
            raise RuntimeError(f"rank {odd[0]} has another {what} than rank 0")

    def clone_for_thread(self) -> Comm:
        """The same ranks, for a thread beside the rank's own: its waiting is not the rank's."""
        other = copy.copy(self)
        other.watch, other._staging, other._copying = Stopwatch(), {}, None
        other.heartbeat = other.watch.heartbeat
        return other

    def barrier(self, name: str, ranks: tuple[int, ...] | None = None) -> None:
        self.sum_(torch.zeros(1, dtype=torch.float32), name, ranks)

    def close(self) -> None:
        """Waits for all ranks, then leaves: a rank that leaves early takes the others down with it."""
        if self.rank == 0:
            forget_addresses(job_env(), self._hosts, self._local_ranks)
        self.barrier("close", self.all_ranks)
        hvd.shutdown()

    def _call(self, operation: Callable[..., int], *args: Any, name: str, **options: Any) -> Any:
        return self._finish(begin(operation, *args, name=name, **options), name)

    def _finish(self, handle: int, name: str) -> Any:
        with self.heartbeat.waiting(name):
            return finished(handle)
