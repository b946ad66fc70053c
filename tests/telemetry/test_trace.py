"""The rounds that a run keeps: as they are written, and as one timeline of all ranks."""

from __future__ import annotations

import json

from hvd_hetero.telemetry.stopwatch import COLLECTIVE, Stopwatch
from hvd_hetero.telemetry.trace import Recorder, from_chrome, from_numbers, timeline, to_chrome


def test_the_timeline_joins_clocks_and_parts_waiting_from_transfer() -> None:
    early = [("compute", 1.0, 2.0), ("compute", 2.0, 3.0), (COLLECTIVE, 3.0, 7.0), ("compute", 7.0, 8.0)]
    late = [("compute", 101.5, 106.0), (COLLECTIVE, 106.0, 107.0), ("compute", 107.0, 109.0)]  # a clock 100 s ahead
    first, second = timeline([early, late])
    assert first == [("compute", 0, 2), ("blocked", 2, 5), ("comm", 5, 6), ("compute", 6, 7)]
    assert second == [("compute", 0.5, 5), ("comm", 5, 6), ("compute", 6, 8)]


def test_a_rank_that_is_woken_up_late_is_not_shifted_on_one_host() -> None:
    first = [(COLLECTIVE, 1.0, 2.0), ("compute", 2.0, 5.0), ("comm", 5.0, 6.0)]
    second = [(COLLECTIVE, 1.5, 2.5), ("compute", 2.5, 4.5), ("blocked", 4.5, 5.0), ("comm", 5.0, 6.0)]
    assert [spans[-1] for spans in timeline([first, second])] == [("comm", 4, 5), ("comm", 4, 5)]


def test_ranks_that_met_in_different_numbers_of_collectives_keep_their_clocks() -> None:
    busy = [("compute", 1.0, 2.0), (COLLECTIVE, 2.0, 4.0)]
    idle = [(COLLECTIVE, 1.0, 2.0), (COLLECTIVE, 2.0, 4.0)]
    assert timeline([busy, idle, []]) == [[("compute", 0, 1), ("comm", 1, 3)], [("comm", 0, 3)], []]


def test_a_trace_reads_back_as_it_was() -> None:
    ranks = [[("compute", 0.0, 0.25), ("comm", 0.25, 0.5)], [("blocked", 0.125, 0.5)]]
    assert from_chrome(json.loads(json.dumps(to_chrome(ranks, ["a", "b"])))) == (ranks, ["a", "b"])


def test_the_recorder_keeps_the_rounds_it_is_to_keep() -> None:
    times = iter(range(100))
    watch = Stopwatch(lambda: float(next(times)))
    recorder = Recorder(watch, rounds=2)
    watch.span("compute")
    for _ in range(2):  # two epochs of three rounds: the second one's first two stay
        recorder.start()
        for _ in range(3):
            watch.span("compute")
            watch.collective()
            recorder.end_round()
        recorder.stop()
    assert from_numbers(recorder.to_numbers()) == recorder.spans == [
        ("compute", 7, 8), (COLLECTIVE, 8, 9), ("compute", 9, 10), (COLLECTIVE, 10, 11)
    ]
    assert watch.spans is None
