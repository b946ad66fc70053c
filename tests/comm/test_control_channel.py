"""The channel by which ranks tell each other that a collective starts: who is let in, where, and links that break."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import AuthenticationError
from pathlib import Path
from typing import Any

import psutil
import pytest

from hvd_hetero.comm.partial.control_channel import MESSAGE, ControlClient, ControlServer, own_address
from hvd_hetero.comm.partial.coordinator import Command

pytestmark = pytest.mark.horovod

SECRET, HOME = b"s" * 32, "127.0.0.1"
TO_ALL, TO_ONE = 1, 2
HANG_SEC = 10
"""What takes longer than this never comes."""


def eventually(true: Callable[[], Any], what: Callable[[], Any] = lambda: None) -> None:
    """Other threads need their moment."""
    deadline = time.monotonic() + HANG_SEC
    while not true():
        assert time.monotonic() < deadline, f"it never came: {what()}"
        time.sleep(0.002)


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hvd_hetero.")]


def open_sockets() -> set[str]:
    """All sockets of this process; two handles of one are one."""
    found = set()
    for file in Path("/proc/self/fd").iterdir():
        try:
            found.add(os.readlink(file))
        except OSError:
            continue
    return {name for name in found if name.startswith("socket:")}


def listens_on() -> set[tuple[str, int]]:
    found = psutil.net_connections("inet")
    return {tuple(c.laddr) for c in found if c.pid == os.getpid() and c.status == psutil.CONN_LISTEN}


def tell(rank: int, what: int, number: int) -> Sequence[Command]:
    """Epochs a message on to everybody, or back to where it came from."""
    return [(None if what == TO_ALL else rank, what, 10 * number + rank)]


class Channel:
    """A hub and what was made to talk to it; all references are kept, so that nothing is closed by going out of use."""

    def __init__(self) -> None:
        self.hubs: list[ControlServer] = []
        self.links: list[ControlClient] = []
        self.strangers: list[socket.socket] = []

    def hub(self, ranks: int, handle: Any = tell, address: str = HOME) -> ControlServer:
        self.hubs.append(ControlServer(address, ranks, SECRET, handle))
        return self.hubs[-1]

    def link(self, rank: int) -> ControlClient:
        link = ControlClient(self.hubs[-1].address, SECRET, rank)
        link._wire._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", HANG_SEC, 0))
        self.links.append(link)
        return link

    def stranger(self, says: bytes = b"") -> socket.socket:
        sock = socket.create_connection(self.hubs[-1].address, timeout=HANG_SEC)
        self.strangers.append(sock)
        sock.sendall(says)
        return sock

    def close(self) -> None:
        for end in (*self.links, *self.hubs):
            end.close()


@pytest.fixture
def channel() -> Iterator[Channel]:
    """Whatever a test does: after close() no thread and no socket is left."""
    sockets, threads = open_sockets(), own_threads()
    made = Channel()
    yield made
    made.close()
    assert own_threads() == threads, "close() has waited for its threads"
    for sock in made.strangers:
        sock.close()
    assert open_sockets() == sockets


def assert_all_talk(links: Sequence[ControlClient]) -> None:
    """Everybody is answered, and what is meant for all comes to all, once."""
    for number, link in enumerate(links):
        link.send(TO_ONE, number)
    answers = [link.receive() for link in links]
    assert [answer[0] for answer in answers] == [TO_ONE] * len(links)
    assert [answer[1] // 10 for answer in answers] == list(range(len(links)))
    links[0].send(TO_ALL, 7)
    assert {link.receive() for link in links} == {(TO_ALL, 70 + answers[0][1] % 10)}


def assert_ended(sock: socket.socket) -> None:
    """The other side has let go: after what it had to say there is an end; a timeout would be an error here."""
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        pass


def assert_no_more(link: ControlClient) -> None:
    with pytest.raises((EOFError, OSError)) as caught:
        link.receive()
    assert not isinstance(caught.value, BlockingIOError), "nothing came, and no end either"


# ---- who is let in --------------------------------------------------------------------------------------------------


def test_links_with_the_secret_are_heard_and_answered(channel: Channel) -> None:
    channel.hub(3)
    assert_all_talk([channel.link(rank) for rank in (2, 0, 1)])


def wrong_secret(channel: Channel) -> None:
    with pytest.raises(AuthenticationError):
        ControlClient(channel.hubs[-1].address, b"S" + SECRET[1:], 0)


def random_bytes(channel: Channel, seed: int) -> None:
    rng = random.Random(seed)
    says = rng.randbytes(rng.randrange(1, 2000))
    channel.stranger(says if seed % 3 else struct.pack("!i", len(says)) + says)


HUGE = struct.pack("!iQ", -1, 1 << 62)
STRANGERS: dict[str, Callable[[Channel], Any]] = {
    "wrong secret": wrong_secret,
    "silent": lambda channel: channel.stranger(),
    "there and gone": lambda channel: channel.stranger().close(),
    "half a header": lambda channel: channel.stranger(b"\0\0"),
    "a huge length": lambda channel: channel.stranger(HUGE + bytes(1000)),
    "2 GB announced": lambda channel: channel.stranger(struct.pack("!i", 0x7FFFFFFF)),
    "a negative length": lambda channel: channel.stranger(struct.pack("!i", -7)),
    "a message as a link sends it": lambda channel: channel.stranger(struct.pack("!i", 9) + MESSAGE.pack(0, 1)),
    "reset": lambda channel: reset(channel.stranger()),
} | {f"random bytes {seed}": partial(random_bytes, seed=seed) for seed in range(40)}


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_are_dropped_and_stop_nobody(channel: Channel, name: str) -> None:
    """They come first, in between, and twice; once all ranks are there nobody else is left."""
    come = STRANGERS[name]
    channel.hub(3)
    come(channel)
    come(channel)
    links = [channel.link(0), channel.link(1)]
    come(channel)
    links.append(channel.link(2))
    assert_all_talk(links)
    for sock in channel.strangers:
        if sock.fileno() >= 0:
            assert_ended(sock)
    eventually(lambda: own_threads() == ["hvd_hetero.hub"], own_threads)
    assert_all_talk(links)


@pytest.mark.parametrize("rank", [-1, 2, 1 << 40, 1])
def test_a_rank_that_cannot_be_is_refused(channel: Channel, rank: int) -> None:
    """It knows the secret, but the job has no such rank, or has it already."""
    hub = channel.hub(2)
    one = channel.link(1)
    one.send(TO_ONE, 1)
    eventually(lambda: 1 in hub._links)  # of two that come at once either may be the first
    assert_no_more(channel.link(rank))
    links = [one, channel.link(0)]
    assert one.receive() == (TO_ONE, 11)
    assert_all_talk(links)


# ---- where it listens, and how long ---------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [HOME, "127.0.0.3"])
def test_it_listens_where_it_is_told_and_nowhere_else(channel: Channel, address: str) -> None:
    before = listens_on()
    hub = channel.hub(2, address=address)
    assert listens_on() - before == {(address, hub.address[1])} and tuple(hub.address)[0] == address
    other = "127.0.0.4"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((other, hub.address[1]), timeout=HANG_SEC)


def test_the_port_is_closed_once_all_are_there(channel: Channel) -> None:
    before = listens_on()
    hub = channel.hub(2)
    links = [channel.link(0)]
    assert len(listens_on() - before) == 1, "one is missing"
    links.append(channel.link(1))
    eventually(lambda: listens_on() == before, listens_on)
    with pytest.raises(ConnectionRefusedError):
        channel.stranger()
    assert_all_talk(links)
    assert hub.address[0] == HOME


def test_own_address_is_that_of_the_jobs_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "lo")
    monkeypatch.setenv("HOROVOD_HOSTNAME", "127.0.0.9")
    assert own_address() == HOME
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "no such interface")
    assert own_address() == "127.0.0.9"


# ---- links that break -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [b"", b"12345678", b"1234567890", bytes(100_000)], ids=len)
def test_a_message_of_a_wrong_length_ends_the_channel(channel: Channel, message: bytes) -> None:
    channel.hub(3)
    links = [channel.link(rank) for rank in range(3)]
    assert_all_talk(links)
    broken = links.pop(1)
    try:
        broken._wire.connection.send_bytes(message)
    except OSError:
        assert len(message) > 10_000, "what does not fit into buffers finds the other end gone"
    for link in (broken, *links):
        assert_no_more(link)


def test_a_link_that_ends_takes_all_others_with_it(channel: Channel) -> None:
    """Else a rank could wait for a round that was to be started by the one that is gone."""
    channel.hub(3)
    links = [channel.link(rank) for rank in range(3)]
    assert_all_talk(links)
    links.pop(1).close()
    for link in links:
        assert_no_more(link)


def test_after_the_last_link_the_hub_ends_itself(channel: Channel) -> None:
    channel.hub(2)
    for link in [channel.link(0), channel.link(1)]:
        link.close()
    eventually(lambda: not own_threads(), own_threads)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_hub_that_fails_leaves_nobody_waiting(channel: Channel) -> None:
    """Every link hears of it, or ranks would wait for a round that nobody starts."""

    def fails(rank: int, what: int, number: int) -> Sequence[Command]:
        raise AssertionError("a message that cannot be")

    channel.hub(3, fails)
    links = [channel.link(rank) for rank in range(3)]
    links[1].send(TO_ONE)
    for link in links:
        assert_no_more(link)
