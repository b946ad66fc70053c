"""The thread of delayed averages: failures, and its end. What it computes is checked in test_methods and test_nan."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hvd_hetero.algorithms.averaging import delayed
from hvd_hetero.comm.async_ops import PeerLost
from hvd_hetero.telemetry.heartbeat import Heartbeat

pytestmark = pytest.mark.horovod

SOON_SEC = 20.0


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hvd_hetero.delayed"]


def ended(those: list[threading.Thread]) -> bool:
    for thread in those:
        thread.join(SOON_SEC)
    return not any(thread.is_alive() for thread in those)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., Any]], delayed.InFlightAverage]]:
    """Makes a rank's delayed averages, given what one of them does with the rank's vectors."""
    made = []

    def make(average: Callable[[list[torch.Tensor]], None]) -> delayed.InFlightAverage:
        monkeypatch.setattr(delayed, "average_tensors", lambda comm, mean, good, name, **options: average(mean))
        state = SimpleNamespace(vectors=[torch.zeros(4)], params=[4], refresh=lambda: False)
        cpu = torch.device("cpu")
        worker: Any = SimpleNamespace(device=cpu, state=state, optimizer=SimpleNamespace(state={}))
        comm: Any = SimpleNamespace(clone_for_thread=lambda: None, heartbeat=Heartbeat(), timed=nullcontext)
        made.append(delayed.InFlightAverage(worker, comm))
        return made[-1]

    yield make
    for one in made:
        one.close()
    assert ended(threads())


def test_an_average_that_fails_is_the_ranks_own_failure(running: Callable[..., delayed.InFlightAverage]) -> None:
    """And the thread outlives it."""
    outcomes: list[BaseException | float] = [PeerLost("gone"), 2.0]

    def average(mean: list[torch.Tensor]) -> None:
        outcome = outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        mean[0] += outcome

    mine = running(average)
    mine.send(0.5)
    with pytest.raises(PeerLost, match="gone"):
        mine.receive()
    mine.receive()  # there is nothing on its way
    mine.send(0.5)
    mine.receive()
    assert mine._worker.state.vectors[0].tolist() == [2.0] * 4
    assert len(threads()) == 1


def test_closing_does_not_wait_for_what_is_on_its_way(running: Callable[..., delayed.InFlightAverage]) -> None:
    begun, let_go = threading.Event(), threading.Event()

    def average(mean: list[torch.Tensor]) -> None:
        begun.set()
        let_go.wait(SOON_SEC)

    mine = running(average)
    mine.send(0.5)
    assert begun.wait(SOON_SEC)
    those = threads()
    mine.close()
    assert those[0].is_alive(), "else it was waited for until it gave up"
    let_go.set()
    assert ended(those)
