"""Somebody who connects to every port that a job listens on, and says what no one expects."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable
from typing import Any

import psutil

SAYS = {
    "nothing": lambda rng: b"",
    "little": lambda rng: rng.randbytes(5),
    "noise": lambda rng: rng.randbytes(5000),
    "zeros": lambda rng: bytes(64),
    "ones": lambda rng: b"\xff" * 64,
    "long line": lambda rng: b"GET /" + b"A" * 100_000,
    "long header": lambda rng: b"GET /a/b HTTP/1.1\r\nX: " + b"A" * 100_000 + b"\r\n\r\n",
    "no length": lambda rng: b"PUT /a/b HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    "less than said": lambda rng: b"PUT /a/b HTTP/1.1\r\nContent-Length: 99999999\r\n\r\nx",
    "no path": lambda rng: b"DELETE / HTTP/1.1\r\n\r\n",
    "pickle": lambda rng: b"\x00\x00\x00\x20" + b"cos\nsystem\n(S'exit 1'\ntR.".ljust(32),
}


class Strangers:
    """Comes back to each port again and again, from a thread of its own, until the ``with`` block ends.

    Args:
        process: of the job's launcher; it and all below it are looked at.
        which: says of a process whether to go to its ports.
        keep: half of the connections are left open to the end.
    """

    def __init__(self, process: int, which: Callable[[psutil.Process], bool] = lambda process: True) -> None:
        self._process, self._which = process, which
        self._rng = random.Random(0)
        self._open: list[socket.socket] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._come, daemon=True)
        self.visits: dict[tuple[str, int], int] = {}
        """How often each port was connected to."""
        self.lines: set[str] = set()
        """Command lines that were seen."""

    def __enter__(self) -> Strangers:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        self._thread.join()
        for sock in self._open:
            sock.close()

    def _come(self) -> None:
        while not self._over.wait(0.2):
            for process in family(self._process):
                try:
                    self.lines.add("\0".join(process.cmdline()))
                    ports = listening(process) if self._which(process) else []
                except psutil.Error:  # it has just ended
                    continue
                for address in ports:
                    self.visit(address)

    def visit(self, address: tuple[str, int]) -> None:
        """One round of everything that can be said."""
        for says in SAYS.values() if self.visits.get(address, 0) < 60 else ():
            try:
                sock = socket.create_connection(address, timeout=1)
                sock.sendall(says(self._rng))
            except OSError:
                continue
            self.visits[address] = self.visits.get(address, 0) + 1
            if self._rng.random() < 0.5:
                self._open.append(sock)
            else:
                sock.close()


def family(process: int) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        first = psutil.Process(process)
        return [first, *first.children(recursive=True)]
    except psutil.Error:
        return []


def listening(process: psutil.Process) -> list[tuple[str, int]]:
    """Where a process can be connected to."""
    found = [c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return [("127.0.0.1" if at.ip in ("0.0.0.0", "::") else at.ip, at.port) for at in found]
