"""Partial allreduce: a collective that whoever is ready starts, and all others join with whatever they have.

Source: Li et al., "Taming Unbalanced Training Workloads in Deep Learning with Partial Collective Operations"
(eager-SGD, 2020), on Horovod: a helper thread on every rank takes part in its place, so that no rank's computing delays
another.

What a rank contributes is added to its send buffer. When a round starts, every helper takes the buffer as it is and
leaves an empty one; what is contributed later goes with the next round. So each contribution is sent exactly once.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import horovod.torch as hvd
import torch
from torch import Tensor

from hvd_hetero.comm.async_ops import PeerLost, guarded
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.partial.control_channel import ControlServer, connect
from hvd_hetero.comm.partial.coordinator import (
    ARRIVED,
    CLAIM,
    CLOSING,
    FINAL,
    FINISHED,
    FULL,
    OFFER,
    START,
    Coordinator,
)
from hvd_hetero.comm.partial.rounds import Round, done_unless
from hvd_hetero.comm.partial.send_buffer import SendBuffer
from hvd_hetero.log import LOGGER
from hvd_hetero.planning.groups import Partition, group_of
from hvd_hetero.planning.quorum import Quorum
from hvd_hetero.telemetry.staleness import Counts

BROKEN = "another rank is gone (the channel to rank 0 is broken)"


class PartialAllreduce:
    """A partial allreduce of one vector over all ranks of the job; all ranks make it together.

    Args:
        size: P, elements of the vector.
        mode: ``solo``, ``majority``, ``quorum`` or ``full``, see
            :class:`hvd_hetero.comm.partial.coordinator.Coordinator`.
        rank_groups: all ranks, by what arrives as a whole.
        seed: of majority's initiators; the same on all ranks.
        sync_every: every so many rounds each rank joins only when it has something to send: nothing that is sent is
            older than ``sync_every`` + 1 rounds.
        max_lag: a rank joins no round while it has so many results left to take; the others then wait for it.
        state_elements: elements at the end of the vector that are states and not sums; the newest's are sent.
        weight_of: turns the steps in the send buffer into the factor of what is sent; None: as it is, by steps.
        first_round: its number, in a resumed run.
        quorum: in mode quorum, what is enough to start a round.
        drops_late: whether what comes too late for the round it was made for is dropped; else it goes with the next.
        groups: partitions of the ranks: in round k those of a group of partition k mod r add up among themselves, but
            in every ``sync_every``-th round and the last one of an epoch all do. None: always all.
        resends: whether a rank that has nothing new sends once more what it sent last; a contribution that replaces
            that one without being for a round is made with ``arrived=False``.
        hosts: how many hosts the ranks are on.
        pinned: whether results lie in memory from which a GPU copies while the host goes on.

    Attributes:
        closing: whether a whole unit has finished the epoch, so that the others should come to an end.
    """

    def __init__(
        self,
        comm: Comm,
        size: int,
        dtype: torch.dtype,
        mode: str,
        *,
        rank_groups: Sequence[Sequence[int]],
        seed: int = 0,
        sync_every: int = 32,
        max_lag: int = 32,
        state_elements: int = 0,
        weight_of: Callable[[float], float] | None = None,
        first_round: int = 0,
        quorum: Quorum | None = None,
        drops_late: bool = False,
        groups: Sequence[Partition] = (),
        resends: bool = False,
        hosts: int = 1,
        pinned: bool = False,
    ) -> None:
        assert comm.size > 1 and sync_every >= 1 and max_lag >= 1
        self._rank, self._heartbeat, self._watch, self._traffic = comm.rank, comm.heartbeat, comm.watch, comm.traffic
        self._full = 1 if mode == FULL else sync_every
        self._max_lag, self._drops_late, self._resends = max_lag, drops_late, resends
        self._all_ranks = comm.group(tuple(range(comm.size)))
        self._groups = [comm.group(group_of(partition, comm.rank)) for partition in groups] or [self._all_ranks]
        self._changed = threading.Condition()
        self._buffer = SendBuffer(size, dtype, state_elements, weight_of, pinned, resends)
        self._starts: deque[tuple[int, float, bool]] = deque()
        self._rounds: deque[Round] = deque()
        self._offers: deque[int] = deque()
        self._next, self._taken = first_round, first_round
        self._in_epoch, self._stopped, self.closing = True, False, False
        self._error: BaseException | None = None
        self.counts = Counts()
        coordinator = Coordinator(rank_groups, mode, seed, first_round, quorum)
        self._link, self._hub = connect(comm, hosts, partial(ControlServer, handle=coordinator.handle))
        self._threads = [
            threading.Thread(target=self._watched, args=(run,), name=f"hvd_hetero.{run.__name__}", daemon=True)
            for run in (self._read, self._help)
        ]
        for thread in self._threads:
            thread.start()

    # ---- what a rank's own thread calls -----------------------------------------------------------------------------

    @property
    def has_started(self) -> bool:
        """Whether a round has started whose result this rank has not taken."""
        with self._changed:
            return bool(self._starts or self._rounds or self._next != self._taken)

    @property
    def version(self) -> int:
        """Number of rounds whose results this rank has taken: the version of its model."""
        return self._taken

    def contribute(self, vector: Tensor, steps: float = 1, *, arrived: bool = True, samples: int = 0) -> bool:
        """Adds to what goes with the next round that starts, and says that this rank is there.

        Args:
            vector: ``[P]`` on the host.
            steps: how much work is in it, for its weight.
            arrived: False where this rank is still at work for that round.
            samples: that are lost with it, if it is dropped.

        Returns:
            False if it was dropped: the round that it was made for has gone without it.
        """
        with self._changed:
            self._check()
            if self._drops_late and self._next != self._taken:
                self.counts.dropped += 1
                self.counts.lost_samples += samples
                return False
            self._buffer.add(vector, steps, self._taken - (self._resends and not arrived))
            self._changed.notify_all()
        if arrived:
            self._send(ARRIVED, self._taken)
        return True

    def pop(self, patience_sec: float | None = None, max_rounds: int | None = None) -> list[Round]:
        """The results that are there and were not taken yet, in order; waits for one if there is none, and books that.

        Args:
            patience_sec: how long to wait at most; None: as long as it takes.
            max_rounds: that are taken; None: all.
        """
        with self._heartbeat.waiting("partial"), self._changed:
            self._changed.wait_for(lambda: self._rounds or self._error or self._stopped, patience_sec)
            self._check()
            taken = [self._rounds.popleft() for _ in range(min(len(self._rounds), max_rounds or len(self._rounds)))]
            self._taken += len(taken)
            self._changed.notify_all()
        if taken or patience_sec != 0:
            self._watch.waited(taken[0].started if taken else math.inf)
        return taken

    def release(self, rounds: Sequence[Round]) -> None:
        """Give back the memory of results."""
        with self._changed:
            for item in rounds:
                self._buffer.release(item)

    def claim(self, samples: int) -> None:
        """Asks for samples of the epoch; :meth:`offered` has the answer."""
        self._send(CLAIM, samples)

    def offered(self) -> int:
        """Place in the epoch of the first of the samples asked for; no two ranks are offered the same."""
        with self._heartbeat.waiting("partial.offer"), self._changed:
            self._changed.wait_for(lambda: self._offers or self._error or self._stopped)
            self._check()
            return self._offers.popleft()

    def finish(self) -> Iterator[list[Round]]:
        """Ends this rank's part of the epoch: gives results as they come, up to the round that empties all buffers.

        When it is through, all ranks have had the same results, and nothing is left unsent.
        """
        with self._changed:
            self._in_epoch = False
            self._changed.notify_all()
        self._send(FINISHED, 0)
        last = False
        while not last:
            taken = self.pop()
            last = taken[-1].final
            yield taken
        self._in_epoch, self.closing = True, False

    def pop_counts(self) -> Counts:
        """What this rank has sent since the last call."""
        taken, self.counts = self.counts, Counts()
        return taken

    def close(self) -> None:
        """Ends the threads and the channel, whatever they are doing; a round on its way is given up."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._link.close()
        if self._hub is not None:
            self._hub.close()
        for thread in self._threads:
            thread.join(timeout=5)

    def _send(self, what: int, number: int) -> None:
        try:
            self._link.send(what, number)
        except OSError as error:
            self._fail(PeerLost(BROKEN))
            raise PeerLost(BROKEN) from error

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._stopped:
            raise RuntimeError("the partial collective was closed")

    # ---- the threads ------------------------------------------------------------------------------------------------

    def _watched(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if not self._stopped and self._error is None:
                self._error = error
            self._changed.notify_all()

    def _read(self) -> None:
        while True:
            try:
                what, number = self._link.receive()
            except (EOFError, OSError):
                if self._stopped:
                    return
                raise PeerLost(BROKEN) from None
            with self._changed:
                if what == OFFER:
                    self._offers.append(number)
                elif what == CLOSING:
                    self.closing = True
                elif what in (START, FINAL):
                    self._starts.append((number, time.perf_counter(), what == FINAL))
                self._changed.notify_all()

    def _help(self) -> None:
        has_warned = False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._starts or self._over())
                if self._over():
                    return
                number, started, final = self._starts.popleft()
                if number - self._taken >= self._max_lag:
                    self.counts.waited_for += 1
                    if not has_warned:
                        has_warned = True
                        LOGGER.warning("rank %s is %s rounds behind: the others wait for it", self._rank, self._max_lag)
                self._changed.wait_for(lambda: self._over() or self._may_join(number, final))  # noqa: B023
                if self._over():
                    return
                assert number == self._next, "rounds come in order"
                self._next += 1
                item, steps = self._buffer.drain(number, started, final, self.counts)
            payload = self._buffer.payload(item, steps)
            group = self._all_ranks if self._is_full(number) or final else self._groups[number % len(self._groups)]
            handle = guarded(lambda: hvd.allreduce_async_(payload, op=hvd.Sum, process_set=group, name="partial"))  # noqa: B023
            if not done_unless(self._over, handle):
                return
            item.weight = float(payload[-1])
            self._traffic.sent += payload.nbytes
            with self._changed:
                self._rounds.append(item)
                self._changed.notify_all()

    def _over(self) -> bool:
        return self._stopped or self._error is not None

    def _may_join(self, number: int, final: bool) -> bool:
        if number - self._taken >= self._max_lag:
            return False
        is_through = final or not self._in_epoch
        return bool(not self._is_full(number) or is_through or self._buffer.has_part_in(number))

    def _is_full(self, number: int) -> bool:
        return (number + 1) % self._full == 0
