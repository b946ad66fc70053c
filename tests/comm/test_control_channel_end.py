"""How the channel by which ranks tell each other that a collective starts is closed, whatever state it is in."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from test_control_channel import (
    HANG_SEC,
    SECRET,
    TO_ALL,
    TO_ONE,
    Channel,
    assert_ended,
    assert_no_more,
    channel,
    eventually,
    open_sockets,
    own_threads,
)

from hvd_hetero.comm.partial.control_channel import ControlClient, ControlServer

__all__ = ["channel"]


@pytest.mark.parametrize("ranks", [0, 1, 2])
@pytest.mark.parametrize("strangers", [0, 2])
@pytest.mark.parametrize("twice", [False, True])
def test_close_ends_all_whoever_is_there(channel: Channel, ranks: int, strangers: int, twice: bool) -> None:
    """None, half or all of two ranks; silent strangers beside them. The fixture looks at what is left."""
    hub = channel.hub(2)
    silent = [channel.stranger() for _ in range(strangers)]
    for sock in silent:
        assert sock.recv(1), "it is being asked for the secret: its thread is there"
    links = [channel.link(rank) for rank in range(ranks)]
    for _ in range(1 + twice):
        hub.close()
        assert own_threads() == []
    with pytest.raises(ConnectionRefusedError):
        channel.stranger()
    for sock in silent:
        assert_ended(sock)
    for link in links:
        assert_no_more(link)


@pytest.mark.parametrize("first", ["hub", "link"])
def test_close_wakes_a_thread_that_receives(channel: Channel, first: str) -> None:
    hub = channel.hub(2)
    links = [channel.link(0), channel.link(1)]
    ended: list[int] = []

    def receive(rank: int) -> None:
        try:
            while True:
                links[rank].receive()
        except (EOFError, OSError):
            ended.append(rank)

    readers = [threading.Thread(target=receive, args=(rank,), daemon=True) for rank in range(2)]
    for reader in readers:
        reader.start()
    links[0].send(TO_ALL)
    for end in [hub, *links] if first == "hub" else [*links, hub]:
        end.close()
    for reader in readers:
        reader.join(HANG_SEC)
    assert sorted(ended) == [0, 1]


def test_a_closed_link_neither_sends_nor_receives(channel: Channel) -> None:
    channel.hub(1)
    link = channel.link(0)
    link.close()
    link.close()
    assert_no_more(link)
    with pytest.raises(OSError):
        link.send(TO_ONE)


def test_who_is_taken_in_the_moment_of_the_end_is_let_go(channel: Channel) -> None:
    """Accepted by then, but not yet known to the hub."""
    hub = channel.hub(2)
    sockets = len(open_sockets())
    with hub._changed:
        sock = channel.stranger()
        eventually(lambda: len(open_sockets()) == sockets + 2, open_sockets)  # its end and the hub's
        hub._stop_listening()
    hub.close()
    assert own_threads() == []
    assert_ended(sock)


def test_close_while_others_are_still_connecting(channel: Channel) -> None:
    """Links and strangers come from several threads at the moment of close(); again and again."""
    for round_ in range(20):
        hub = channel.hub(8)
        start = threading.Barrier(5)

        def connect(rank: int, start: threading.Barrier = start, hub: ControlServer = hub) -> None:
            start.wait(HANG_SEC)
            try:
                if rank % 2:
                    channel.links.append(ControlClient(hub.address, SECRET, rank))
                else:
                    channel.strangers.append(socket.create_connection(hub.address, timeout=HANG_SEC))
            except (OSError, EOFError):
                pass

        clients = [threading.Thread(target=connect, args=(rank,), daemon=True) for rank in range(4)]
        for client in clients:
            client.start()
        start.wait(HANG_SEC)
        time.sleep(0.0005 * (round_ % 5))
        hub.close()
        assert own_threads() == []
        for client in clients:
            client.join(HANG_SEC)
            assert not client.is_alive()
