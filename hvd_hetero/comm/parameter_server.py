"""Sums on servers: some ranks push vectors, others add them up, the first pull the sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_hetero.comm.communicator import Comm


class Servers:
    """Partition j of a vector is summed by server j mod s.

    In turn t the partitions t s to t s + s - 1 travel, one for each server: a slice of the vector, cut by
    the alltoall's own counts, so that nothing is copied on a worker.

    Args:
        workers: ranks that push and pull; all other ranks of the job are servers.
        partition_bytes: the last partition of a vector may be smaller, and servers may stay without any.
    """

    def __init__(self, comm: Comm, workers: Sequence[int], partition_bytes: int) -> None:
        self._comm, self._workers, self._bytes = comm, list(workers), partition_bytes
        self._servers = [rank for rank in range(comm.size) if rank not in self._workers]
        self._serving = comm.rank in self._servers

    def sum_(self, vectors: Sequence[Tensor], name: str) -> None:
        """On workers, in place: the sums over all workers. Every rank calls it; a server's vectors are not touched.

        Args:
            vectors: ``[P]`` each, of the same lengths and types on all ranks, on the rank's own device.
        """
        with self._comm.timed():
            for i, vector in enumerate(vectors):
                if self._serving:
                    self._serve(vector.numel(), vector.dtype, f"{name}.{i}")
                else:
                    self._ask(vector, f"{name}.{i}")

    def turns(self, length: int, itemsize: int) -> list[list[int]]:
        """For each turn, how many elements each server sums."""
        size = max(1, self._bytes // itemsize)
        sizes = [min(size, length - start) for start in range(0, length, size)]
        count = len(self._servers)
        return [(sizes[i : i + count] + [0] * count)[:count] for i in range(0, len(sizes), count)]

    def _ask(self, vector: Tensor, name: str) -> None:
        host = self._comm.on_host(vector)
        turns = self.turns(vector.numel(), vector.element_size())
        parts = host.split([sum(sizes) for sizes in turns])
        nothing, empty = self._counts(self._servers, [0] * len(self._servers)), host.new_empty(0)
        pushes = [
            self._comm.alltoall_async(part, self._counts(self._servers, sizes), f"{name}.push.{t}")
            for t, (sizes, part) in enumerate(zip(turns, parts, strict=True))
        ]
        pulls = [self._comm.alltoall_async(empty, nothing, f"{name}.pull.{t}") for t in range(len(turns))]
        for part, push, pull in zip(parts, pushes, pulls, strict=True):
            self._comm.received(push)
            part.copy_(self._comm.received(pull))
        if host is not vector:
            vector.copy_(host)

    def _serve(self, length: int, dtype: torch.dtype, name: str) -> None:
        turns = self.turns(length, torch.empty(0, dtype=dtype).element_size())
        nothing, empty = self._counts(self._workers, [0] * len(self._workers)), torch.empty(0, dtype=dtype)
        pushes = [self._comm.alltoall_async(empty, nothing, f"{name}.push.{t}") for t in range(len(turns))]
        mine, count = self._servers.index(self._comm.rank), len(self._workers)
        pulls = []
        for t, (sizes, push) in enumerate(zip(turns, pushes, strict=True)):
            total = self._comm.received(push).view(count, sizes[mine]).sum(0)
            answers = self._counts(self._workers, [sizes[mine]] * count)
            pulls.append(self._comm.alltoall_async(total.repeat(count), answers, f"{name}.pull.{t}"))
        for pull in pulls:
            self._comm.received(pull)

    def _counts(self, ranks: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """``[ranks of the job]``: what goes to each rank."""
        counts = torch.zeros(self._comm.size, dtype=torch.int32)
        counts[list(ranks)] = torch.tensor(sizes, dtype=torch.int32)
        return counts
