"""A light channel by which ranks tell each other that a collective starts: a hub on rank 0, a link from every rank.

The hub listens on the job's own interface (loopback, where all ranks are on one host) and only until every rank is
connected. Both ends prove that they know a secret, which rank 0 draws and which travels over the job's own Horovod
connections: it is in no environment, command line or log. Messages are nine bytes; nothing is ever unpickled.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge, wait

import psutil
import torch

from hvd_hetero.comm.horovod import Comm
from hvd_hetero.comm.referee import Order

MESSAGE = struct.Struct("<Bq")
SECRET_BYTES = 32
ADDRESS_BYTES = 64
Hear = Callable[[int, int, int], Sequence[Order]]


class Link:
    """One rank's end of the channel: two threads may use it, one to send and one to receive."""

    def __init__(self, address: tuple[str, int], secret: bytes, rank: int) -> None:
        self._connection = Client(address, authkey=secret)
        self._socket = _at_once(self._connection)
        self.send(0, rank)

    def send(self, what: int, number: int = 0) -> None:
        self._connection.send_bytes(MESSAGE.pack(what, number))

    def receive(self) -> tuple[int, int]:
        """The next message.

        Raises:
            EOFError, OSError: the channel is closed.
        """
        what, number = MESSAGE.unpack(self._connection.recv_bytes(MESSAGE.size))
        return int(what), int(number)

    def close(self) -> None:
        """Ends the channel; a thread that waits in :meth:`receive` gets an EOFError."""
        _shut(self._socket)


class Hub:
    """Hears all links and passes on what ``hear`` makes of it; ends when the last link does.

    Args:
        address: of the interface to listen on.
        ranks: how many links there will be; then no more are taken.
        hear: called with (rank, what, number) in one thread.
    """

    def __init__(self, address: str, ranks: int, secret: bytes, hear: Hear) -> None:
        self._listener = Listener((address, 0), backlog=max(ranks, 16))
        self.address = self._listener.address
        self._secret, self._ranks, self._hear = secret, ranks, hear
        self._links: dict[int, Connection] = {}
        self._sockets: list[socket.socket] = []
        self._complete = threading.Condition()
        self._closed = False
        self._threads = [_thread(self._accept, "hub.accept"), _thread(self._serve, "hub")]

    def _accept(self) -> None:
        while len(self._links) < self._ranks and not self._closed:
            try:
                connection = self._listener.accept()
            except OSError:
                continue
            # a peer that says nothing keeps only its own thread busy
            _thread(partial(self._admit, connection), "hub.admit")

    def _admit(self, connection: Connection) -> None:
        sock = _at_once(connection)
        with self._complete:
            self._sockets.append(sock)
        try:
            deliver_challenge(connection, self._secret)
            answer_challenge(connection, self._secret)
            rank = MESSAGE.unpack(connection.recv_bytes(MESSAGE.size))[1]
        except Exception:  # whatever a stranger may send
            _shut(sock)
            connection.close()
            return
        with self._complete:
            self._links[rank] = connection
            if len(self._links) == self._ranks:
                self._stop_listening()
            self._complete.notify_all()

    def _stop_listening(self) -> None:
        """Closes the port; the thread in ``accept`` is woken by a last connection of our own."""
        self._closed = True
        try:
            socket.create_connection(self.address, timeout=1).close()
        except OSError:
            pass
        self._listener.close()

    def _serve(self) -> None:
        with self._complete:
            self._complete.wait_for(lambda: len(self._links) == self._ranks or self._closed)
        links = {connection: rank for rank, connection in self._links.items()}
        while links:
            for ready in wait(list(links)):
                assert isinstance(ready, Connection)
                try:
                    what, number = MESSAGE.unpack(ready.recv_bytes(MESSAGE.size))
                except (EOFError, OSError, struct.error):
                    del links[ready]
                    continue
                for whom, order, value in self._hear(links[ready], what, number):
                    self._tell(links, whom, MESSAGE.pack(order, value))
        for sock in self._sockets:
            _shut(sock)

    @staticmethod
    def _tell(links: dict[Connection, int], whom: int | None, message: bytes) -> None:
        for connection, rank in links.items():
            if whom is None or whom == rank:
                try:
                    connection.send_bytes(message)
                except OSError:
                    pass  # that rank is gone, which Horovod tells all others

    def close(self) -> None:
        """Ends all links, and with them the threads."""
        if not self._closed:
            self._stop_listening()
        with self._complete:
            for sock in self._sockets:
                _shut(sock)
            self._complete.notify_all()
        for thread in self._threads:
            thread.join(timeout=5)


def connect(comm: Comm, hosts: int, hear: Hear) -> tuple[Link, Hub | None]:
    """Opens the channel; all ranks call it together.

    Args:
        hosts: how many the ranks are on.
        hear: rank 0's; see :class:`Hub`.
    """
    hub, secret = None, secrets.token_bytes(SECRET_BYTES)
    told = torch.zeros(SECRET_BYTES + ADDRESS_BYTES, dtype=torch.uint8)
    if comm.rank == 0:
        hub = Hub("127.0.0.1" if hosts == 1 else own_address(), comm.size, secret, hear)
        where = f"{hub.address[0]} {hub.address[1]}".ljust(ADDRESS_BYTES).encode()
        told = torch.tensor(list(secret + where), dtype=torch.uint8)
    said = bytes(comm.broadcast(told, "activation.address").tolist())
    host, port = said[SECRET_BYTES:].decode().split()
    link = Link((host, int(port)), said[:SECRET_BYTES], comm.rank)
    comm.barrier("activation.connected")
    return link, hub


def own_address() -> str:
    """The address of this host on the interface that Horovod's own connections use."""
    interface = os.environ.get("HOROVOD_GLOO_IFACE", "")
    for address in psutil.net_if_addrs().get(interface, []):
        if address.family == socket.AF_INET:
            return str(address.address)
    return socket.gethostbyname(os.environ.get("HOROVOD_HOSTNAME") or socket.gethostname())


def _at_once(connection: Connection) -> socket.socket:
    """Sends small messages without waiting for the last one's acknowledgement; the socket is a second handle."""
    sock = socket.socket(fileno=os.dup(connection.fileno()))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)  # closing alone would not wake a thread that reads
    except OSError:
        pass
    sock.close()


def _thread(target: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=target, name=f"hvd_hetero.{name}", daemon=True)
    thread.start()
    return thread
