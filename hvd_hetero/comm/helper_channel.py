"""How helpers get the newest average of the ranks that train, and send back what they made of it.

The control channel carries it, see :mod:`hvd_hetero.comm.partial.control_channel`: a link from every helper to rank 0,
each with a thread there. A helper asks for a model when it has nothing to do; rank 0 then copies its own at the next
occasion, and goes on training, while the threads send it. So nobody who trains meets a helper in a collective before
the job's end, and of a model that no helper asks for there is no copy.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_hetero.comm.async_ops import PeerLost
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.partial.allreduce import BROKEN
from hvd_hetero.comm.partial.control_channel import MESSAGE, ControlClient, ThreadedServer, _Wire, open_hub

ASK, ROW, SCORES = 41, 42, 43
"""What a helper says: I have nothing to do; here is a row of figures; here are the losses of so many samples."""
ANSWER = struct.Struct("<qq")
"""Bytes of a model, and -1; or, behind a zero, the exit status with which the job ends."""
MOST_TEXT = 1 << 24
COPY_SHARE = 0.005
"""Of rank 0's time, what it may spend on copies for helpers."""


class Scores(NamedTuple):
    """Losses ``[K]`` of some samples ``[K]``, by the model of this epoch after so many of its rounds."""

    epoch: int
    rounds: int
    indices: Tensor
    losses: Tensor


Packed = tuple[str, Tensor]
"""A model for a helper: where in the run it is from, with what its tensors are, and their bytes."""


class HelperServer(ThreadedServer):
    """Rank 0's end: gives models to helpers, each to one of them, and keeps what they send until it is taken."""

    def __init__(self, address: str, helpers: int, secret: bytes) -> None:
        self._turn = threading.Condition()
        self._status: int | None = None
        self._waiting: deque[int] = deque()
        self._copies: dict[int, Packed] = {}
        self._asking: set[int] = set()
        self._notified: set[int] = set()
        self._rows: list[dict[str, Any]] = []
        self._scores: list[Scores] = []
        self._copied_at, self._copy_sec = -1e9, 0.0
        super().__init__(address, helpers, secret)

    def offer(self, make: Callable[[], Packed]) -> bool:
        """Copy a model for the helper that has waited longest, unless the last copy was too costly to be so near.

        Returns:
            Whether one was copied.
        """
        now = time.perf_counter()
        if not self._waiting or (now - self._copied_at) * COPY_SHARE < self._copy_sec:
            return False
        message = make()
        self._copied_at = time.perf_counter()
        self._copy_sec = self._copied_at - now
        with self._turn:
            self._copies[self._waiting.popleft()] = message
            self._turn.notify_all()
        return True

    def drain(self) -> tuple[list[dict[str, Any]], list[Scores]]:
        """Return rows and losses that have come since the last call."""
        with self._turn:
            taken, self._rows, self._scores = (self._rows, self._scores), [], []
        return taken

    def finish(self, status: int) -> bool:
        """Tell all helpers that the job ends, whatever they are doing; return whether one was at work."""
        with self._turn:
            self._status = self._status if self._status is not None else status
            self._turn.notify_all()
            for link, wire in self._links.items():
                if link not in self._asking:  # else its thread does it
                    self._tell_end(link, wire)
            return len(self._waiting) < len(self._links)

    def close(self) -> None:
        self.finish(1)
        super().close()

    def _converse(self, rank: int, wire: _Wire) -> None:
        try:
            while True:
                what, number = MESSAGE.unpack(wire.connection.recv_bytes(MESSAGE.size))
                if what == ASK:
                    self._answer(rank, wire)
                    continue
                text = json.loads(wire.connection.recv_bytes(MOST_TEXT))
                indices, losses = (torch.empty(number, dtype=kind) for kind in (torch.int64, torch.float32))
                if what == SCORES:
                    wire.receive_vector(indices)
                    wire.receive_vector(losses)
                with self._turn:
                    if what == ROW:
                        self._rows.append(text)
                    else:
                        self._scores.append(Scores(text["epoch"], text["rounds"], indices, losses))
        except (EOFError, OSError, struct.error):
            pass  # a helper that is gone is missed by Horovod, which tells all ranks

    def _answer(self, link: int, wire: _Wire) -> None:
        with self._turn:
            self._asking.add(link)
            self._waiting.append(link)
            self._turn.wait_for(lambda: self._status is not None or link in self._copies)
            if self._status is not None:
                self._asking.discard(link)
                self._tell_end(link, wire)
                return
            text, data = self._copies.pop(link)
        wire.connection.send_bytes(ANSWER.pack(len(data), -1))
        wire.connection.send_bytes(text.encode())
        wire.send_vector(data)
        with self._turn:
            self._asking.discard(link)
            if self._status is not None:
                self._tell_end(link, wire)

    def _tell_end(self, link: int, wire: _Wire) -> None:
        """Tell a helper, once, that the job ends; the caller holds the lock."""
        if link not in self._notified and self._status is not None:
            self._notified.add(link)
            try:
                wire.connection.send_bytes(ANSWER.pack(0, self._status))
            except OSError:
                pass  # it is gone


class HelperLink:
    """A helper's end.

    Attributes:
        status: with which the job ends, once it does.
    """

    def __init__(self, comm: Comm, link: ControlClient) -> None:
        self._link, self._heartbeat = link, comm.heartbeat
        self.status: int | None = None

    @property
    def is_over(self) -> bool:
        """Whether the job ends; what is under way is for nobody then."""
        return self.status is not None or self._link.has_message()

    def newest(self) -> Packed | None:
        """Wait for the next model; None: the job ends.

        Raises:
            PeerLost: rank 0 is gone.
        """
        with self._heartbeat.waiting("newest model"):
            if not self.is_over:
                self._send(ASK)
            try:
                size, status = self._link.numbers(ANSWER)
                if status < 0:
                    data = torch.empty(size, dtype=torch.uint8)
                    return self._link.text_and_vector(data), data
            except (EOFError, OSError) as error:
                raise PeerLost(BROKEN) from error
        self.status = status
        return None

    def send_row(self, row: Mapping[str, Any]) -> None:
        """Send a row of figures, fit for JSON."""
        self._send(ROW, 0, json.dumps(row))

    def send_scores(self, scores: Scores) -> None:
        """Send losses of samples."""
        text = json.dumps({"epoch": scores.epoch, "rounds": scores.rounds})
        self._send(SCORES, len(scores.indices), text, scores.indices, scores.losses)

    def _send(self, what: int, number: int = 0, text: str | None = None, *vectors: Tensor) -> None:
        try:
            self._link.send(what, number, *vectors, text=text)
        except OSError as error:
            raise PeerLost(BROKEN) from error

    def close(self) -> None:
        self._link.close()


def open_channel(comm: Comm, hosts: int) -> HelperServer | HelperLink | None:
    """Open the channel; all ranks call it together.

    Args:
        hosts: how many the ranks are on.

    Returns:
        This rank's end, if it has one.
    """
    server, address, secret = open_hub(comm, hosts, len(comm.all_ranks) - comm.size, HelperServer, comm.all_ranks)
    link = ControlClient(address, secret, comm.rank - comm.size) if comm.rank >= comm.size else None
    comm.barrier("helpers.connected", comm.all_ranks)
    assert server is None or isinstance(server, HelperServer)
    return server if link is None else HelperLink(comm, link)
