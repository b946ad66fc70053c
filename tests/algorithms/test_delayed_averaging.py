"""The thread of delayed averages: failures, and its end. What it computes is checked in test_methods and test_nan."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("horovod.torch", reason="Horovod is not installed: run scripts/setup")

import torch  # noqa: E402

from hvd_hetero.algorithms import delayed_averaging  # noqa: E402
from hvd_hetero.comm.async_ops import PeerLost  # noqa: E402
from hvd_hetero.telemetry.heartbeat import Heartbeat  # noqa: E402

SOON_SEC = 20.0


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hvd_hetero.delayed"]


def ended(those: list[threading.Thread]) -> bool:
    for thread in those:
        thread.join(SOON_SEC)
    return not any(thread.is_alive() for thread in those)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., Any]], delayed_averaging.Delayed]]:
    """Makes a rank's delayed averages, given what one of them does with the rank's vectors."""
    made = []

    def make(average: Callable[[list[torch.Tensor]], None]) -> delayed_averaging.Delayed:
        monkeypatch.setattr(delayed_averaging, "average_tensors", lambda comm, mean, good, name, weight: average(mean))
        state = SimpleNamespace(vectors=[torch.zeros(4)], params=[4], refresh=lambda: False)
        cpu = torch.device("cpu")
        worker: Any = SimpleNamespace(device=cpu, state=state, optimizer=SimpleNamespace(state={}))
        comm: Any = SimpleNamespace(clone_for_thread=lambda: None, heartbeat=Heartbeat(), booked=nullcontext)
        made.append(delayed_averaging.Delayed(worker, comm))
        return made[-1]

    yield make
    for one in made:
        one.close()
    assert ended(threads())


def test_an_average_that_fails_is_the_ranks_own_failure(running: Callable[..., delayed_averaging.Delayed]) -> None:
    """And the thread outlives it."""
    outcomes: list[BaseException | float] = [PeerLost("gone"), 2.0]

    def average(mean: list[torch.Tensor]) -> None:
        outcome = outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        mean[0] += outcome

    mine = running(average)
    mine.begin(0.5)
    with pytest.raises(PeerLost, match="gone"):
        mine.settle()
    mine.settle()  # there is nothing on its way
    mine.begin(0.5)
    mine.settle()
    assert mine._worker.state.vectors[0].tolist() == [2.0] * 4
    assert len(threads()) == 1


def test_closing_does_not_wait_for_what_is_on_its_way(running: Callable[..., delayed_averaging.Delayed]) -> None:
    begun, let_go = threading.Event(), threading.Event()

    def average(mean: list[torch.Tensor]) -> None:
        begun.set()
        let_go.wait(SOON_SEC)

    mine = running(average)
    mine.begin(0.5)
    assert begun.wait(SOON_SEC)
    those, start = threads(), time.monotonic()
    mine.close()
    assert time.monotonic() - start < SOON_SEC / 2 and those[0].is_alive()
    let_go.set()
    assert ended(those)
