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
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge, wait

import psutil
import torch
from torch import Tensor

from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.partial.coordinator import Command

MESSAGE = struct.Struct("<Bq")
SECRET_BYTES = 32
ADDRESS_BYTES = 64
RETRY_SEC = 0.1
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30000}
"""A peer of which nothing is heard for half a minute is gone; seconds, the last one milliseconds."""
Handler = Callable[[int, int, int], Sequence[Command]]


class ControlClient:
    """One rank's end of the channel: two threads may use it, one to send and one to receive."""

    def __init__(self, address: tuple[str, int], secret: bytes, rank: int) -> None:
        self._wire = _Wire(Client(address, authkey=secret))
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self.send(0, rank)

    def send(self, what: int, number: int = 0, *vectors: Tensor | None, text: str | None = None) -> None:
        """Sends a message, and right behind it a text and vectors, of which the other end knows length and type."""
        with self._sending:
            self._wire.connection.send_bytes(MESSAGE.pack(what, number))
            if text is not None:
                self._wire.connection.send_bytes(text.encode())
            for vector in vectors:
                if vector is not None:
                    self._wire.send_vector(vector)

    def receive(self) -> tuple[int, int]:
        """The next message.

        Raises:
            EOFError, OSError: the channel is closed.
        """
        with self._receiving:
            what, number = MESSAGE.unpack(self._wire.connection.recv_bytes(MESSAGE.size))
        return int(what), int(number)

    def answer(self, form: struct.Struct, vector: Tensor) -> tuple[int, ...]:
        """The next message, in this form; its last number says whether a vector follows, which is received in place.

        Raises:
            EOFError, OSError: the channel is closed.
        """
        with self._receiving:
            numbers = self.numbers(form)
            if numbers[-1]:
                self._wire.receive_vector(vector)
        return numbers

    def numbers(self, form: struct.Struct) -> tuple[int, ...]:
        """The next message, in this form; where one thread alone receives."""
        numbers: tuple[int, ...] = form.unpack(self._wire.connection.recv_bytes(form.size))
        return numbers

    def text_and_vector(self, vector: Tensor) -> str:
        """The next message, a text, behind which comes a vector, received in place."""
        text = self._wire.connection.recv_bytes().decode()
        self._wire.receive_vector(vector)
        return text

    def has_message(self) -> bool:
        """Whether something has come, or the channel has ended."""
        return self._wire.connection.poll()

    def close(self) -> None:
        """Ends the channel; a thread that waits in :meth:`receive` gets an EOFError."""
        self._wire.shut()
        with self._sending, self._receiving:  # whoever holds them has been woken
            self._wire.close()


class ControlServer:
    """Hears all links and passes on what ``handle`` makes of it; when a link ends, all do.

    Nobody may wait for a round that a rank which is gone was to start.

    Args:
        address: of the interface to listen on.
        ranks: how many links there will be; then no more are taken.
        handle: called with (rank, what, number) in one thread. If it raises, all links end.
    """

    def __init__(self, address: str, ranks: int, secret: bytes, handle: Handler) -> None:
        self._server = socket.create_server((address, 0), backlog=max(ranks, 16))
        self.address: tuple[str, int] = self._server.getsockname()
        self._secret, self._ranks, self._handle = secret, ranks, handle
        self._changed = threading.Condition()
        self._strangers: set[_Wire] = set()
        self._links: dict[int, _Wire] = {}
        self._listening = True
        self._threads = [_thread(self._accept, "hub.accept"), _thread(self._serve, "hub")]

    def _accept(self) -> None:
        while self._listening:
            try:
                wire = _Wire(Connection(self._server.accept()[0].detach()))
            except OSError:
                if self._listening:
                    time.sleep(RETRY_SEC)  # it may be that too many files are open
                continue
            with self._changed:
                if not self._listening:
                    wire.close()
                    break
                self._strangers.add(wire)
                # a peer that says nothing keeps only its own thread busy
                self._threads.append(_thread(partial(self._admit, wire), "hub.admit"))
        with self._changed:
            self._server.close()

    def _admit(self, wire: _Wire) -> None:
        """Lets a peer in that knows the secret, and is a rank of which there is no link yet."""
        try:
            deliver_challenge(wire.connection, self._secret)
            answer_challenge(wire.connection, self._secret)
            rank = int(MESSAGE.unpack(wire.connection.recv_bytes(MESSAGE.size))[1])
        except Exception:  # whatever a stranger may send
            rank = -1
        with self._changed:
            self._strangers.remove(wire)
            if not self._listening or rank not in range(self._ranks) or rank in self._links:
                wire.close()
                return
            self._links[rank] = wire
            if len(self._links) == self._ranks:
                self._stop_listening()

    def _stop_listening(self) -> None:
        """Closes the port, and lets go of who has not been let in; the caller holds the lock."""
        self._listening = False
        _shut(self._server)
        for wire in self._strangers:
            wire.shut()
        self._changed.notify_all()

    def _serve(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._listening)
            links = dict(self._links)
        ranks = {wire.connection: rank for rank, wire in links.items()}
        try:
            while ranks:
                for ready in wait(list(ranks)):
                    assert isinstance(ready, Connection)
                    try:
                        what, number = MESSAGE.unpack(ready.recv_bytes(MESSAGE.size))
                    except (EOFError, OSError, struct.error):
                        return
                    for target, order, value in self._handle(ranks[ready], what, number):
                        self._send(ranks, target, MESSAGE.pack(order, value))
        finally:
            for rank in ranks.values():
                self._drop(rank)

    def _drop(self, rank: int) -> None:
        with self._changed:
            self._links.pop(rank).close()

    @staticmethod
    def _send(ranks: dict[Connection, int], target: int | None, message: bytes) -> None:
        for connection, rank in ranks.items():
            if target is None or target == rank:
                try:
                    connection.send_bytes(message)
                except OSError:
                    pass  # that rank is gone, which Horovod tells all others

    def close(self) -> None:
        """Ends all links, and waits for the threads to end."""
        with self._changed:
            if self._listening:
                self._stop_listening()
            for wire in self._links.values():
                wire.shut()
            threads = list(self._threads)
        for thread in threads:
            thread.join(timeout=5)


class ThreadedServer(ControlServer):
    """Hears each link in a thread of its own, so that a rank that stops in mid-message holds up nobody but itself."""

    def __init__(self, address: str, ranks: int, secret: bytes) -> None:
        super().__init__(address, ranks, secret, lambda *message: ())

    def _serve(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._listening)
            links = dict(self._links)
        threads = [threading.Thread(target=self._converse, args=link, name="hvd_hetero.server", daemon=True)
                   for link in links.items()]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for rank in links:
            self._drop(rank)

    def _converse(self, rank: int, wire: _Wire) -> None:
        """Answer one link until it ends."""
        raise NotImplementedError(type(self).__name__)


def connect(
    comm: Comm, hosts: int, make_hub: Callable[[str, int, bytes], ControlServer]
) -> tuple[ControlClient, ControlServer | None]:
    """Opens the channel; all ranks that train call it together, and each gets a link.

    Args:
        hosts: how many the ranks are on.
        make_hub: makes rank 0's end, from address, number of ranks and secret.
    """
    hub, address, secret = open_hub(comm, hosts, comm.size, make_hub)
    link = ControlClient(address, secret, comm.rank)
    comm.barrier("activation.connected")
    return link, hub


def open_hub(
    comm: Comm, hosts: int, links: int, make_hub: Callable[[str, int, bytes], ControlServer],
    ranks: tuple[int, ...] | None = None,
) -> tuple[ControlServer | None, tuple[str, int], bytes]:  # fmt: skip
    """Opens rank 0's end, for so many links, and tells other ranks where it is, and the secret.

    Args:
        ranks: those that are told, and call it together: all that train, or all.
    """
    hub, secret = None, secrets.token_bytes(SECRET_BYTES)
    message = torch.zeros(SECRET_BYTES + ADDRESS_BYTES, dtype=torch.uint8)
    if comm.rank == 0:
        hub = make_hub("127.0.0.1" if hosts == 1 else own_address(), links, secret)
        where = f"{hub.address[0]} {hub.address[1]}".ljust(ADDRESS_BYTES).encode()
        message = torch.tensor(list(secret + where), dtype=torch.uint8)
    received = bytes(comm.broadcast(message, "activation.address", ranks=ranks).tolist())
    host, port = received[SECRET_BYTES:].decode().split()
    return hub, (host, int(port)), received[:SECRET_BYTES]


def own_address() -> str:
    """The address of this host on the interface that Horovod's own connections use."""
    interface = os.environ.get("HOROVOD_GLOO_IFACE", "")
    for address in psutil.net_if_addrs().get(interface, []):
        if address.family == socket.AF_INET:
            return str(address.address)
    return socket.gethostbyname(os.environ.get("HOROVOD_HOSTNAME") or socket.gethostname())


class _Wire:
    """A connection that another thread may end: to close a file would not wake a thread that reads it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))  # a second handle, since connections have no
        # shutdown; messages are small, and the next one is not to wait until the last one is acknowledged
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # a host that vanishes sends no farewell
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                self._socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send_vector(self, vector: Tensor) -> None:
        """Sends a contiguous vector as its bytes."""
        self._socket.sendall(_bytes_of(vector))

    def receive_vector(self, vector: Tensor) -> None:
        """Receives one into it.

        Raises:
            EOFError, OSError: the connection ends before.
        """
        left = _bytes_of(vector)
        while left:
            if not (count := self._socket.recv_into(left)):
                raise EOFError
            left = left[count:]

    def shut(self) -> None:
        """Ends it, from any thread; whoever reads or writes it is woken."""
        _shut(self._socket)

    def close(self) -> None:
        """Gives it up, when nobody else uses it any more."""
        self.connection.close()
        self._socket.close()


def _bytes_of(vector: Tensor) -> memoryview:
    return memoryview(vector.view(torch.uint8).numpy().data)


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it has ended, or is closed


def _thread(target: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=target, name=f"hvd_hetero.{name}", daemon=True)
    thread.start()
    return thread
