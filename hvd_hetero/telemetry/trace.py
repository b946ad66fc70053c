"""A timeline of a few rounds: every rank's spans on one clock, in the format that Perfetto and Chrome open.

Clocks of different hosts do not agree. Ranks leave a collective together, so the ends of the collectives that all took
part in tell by how much each rank's clock is off. On one host there is one clock, and ends differ only because a rank
is woken up late: clocks by which ranks were in each collective at the same time are taken as they are.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hvd_hetero.telemetry.stopwatch import COLLECTIVE, Stopwatch

TRACE = "trace.json"
CODES = ("compute", "data", COLLECTIVE, "blocked", "comm")
"""Kinds of spans as numbers, in which form they are gathered."""

Span = tuple[str, float, float]


class Recorder:
    """Keeps one rank's spans of a few rounds.

    Args:
        rounds: how many after each :meth:`start`.
    """

    def __init__(self, watch: Stopwatch, rounds: int) -> None:
        self._watch, self._rounds = watch, rounds
        self._left = 0
        self.spans: list[Span] = []

    def start(self) -> None:
        """Start recording; drop what was recorded before."""
        self._left = self._rounds
        if self._left:
            self.spans = self._watch.spans = []

    def end_round(self) -> None:
        """Counts a round, and stops after the last one."""
        if self._left:
            self._left -= 1
            if not self._left:
                self._watch.spans = None

    def stop(self) -> None:
        """Stops, however many rounds there were."""
        self._left, self._watch.spans = 0, None

    def to_numbers(self) -> list[float]:
        """The spans as a flat list, three numbers each: see :func:`from_numbers`."""
        return [number for kind, start, end in self.spans for number in (CODES.index(kind), start, end)]


def from_numbers(numbers: Sequence[float]) -> list[Span]:
    """The spans that :meth:`Recorder.to_numbers` gave."""
    return [(CODES[int(numbers[i])], numbers[i + 1], numbers[i + 2]) for i in range(0, len(numbers), 3)]


def timeline(ranks: Sequence[Sequence[Span]]) -> list[list[Span]]:
    """Spans of all ranks on one clock that starts at 0, collectives split into ``blocked`` and ``comm``.

    Where ranks met in different numbers of collectives, nothing tells which belong together: clocks are taken as they
    are, and collectives stay whole, as ``comm``.
    """
    met = [[span for span in spans if span[0] == COLLECTIVE] for spans in ranks]
    together = len({len(spans) for spans in met}) == 1 and bool(met and met[0])
    off = [0.0] * len(ranks)
    if together:
        off = [_off(spans, met[0]) for spans in met]
    transfer = [min(end - start for _, start, end in spans) for spans in zip(*met, strict=together)]
    origin = min((spans[0][1] - shift for spans, shift in zip(ranks, off, strict=True) if spans), default=0.0)
    result = []
    for spans, shift in zip(ranks, off, strict=True):
        shares = iter(transfer if together else ())
        of_rank: list[Span] = []
        for kind, start, end in spans:
            start, end = start - shift - origin, end - shift - origin
            if kind == COLLECTIVE:
                arrived = max(start, end - next(shares, end - start))
                of_rank += [("blocked", start, arrived)] if arrived > start else []
                kind, start = "comm", arrived
            of_rank.append((kind, start, end))
        result.append(_joined(of_rank))
    return result


def _off(spans: Sequence[Span], others: Sequence[Span]) -> float:
    """By how much a rank's clock is ahead of another's, from the collectives in which both were."""
    pairs = list(zip(spans, others, strict=True))
    if all(max(a[1], b[1]) <= min(a[2], b[2]) for a, b in pairs):
        return 0.0
    return statistics.median(a[2] - b[2] for a, b in pairs)


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Spans of the same kind that follow each other as one, such as a step and the sleep that stretches it."""
    result: list[Span] = []
    for kind, start, end in spans:
        if result and result[-1][0] == kind and result[-1][2] == start:
            start = result.pop()[1]
        result.append((kind, start, end))
    return result


def to_chrome(ranks: Sequence[Sequence[Span]], lanes: Sequence[str]) -> dict[str, Any]:
    """The trace as Perfetto and Chrome's ``about:tracing`` read it, one thread a rank.

    Args:
        lanes: a name for each rank.
    """
    events: list[dict[str, Any]] = []
    for rank, (spans, lane) in enumerate(zip(ranks, lanes, strict=True)):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": lane}})
        events += [
            {"ph": "X", "name": kind, "cat": kind, "pid": 0, "tid": rank,
             "ts": round(1e6 * start, 1), "dur": round(1e6 * (end - start), 1)}
            for kind, start, end in spans
        ]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def from_chrome(trace: Mapping[str, Any]) -> tuple[list[list[Span]], list[str]]:
    """Ranks' spans in seconds and their lanes' names, from what :func:`to_chrome` gave."""
    names = {e["tid"]: str(e["args"]["name"]) for e in trace["traceEvents"] if e["ph"] == "M"}
    ranks: dict[int, list[Span]] = {rank: [] for rank in names}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            start = event["ts"] / 1e6
            ranks[event["tid"]].append((event["name"], start, start + event["dur"] / 1e6))
    return [ranks[rank] for rank in sorted(ranks)], [names[rank] for rank in sorted(names)]
