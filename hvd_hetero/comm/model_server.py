"""A model on rank 0 to which ranks push vectors, each when it is ready, and from which they pull the model.

The control channel of partial collectives carries it: authenticated, on the job's own interface, closed to others as
soon as all ranks are there. Behind a push goes a vector, behind an answer the model, as plain bytes whose length both
ends know; nothing is unpickled. A rank has one push on its way at a time and waits for the answer, which is the back
pressure: rank 0 holds no more than a vector and a copy of the model for each rank. Each link has a thread, so a rank
that stops in mid-message holds up nobody but itself. When a link ends, all do.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hvd_hetero.comm.async_ops import PeerLost
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.partial.allreduce import BROKEN
from hvd_hetero.comm.partial.control_channel import MESSAGE, ThreadedServer, _Wire, connect
from hvd_hetero.comm.partial.coordinator import CLAIM, CLOSING, FINAL, FINISHED, SOLO, Coordinator

PUSH, PULL, FINISH = 21, 22, 23
"""What a rank says: here is a vector; I have none; my part of the epoch is over. The number: samples that it claims."""
ANSWER = struct.Struct("<qqqBBB")
"""Version of the model, place of the samples, delay of the vector, whether it was used, whether the epoch comes to its
end, and whether the model follows."""

LOOK_SEC = 0.1
"""Between two looks whether a rank that has finished is still there."""


class Served(Protocol):
    """What a server does with vectors; called by one thread at a time."""

    @property
    def version(self) -> int:
        """Updates of the model so far."""

    def arrive(self, rank: int, vector: Tensor) -> tuple[int, bool]:
        """Take a vector, which is this one's own from now on; return its delay, and whether it was used."""

    def skip(self, rank: int) -> None:
        """Go on with a rank that has no vector."""

    def give(self, rank: int) -> Tensor | None:
        """Return the model ``[P]`` that a rank goes on from, valid until the next call; None: the one it has."""

    def finish(self) -> None:
        """All ranks have finished the epoch; each is given the model next."""


class Answer(NamedTuple):
    """What a rank is told, see :data:`ANSWER`; the model ``[P]`` is valid until the next one; None: it has it."""

    version: int
    offered: int
    delay: int
    is_used: bool
    closing: bool
    model: Tensor | None


class ModelServer(ThreadedServer):
    """Rank 0's end.

    Args:
        rank_groups: all ranks, by device class: when one of them has finished, the epoch comes to its end.

    Attributes:
        error: why it has ended, if that is the server's own fault.
    """

    def __init__(
        self, address: str, ranks: int, secret: bytes, served: Served, like: Tensor,
        rank_groups: Sequence[Sequence[int]],
    ) -> None:  # fmt: skip
        self._served, self._like, self._coordinator = served, like, Coordinator(rank_groups, SOLO, seed=0)
        self._turn, self._epochs, self._over, self._closing = threading.Condition(), 0, False, False
        self._cores = torch.get_num_threads()
        self.error: BaseException | None = None
        super().__init__(address, ranks, secret)

    def _converse(self, rank: int, wire: _Wire) -> None:
        torch.set_num_threads(self._cores)
        sent = torch.empty_like(self._like)
        try:
            while True:
                what, number = MESSAGE.unpack(wire.connection.recv_bytes(MESSAGE.size))
                vector = None
                if what == PUSH:
                    wire.receive_vector(vector := torch.empty_like(self._like))
                answer = self._answer(rank, wire, what, number, vector, sent)
                wire.connection.send_bytes(ANSWER.pack(*answer))
                if answer[-1]:
                    wire.send_vector(sent)
        except (EOFError, OSError, struct.error):
            pass
        except BaseException as error:
            self.error = self.error or error
        finally:
            self._end()

    def _answer(
        self, rank: int, wire: _Wire, what: int, claim: int, vector: Tensor | None, sent: Tensor
    ) -> tuple[int, ...]:
        with self._turn:
            offered = delay = used = 0
            if vector is not None:
                delay, used = self._served.arrive(rank, vector)
            if what == PULL:
                self._served.skip(rank)
            if what == FINISH:
                self._finish(rank, wire)
            elif claim:
                (_, _, offered), *_ = self._coordinator.handle(rank, CLAIM, claim)
            model = self._served.give(rank)
            if model is not None:
                sent.copy_(model)
            return self._served.version, offered, delay, used, self._closing, model is not None

    def _finish(self, rank: int, wire: _Wire) -> None:
        """Waits until all ranks have finished, without holding up the others."""
        orders = {what for _, what, _ in self._coordinator.handle(rank, FINISHED, 0)}
        self._closing = CLOSING in orders or self._closing
        epoch = self._epochs
        if FINAL in orders:
            self._epochs, self._closing = epoch + 1, False
            self._served.finish()
            self._turn.notify_all()
        while self._epochs == epoch:
            if self._over or wire.connection.poll():  # a rank that waits for an answer says nothing but its end
                raise EOFError
            self._turn.wait(LOOK_SEC)

    def _end(self) -> None:
        """Nobody may wait for a rank that is gone."""
        with self._changed:
            for wire in self._links.values():
                wire.shut()
        with self._turn:
            self._over = True
            self._turn.notify_all()


class ModelLink:
    """A rank's end; all ranks make it together.

    Args:
        served: rank 0's model.
        like: ``[P]`` on the host, a vector as they travel.
        rank_groups: all ranks, by device class.
        hosts: how many the ranks are on.

    Attributes:
        first: version of the model at the start.
    """

    def __init__(
        self, comm: Comm, served: Served | None, like: Tensor, rank_groups: Sequence[Sequence[int]], hosts: int = 1
    ) -> None:
        self._heartbeat, self._watch, self._traffic = comm.heartbeat, comm.watch, comm.traffic
        self._model = torch.empty_like(like)

        def make(address: str, ranks: int, secret: bytes) -> ModelServer:
            assert served is not None
            return ModelServer(address, ranks, secret, served, like, rank_groups)

        self._link, self._server = connect(comm, hosts, make)
        self.first = self._ask(PULL).version
        comm.barrier("server.begun")  # nobody pushes before all know the version that they begin with

    def exchange(self, vector: Tensor | None, claim: int = 0) -> Answer:
        """Pushes a vector ``[P]``, or none, and pulls the model; books the time as transfer.

        Args:
            claim: samples of the epoch that are asked for; no two ranks are offered the same.

        Raises:
            PeerLost: another rank is gone.
        """
        with self._heartbeat.waiting("server"):
            answer = self._ask(PULL if vector is None else PUSH, claim, vector)
        self._watch.waited(0.0)
        return answer

    def finish(self) -> Answer:
        """Ends this rank's part of the epoch; waits for all others, and has the same model as they."""
        with self._heartbeat.waiting("server.finish"):
            answer = self._ask(FINISH)
        self._watch.waited(math.inf)
        return answer

    def _ask(self, what: int, number: int = 0, vector: Tensor | None = None) -> Answer:
        try:
            self._link.send(what, number, vector)
            self._traffic.sent += 0 if vector is None else vector.nbytes
            *header, follows = self._link.answer(ANSWER, self._model)
        except (EOFError, OSError) as error:
            if isinstance(self._server, ModelServer) and self._server.error is not None:
                raise self._server.error from error
            raise PeerLost(BROKEN) from error
        version, offered, delay, used, closing = header
        return Answer(version, offered, delay, bool(used), bool(closing), self._model if follows else None)

    def close(self) -> None:
        """Ends the channel and its threads, whatever they are doing."""
        self._link.close()
        if self._server is not None:
            self._server.close()
