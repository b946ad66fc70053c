"""The server that ranks push vectors to: what it carries, whom it holds up, and how it ends in every state."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_control_channel import HANG_SEC, HOME, SECRET, Channel, assert_ended, channel, eventually, own_threads
from torch import Tensor

from hvd_hetero.comm.communicator import Traffic
from hvd_hetero.comm.model_server import ANSWER, FINISH, PULL, PUSH, ModelLink, ModelServer
from hvd_hetero.comm.partial.control_channel import MESSAGE, ControlClient
from hvd_hetero.telemetry.heartbeat import Heartbeat
from hvd_hetero.telemetry.stopwatch import Stopwatch

__all__ = ["channel"]
pytestmark = pytest.mark.horovod
SIZE = 1_500_000
"""Elements: 6 MB, more than what any socket buffers."""


class Sum:
    """Adds up what comes; a rank has the sum again after each of its pushes."""

    def __init__(self, fails_at: int = 10**9) -> None:
        self.total, self.version, self.fails_at = torch.zeros(SIZE), 0, fails_at
        self.finished, self.skipped = 0, list[int]()
        self.entered = threading.Semaphore(0)

    def arrive(self, rank: int, vector: Tensor) -> tuple[int, bool]:
        if self.version == self.fails_at:
            raise RuntimeError("no such step")
        self.total += vector
        self.version += 1
        return rank, rank != 1

    def skip(self, rank: int) -> None:
        self.skipped.append(rank)

    def give(self, rank: int) -> Tensor | None:
        return None if rank in self.skipped else self.total

    def finish(self) -> None:
        self.finished += 1
        self.skipped.clear()


class Served:
    """A server in this process, and links to it."""

    def __init__(self, channel: Channel, ranks: int, model: Sum) -> None:
        self.server = ModelServer(HOME, ranks, SECRET, model, torch.zeros(SIZE), [(rank,) for rank in range(ranks)])
        channel.hubs.append(self.server)
        self.links = [channel.link(rank) for rank in range(ranks)]
        self.models = [torch.zeros(SIZE) for _ in range(ranks)]

    def ask(self, rank: int, what: int, number: int = 0, vector: Tensor | None = None) -> tuple[int, ...]:
        self.links[rank].send(what, number, vector)
        return self.links[rank].answer(ANSWER, self.models[rank])

    def in_background(self, rank: int, what: int) -> tuple[threading.Thread, list[Any]]:
        """Asks in a thread; what it is answered, or the error, is put into the list."""
        found: list[Any] = []

        def run() -> None:
            try:
                found.append(self.ask(rank, what))
            except (EOFError, OSError) as error:
                found.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread, found


@pytest.fixture
def model() -> Iterator[Sum]:
    yield Sum()


def test_vectors_of_megabytes_arrive_and_the_model_comes_back(channel: Channel, model: Sum) -> None:
    served = Served(channel, 2, model)
    vectors = [torch.randn(SIZE) for _ in range(2)]
    assert served.ask(0, PUSH, 0, vectors[0]) == (1, 0, 0, 1, 0, 1)
    assert torch.equal(served.models[0], vectors[0])
    assert served.ask(1, PUSH, 8, vectors[1]) == (2, 0, 1, 0, 0, 1), "delay 1, and not used"
    assert torch.equal(served.models[1], vectors[0] + vectors[1])
    assert served.ask(0, PULL, 4) == (2, 8, 0, 0, 0, 0), "samples from place 8 on, and no model: it has that one"
    assert served.ask(1, PULL, 4)[1] == 12


def test_the_end_of_an_epoch_waits_for_all_and_gives_all_the_same(channel: Channel, model: Sum) -> None:
    served = Served(channel, 3, model)
    waiting = [served.in_background(rank, FINISH) for rank in (1, 2)]
    eventually(lambda: served.ask(0, PUSH, 0, torch.ones(SIZE))[4] == 1)
    assert [found for _, found in waiting] == [[], []], "closing, since others have finished; nobody is through"
    pushes = model.version
    answers = [served.ask(0, FINISH)]
    for thread, found in waiting:
        thread.join(HANG_SEC)
        answers += found
    assert answers == [(pushes, 0, 0, 0, 0, 1)] * 3 and model.finished == 1
    assert all(torch.equal(own, model.total) for own in served.models)
    assert served.ask(1, PUSH, 5, torch.ones(SIZE))[1:5] == (0, 1, 0, 0), "the next epoch, from its first sample"


def test_a_rank_that_stops_in_mid_message_holds_up_nobody_else(channel: Channel, model: Sum) -> None:
    served = Served(channel, 2, model)
    served.links[1]._wire.connection.send_bytes(MESSAGE.pack(PUSH, 0))
    served.links[1]._wire._socket.sendall(bytes(1000))
    for number in range(5):
        assert served.ask(0, PUSH, 0, torch.ones(SIZE))[0] == number + 1


@pytest.mark.parametrize("state", ["idle", "in mid-push", "finishing", "computing"])
def test_when_a_link_ends_all_do(channel: Channel, model: Sum, state: str) -> None:
    """Whatever the rank that is lost was doing; the others wait, as in the end of an epoch, or are about to ask."""
    served = Served(channel, 3, model)
    thread, waiting = served.in_background(2, FINISH)
    if state == "in mid-push":
        served.links[1].send(PUSH, 0)
    elif state == "finishing":
        served.links[1].send(FINISH)
    elif state == "computing":
        served.ask(1, PUSH, 0, torch.ones(SIZE))
    served.links[1]._wire.shut()
    thread.join(HANG_SEC)
    assert isinstance(waiting[0], (EOFError, OSError))
    with pytest.raises((EOFError, OSError)):
        for _ in range(100):
            served.ask(0, PULL)
    assert model.finished == 0


def test_close_ends_a_server_in_mid_push_and_in_the_end_of_an_epoch(channel: Channel, model: Sum) -> None:
    served = Served(channel, 3, model)
    thread, waiting = served.in_background(2, FINISH)
    served.links[1].send(PUSH, 0)
    served.server.close()
    thread.join(HANG_SEC)
    assert waiting and isinstance(waiting[0], (EOFError, OSError)) and own_threads() == []


@pytest.mark.parametrize("says", [b"", b"x" * 9, struct.pack("!i", 2**20), MESSAGE.pack(PUSH, 0)])
def test_a_stranger_is_not_let_in(channel: Channel, model: Sum, says: bytes) -> None:
    server = ModelServer(HOME, 1, SECRET, model, torch.zeros(SIZE), [(0,)])
    channel.hubs.append(server)
    stranger = channel.stranger(says)
    link = channel.link(0)
    link.send(PUSH, 0, torch.ones(SIZE))
    assert link.answer(ANSWER, torch.zeros(SIZE))[0] == 1
    assert_ended(stranger)


def test_its_own_fault_is_kept_and_ends_all_links(channel: Channel) -> None:
    served = Served(channel, 2, Sum(fails_at=1))
    served.ask(0, PUSH, 0, torch.ones(SIZE))
    with pytest.raises((EOFError, OSError)):
        served.ask(1, PUSH, 0, torch.ones(SIZE))
    assert str(served.server.error) == "no such step"
    with pytest.raises((EOFError, OSError)):
        for _ in range(100):
            served.ask(0, PULL)


def test_nonsense_of_a_rank_ends_it(channel: Channel, model: Sum) -> None:
    served = Served(channel, 1, model)
    link: ControlClient = served.links[0]
    link._wire.connection.send_bytes(b"three words here")
    with pytest.raises((EOFError, OSError)):
        link.answer(ANSWER, served.models[0])


# ---- the ranks' end -------------------------------------------------------------------------------------------------


def test_nobody_pushes_before_all_know_the_version_that_they_begin_with() -> None:
    """Else one that connects late is told a later version than that of the model it has."""
    output, meets, late = list[Tensor](), threading.Barrier(2), threading.Event()

    def comm(rank: int) -> Any:
        def broadcast(tensor: Tensor, name: str, ranks: Any = None) -> Tensor:
            if rank == 0:
                output.append(tensor)
            meets.wait(HANG_SEC)
            return output[0]

        def barrier(name: str) -> None:
            meets.wait(HANG_SEC)
            if rank == 1:
                late.wait(HANG_SEC)

        return SimpleNamespace(rank=rank, size=2, broadcast=broadcast, barrier=barrier, heartbeat=Heartbeat(),
                               watch=Stopwatch(), traffic=Traffic())  # fmt: skip

    links: dict[int, ModelLink] = {}

    def begin(rank: int) -> None:
        model, like = Sum() if rank == 0 else None, torch.zeros(SIZE)
        links[rank] = ModelLink(comm(rank), model, like, [(0,), (1,)])
        if rank == 0:
            links[0].exchange(torch.ones(SIZE))

    threads = [threading.Thread(target=begin, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    threads[0].join(0.5)
    assert 0 not in links, "it waits for the other one"
    late.set()
    for thread in threads:
        thread.join(HANG_SEC)
    assert links[0].first == links[1].first == 0
    for link in links.values():
        link.close()
