"""The stopwatch, the emulation of slower devices, and the split of collectives into waiting and transfer."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_hetero.telemetry import emulation, stopwatch
from hvd_hetero.telemetry.emulation import SlowdownEmulator
from hvd_hetero.telemetry.stopwatch import Stopwatch, split_waiting, transfer_sec


class Clock:
    """Time that passes when told; also stands in for the module ``time``."""

    def __init__(self, overshoot_sec: float = 0.0) -> None:
        self.now = 100.0
        self.slept: list[float] = []
        self._overshoot_sec = overshoot_sec

    def __call__(self) -> float:
        return self.now

    perf_counter = __call__

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds + self._overshoot_sec


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    monkeypatch.setattr(emulation, "time", clock)
    return clock


def test_every_second_is_booked_once(clock: Clock) -> None:
    watch = Stopwatch(clock)
    for kind, seconds in (("data", 1.0), ("compute", 2.0), ("collective", 4.0), ("compute", 8.0), ("collective", 16.0)):
        clock.now += seconds
        booked = watch.collective() if kind == "collective" else watch.span(kind)
        assert booked == seconds
    clock.now += 32.0
    watch.skip()
    clock.now += 0.5
    watch.span("data")
    assert watch.drain() == ({"compute": 10.0, "data": 1.5, "blocked": 0.0, "comm": 0.0}, [4.0, 16.0])
    assert watch.drain() == ({"compute": 0.0, "data": 0.0, "blocked": 0.0, "comm": 0.0}, [])


def test_a_rank_outside_a_collective_keeps_its_place_in_the_list(clock: Clock) -> None:
    """The time it spends meanwhile is that of its next collective: there it waits for those inside."""
    watch = Stopwatch(clock)
    clock.now += 1.0
    watch.collective()
    clock.now += 2.0
    watch.skip_collective()
    clock.now += 4.0
    watch.collective()
    first, absent, last = watch.drain()[1]
    assert (first, last) == (1.0, 6.0) and math.isnan(absent)


def test_laps_are_kept_where_they_are_wanted(clock: Clock) -> None:
    watch = Stopwatch(clock)
    watch.spans = []
    clock.now += 1.0
    watch.span("data")
    clock.now += 2.0
    watch.collective()
    assert watch.spans == [("data", 100.0, 101.0), ("collective", 101.0, 103.0)]


@pytest.mark.parametrize(("started", "blocked", "comm"), [
    (103.0, 2.0, 6.0),
    (101.0, 0.0, 8.0),  # at the last span
    (40.0, 0.0, 8.0),  # before it: the result was on its way while this rank still computed
    (109.0, 8.0, 0.0),
    (110.0, 8.0, 0.0),  # clocks are read one after the other
    (math.inf, 8.0, 0.0),  # nothing has started
])
def test_waiting_ends_when_what_is_waited_for_starts(
    clock: Clock, started: float, blocked: float, comm: float
) -> None:
    watch = Stopwatch(clock)
    watch.spans = []
    clock.now += 1.0
    watch.span("data")
    clock.now += 8.0
    watch.waited(started)
    clock.now += 16.0
    watch.span("compute")
    assert watch.drain() == ({"compute": 16.0, "data": 1.0, "blocked": blocked, "comm": comm}, [])
    between = [("blocked", 101.0, 101.0 + blocked), ("comm", 101.0 + blocked, 109.0)]
    spans = [("data", 100.0, 101.0), *(span for span in between if span[1] < span[2]), ("compute", 109.0, 125.0)]
    assert watch.spans == spans, "they follow each other without a gap, and none is empty"


def test_waiting_is_no_part_of_a_steps_own_time() -> None:
    """By the own clock too, the next span begins when the waiting has ended."""
    clock, own = Clock(), Clock()
    watch = Stopwatch(clock, own)
    clock.now += 8.0
    own.now += 3.0
    watch.waited(104.0)
    clock.now += 2.0
    own.now += 1.0
    assert watch.span("compute") == 1.0
    assert watch.drain()[0] == {"compute": 2.0, "data": 0.0, "blocked": 4.0, "comm": 4.0}


def run_steps(clock: Clock, emulator: SlowdownEmulator, count: int, data_sec: float, step_sec: float) -> int:
    def batches() -> object:
        while True:
            clock.now += data_sec
            yield object()

    done = 0
    for _ in emulator.steps(batches(), count):  # type: ignore[var-annotated, arg-type]
        clock.now += step_sec
        done += 1
    return done


def test_steps_are_booked_as_data_and_compute(clock: Clock) -> None:
    watch = Stopwatch(clock)
    assert run_steps(clock, SlowdownEmulator(watch), 3, data_sec=0.5, step_sec=2.0) == 3
    assert watch.drain() == ({"compute": 6.0, "data": 1.5, "blocked": 0.0, "comm": 0.0}, [])
    assert clock.slept == []


def test_no_more_batches_are_taken_than_asked_for(clock: Clock) -> None:
    batches = iter(range(10))
    emulator = SlowdownEmulator(Stopwatch(clock))
    assert list(emulator.steps(batches, 3)) == [0, 1, 2]
    assert list(emulator.steps(batches, 2)) == [3, 4], "one taken too many would be a batch never trained on"


def test_slowdown_stretches_data_and_compute_to_its_multiple(clock: Clock) -> None:
    watch = Stopwatch(clock)
    run_steps(clock, SlowdownEmulator(watch, slowdown=8.0), 3, data_sec=0.5, step_sec=2.0)
    seconds, _ = watch.drain()
    assert seconds["data"] + seconds["compute"] == pytest.approx(8 * 3 * 2.5)
    assert seconds["data"] == pytest.approx(1.5), "emulated time is compute"
    assert len(clock.slept) == 3


def test_at_full_speed_nothing_is_stretched(clock: Clock) -> None:
    """A first step imports and allocates: nobody measures it, and eight times as long would only be waited for."""
    emulator = SlowdownEmulator(Stopwatch(clock), slowdown=8.0)
    with emulator.at_full_speed():
        run_steps(clock, emulator, 3, data_sec=0.5, step_sec=2.0)
    assert not clock.slept
    run_steps(clock, emulator, 1, data_sec=0.5, step_sec=2.0)
    assert sum(clock.slept) == pytest.approx(7 * 2.5), "only the step that came after"


@pytest.mark.parametrize("slowdown", [1.0, 8.0])
def test_delays_are_slept_in_their_steps_and_count_as_their_compute(clock: Clock, slowdown: float) -> None:
    """One a step, as long as it was drawn: a slower device is not slower at being delayed."""
    watch = Stopwatch(clock)
    emulator = SlowdownEmulator(watch, slowdown)
    emulator.delays = iter([0.25, 0.0, 4.0, 32.0])
    assert run_steps(clock, emulator, 2, data_sec=0.5, step_sec=2.0) == 2
    assert run_steps(clock, emulator, 1, data_sec=0.5, step_sec=2.0) == 1
    assert [sec for sec in clock.slept if sec in (0.25, 0.0, 4.0, 32.0)] == [0.25, 0.0, 4.0]
    seconds, _ = watch.drain()
    assert seconds["data"] == pytest.approx(1.5)
    assert seconds["compute"] == pytest.approx(slowdown * 3 * 2.5 + 4.25 - 1.5)


def test_what_the_core_does_meanwhile_is_no_part_of_an_emulated_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 2 s own time that was interrupted for 3 s is stretched by 7 times its own time, not by 7 times 5 s."""
    clock, own = Clock(), Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    monkeypatch.setattr(emulation, "time", clock)
    watch = Stopwatch(clock, own)
    for _ in SlowdownEmulator(watch, slowdown=8.0).steps(iter(range(2)), 2):
        clock.now += 5.0
        own.now += 2.0
    assert watch.drain()[0]["compute"] == pytest.approx(2 * (5.0 + 7 * 2.0))


def test_short_steps_sleep_together(clock: Clock) -> None:
    """Caches are cold after a sleep; what is owed is paid at the end of the round at the latest."""
    watch = Stopwatch(clock)
    run_steps(clock, SlowdownEmulator(watch, slowdown=8.0), 40, data_sec=0.0, step_sec=0.001)
    assert watch.drain()[0]["compute"] == pytest.approx(8 * 40 * 0.001)
    assert len(clock.slept) == 3  # 7 ms a step are 100 ms after 15 steps, again after 30, and at the end


def test_what_a_sleep_overshoots_is_taken_off_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(overshoot_sec=0.25)
    monkeypatch.setattr(stopwatch, "time", clock)
    monkeypatch.setattr(emulation, "time", clock)
    watch = Stopwatch(clock)
    run_steps(clock, SlowdownEmulator(watch, slowdown=2.0), 100, data_sec=0.0, step_sec=1.0)
    assert watch.drain()[0]["compute"] == pytest.approx(2 * 100 + 0.25), "only the last one is still owed"


def test_the_device_is_waited_for_before_the_step_is_measured(clock: Clock) -> None:
    """Steps are queued up on a GPU and cost nothing until it is synchronized."""
    queued = [0]

    def synchronize() -> None:
        clock.now += 3.0 * queued[0]
        queued[0] = 0

    for slowdown, expected in ((1.0, 4 * 3.0), (5.0, 5 * 4 * 3.0)):
        watch = Stopwatch(clock)
        for _ in SlowdownEmulator(watch, slowdown, synchronize).steps(iter(range(4)), 4):
            queued[0] += 1
        assert watch.drain()[0]["compute"] == pytest.approx(expected)


# ---- waiting and transfer -------------------------------------------------------------------------------------------


def test_the_last_to_arrive_waits_for_nobody() -> None:
    blocked, comm = split_waiting([[5.0, 1.0], [2.0, 1.0], [3.0, 4.0]])
    assert comm == [3.0, 3.0, 3.0]
    assert blocked == [3.0, 0.0, 4.0]


def test_ranks_outside_a_collective_count_for_nothing_in_it() -> None:
    blocked, comm = split_waiting([[5.0, 1.0], [math.nan, 1.0], [3.0, 4.0]])
    assert comm == [4.0, 1.0, 4.0]
    assert blocked == [2.0, 0.0, 3.0]


@given(st.integers(1, 5).flatmap(lambda ranks: st.lists(
    st.lists(st.floats(0, 100), min_size=ranks, max_size=ranks), max_size=8)))
def test_the_split_loses_nothing(columns: list[list[float]]) -> None:
    ranks = len(columns[0]) if columns else 2
    durations = [[column[r] for column in columns] for r in range(ranks)]
    blocked, comm = split_waiting(durations)
    for rank in range(ranks):
        assert blocked[rank] + comm[rank] == pytest.approx(sum(durations[rank]))
        assert blocked[rank] >= -1e-9
        assert comm[rank] == pytest.approx(sum(min(column) for column in columns))


def test_what_a_collective_takes_when_nobody_is_late() -> None:
    """The shortest over the ranks, and of these the median; a rank that is not in one does not count."""
    assert transfer_sec([[1.0, 9.0, 5.0], [4.0, 2.0, math.nan]]) == 2.0
    assert math.isnan(transfer_sec([[], []]))
