"""Compute how long collectives take on a link. Pure arithmetic.

An allreduce over m ranks, with ``bytes`` on each of them, takes::

    latency * ceil(log2 m) + bytes / bandwidth * 2 (m - 1) / m

the time of a ring's two halves, its starts in a tree; one rank alone sends nothing. :func:`fitted` finds what was not
given of a link from an allreduce that was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """What carries the collectives."""

    latency_sec: float = 0.0
    bytes_per_sec: float = math.inf

    def sum_sec(self, ranks: int, nbytes: float) -> float:
        """Return the seconds of an allreduce, as above."""
        if ranks < 2:
            return 0.0
        return self.latency_sec * _depth(ranks) + sent_bytes(ranks, nbytes) / self.bytes_per_sec

    def exchange_sec(self, nbytes: float) -> float:
        """Return the seconds in which one rank pushes a vector to one server and pulls the model."""
        return 2 * (self.latency_sec + nbytes / self.bytes_per_sec)

    def served_sec(self, workers: int, servers: int, nbytes: float) -> float:
        """Return the seconds in which workers push gradients to servers and pull the sums: two exchanges of all ranks.

        Each takes as long as its busiest rank: a worker sends all of its gradient, a server receives every worker's
        share for it.
        """
        busiest = nbytes * max(1.0, workers / servers)
        return 2 * (self.latency_sec * _depth(workers + servers) + busiest / self.bytes_per_sec)


def sent_bytes(ranks: int, nbytes: float) -> float:
    """Return the bytes that each rank sends in an allreduce."""
    return nbytes * 2 * (ranks - 1) / ranks


def fitted(
    sum_sec: float, ranks: int, nbytes: float, latency_sec: float | None = None, bytes_per_sec: float | None = None
) -> Link:
    """Fit the link on which an allreduce takes ``sum_sec``: what is not given follows from it.

    With neither given, all is put down to the bandwidth. Both given, the measured seconds are not looked at.
    """
    if bytes_per_sec is not None:
        left = sum_sec - Link(0.0, bytes_per_sec).sum_sec(ranks, nbytes)
        return Link(max(0.0, left / _depth(ranks)) if latency_sec is None else latency_sec, bytes_per_sec)
    latency_sec = latency_sec or 0.0
    left = sum_sec - latency_sec * _depth(ranks)
    return Link(latency_sec, sent_bytes(ranks, nbytes) / left if left > 0 else math.inf)


def _depth(ranks: int) -> int:
    return math.ceil(math.log2(ranks))
