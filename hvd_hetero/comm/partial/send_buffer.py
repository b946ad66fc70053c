"""The send buffer of a partial collective: what a rank has contributed since the last round began."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvd_hetero.comm.partial.rounds import Round
from hvd_hetero.telemetry.staleness import Counts


class SendBuffer:
    """What goes with the next round that begins. Whoever calls it holds the collective's lock, but for :meth:`payload`.

    Args:
        size: P, elements of the vector.
        state_elements: so many elements at its end are states and not sums: the newest contribution's are sent.
        weight_of: turns the steps in the buffer into the factor of what is sent; None: as it is, by number of steps.
        pinned: whether the memory is one from which a GPU copies while the host goes on.
        resends: whether it is sent again and again until there is a newer contribution, which replaces it.
    """

    def __init__(
        self, size: int, dtype: torch.dtype, state_elements: int, weight_of: Callable[[float], float] | None,
        pinned: bool, resends: bool = False,
    ) -> None:  # fmt: skip
        self._resends = resends
        self._size, self._dtype, self._sums = size, dtype, size - state_elements
        self._weight_of, self._pinned = weight_of, pinned
        self._pool: list[Tensor] = []
        self._buffer = self._empty()
        self._steps, self._made_at = 0.0, list[int]()

    def has_part_in(self, number: int) -> bool:
        """Whether there is a contribution in it; where they are kept, one that was made for this round."""
        return self._is_for(number) if self._resends else bool(self._made_at)

    def _is_for(self, number: int) -> bool:
        return self._made_at[-1:] == [number]

    def add(self, vector: Tensor, steps: float, version: int) -> None:
        """Adds a contribution.

        Args:
            vector: ``[P]`` on the host.
            steps: how much work is in it.
            version: of the model that it was computed on.
        """
        pending = self._buffer[: self._size]
        if self._resends:
            self._steps, self._made_at = 0.0, []
        if self._made_at:
            pending[: self._sums].add_(vector[: self._sums])
            pending[self._sums :].copy_(vector[self._sums :])
        else:
            pending.copy_(vector)
        self._steps += steps
        self._made_at.append(version)

    def drain(self, number: int, started: float, final: bool, counts: Counts) -> tuple[Round, float]:
        """What is in it, for a round, with its number of steps; leaves an empty one."""
        buffer, made_at, steps, fresh = self._buffer, self._made_at, self._steps, self._is_for(number)
        self._buffer = self._empty()
        if self._resends:
            self._buffer.copy_(buffer)
        else:
            self._made_at, self._steps = [], 0.0
        if made_at and not (final and self._resends):
            counts.staleness.update(number - version for version in made_at)
            counts.fresh += fresh
            counts.late += not fresh
        elif not made_at:
            counts.empty += not final
        return Round(number, buffer, 0.0, None, len(made_at), started, final, fresh, [buffer]), steps

    def payload(self, item: Round, steps: float) -> Tensor:
        """What is sent of what was taken: ``[P + 1]``, the weight last.

        The thread that takes calls it, without the lock: nobody else draws from the pool.
        """
        buffer = payload = item.buffers[0]
        weight = steps
        if not item.contributions:
            buffer.zero_()
        elif self._weight_of is not None:
            payload = self._empty()
            weight = self._weight_of(steps)
            torch.mul(buffer, weight, out=payload)
            item.own = buffer[: self._size]
            item.buffers = [payload, buffer]
        payload[-1] = weight
        item.total = payload[: self._size]
        return payload

    def release(self, item: Round) -> None:
        """Takes the memory of a result that nobody needs any more."""
        self._pool += item.buffers
        item.buffers = []

    def _empty(self) -> Tensor:
        """A buffer with a place for the weight behind the vector; its contents are anything."""
        if self._pool:
            return self._pool.pop()
        return torch.empty(self._size + 1, dtype=self._dtype, pin_memory=self._pinned)
