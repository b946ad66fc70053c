"""The average of the optimizers' own state over all ranks, parameter by parameter (aggregation.optimizer_state)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.tensor_slots import real_view
from hvd_hetero.comm.untrained_state import is_tensor_finite
from hvd_hetero.comm.weighted_sums import average_tensors

STEP = "step"
"""A count, whatever its type: bias corrections go by the rank that has taken the most steps."""
SEEDED = {"exp_avg_sq": "max_exp_avg_sq"}
"""With ``average_seed``, what is not sent, but begins anew from the average of another entry: the second moment of
AMSGrad, from its largest value so far (FedLALR)."""


@dataclass(frozen=True)
class Entry:
    """One number or tensor of a parameter's state.

    Attributes:
        param: the parameter's place among those of the model that are trained, the same on all ranks.
        shape: of a tensor; None for a plain number.
        is_count: whether the maximum is taken of it, and not the average.
    """

    param: int
    key: str
    shape: tuple[int, ...] | None
    dtype: str
    is_count: bool

    def __lt__(self, other: Entry) -> bool:
        mine, theirs = ((e.param, e.key, str(e.shape), e.dtype) for e in (self, other))
        return mine < theirs


class OptimizerAverage:
    """Replace an optimizer's floating state (momentum) by its weighted average over all ranks; counts by the maximum.

    A rank may have no state of a parameter: one that had no gradient there yet. The average is over the ranks that have
    it, with their weights scaled up to 1, and all are given it.

    Args:
        params: all that are trained, in an order that is the same on all ranks.
        seeded: keys of state that is not averaged, and of that which it is set to afterwards.
    """

    def __init__(self, params: list[nn.Parameter], comm: Comm, seeded: Mapping[str, str] | None = None) -> None:
        self._params, self._comm, self._seeded = params, comm, seeded or {}
        self._known, self._entries = "", list[Entry]()
        self._missing: set[Entry] = set()

    def average(self, optimizer: torch.optim.Optimizer, weight: float, is_finite: bool = True) -> None:
        """Take part in one average.

        Args:
            weight: of this rank; the weights of all ranks sum to 1 and are equal within a class.
            is_finite: whether this rank's model is; if not, its state has no part in the average either.

        Raises:
            NonFiniteError: as :func:`hvd_hetero.comm.averaging.average`.
        """
        with self._comm.timed():
            local = {entry: value for entry, value in self._local_entries(optimizer) if entry.key not in self._seeded}
            self._agree(sorted(local))
            floating = [entry for entry in self._entries if not entry.is_count]
            values = [self._value(local, entry) for entry in floating]
            # where not all ranks have an entry, the weights of those that do travel beside it
            present = {entry: torch.tensor([entry in local], dtype=torch.float32)
                       for entry in floating if entry in self._missing}  # fmt: skip
            is_state_finite = is_finite and all(map(is_tensor_finite, values))
            device = self._params[0].device
            sums = [*values, *(flag.to(device) for flag in present.values())]
            if sums:
                average_tensors(self._comm, sums, is_state_finite, "optimizer", weight=weight)
            for entry, average in zip(floating, values, strict=True):
                if entry in present:
                    average /= sums[len(values) + list(present).index(entry)].clamp_min(1e-30)
                self._put(optimizer, entry, average)
            if is_finite and not is_state_finite:
                self._comm.excluded.record()
            counts = [entry for entry in self._entries if entry.is_count]
            entry_counts = [float(local[entry]) if entry in local else -float("inf") for entry in counts]
            most = self._comm.max(entry_counts, "optimizer.counts") if counts else []
            for entry, value in zip(counts, most, strict=True):
                self._put(optimizer, entry, torch.tensor(value, dtype=torch.float64))
            for state in optimizer.state.values():
                for key, source in self._seeded.items():
                    state[key] = state[source].clone()

    def _local_entries(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Entry, Any]]:
        for number, param in enumerate(self._params):
            for key, value in optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor):
                    is_count = key == STEP or not (value.is_floating_point() or value.is_complex())
                    if not is_count or value.numel() == 1:
                        yield Entry(number, key, tuple(value.shape), _type(value), is_count), value
                elif type(value) in (int, float):
                    yield Entry(number, key, None, type(value).__name__, True), value

    def _agree(self, entries: list[Entry]) -> None:
        """Make the list of entries that some rank has, the same on all ranks; as a rule it is as it was."""
        text = json.dumps([(e.param, e.key, e.shape, e.dtype, e.is_count) for e in entries])
        number = int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
        entry_counts = self._comm.gather(torch.tensor([number]), "optimizer.entries")
        known = str([int(x) for x in entry_counts])
        if known == self._known:
            return
        lists = [
            {Entry(param, key, None if shape is None else tuple(shape), dtype, is_count)
             for param, key, shape, dtype, is_count in json.loads(other)}
            for other in self._comm.gather_text(text, "optimizer.lists")
        ]  # fmt: skip
        self._known, self._entries = known, sorted(set().union(*lists))
        self._missing = {entry for entry in self._entries if any(entry not in each for each in lists)}

    def _value(self, values: dict[Entry, Any], entry: Entry) -> Tensor:
        """Return this rank's part in an average, on the parameters' device, in memory of its own."""
        device = self._params[entry.param].device
        if entry in values:
            return real_view(values[entry]).detach().to(device, copy=True)
        assert entry.shape is not None
        return real_view(torch.zeros(entry.shape, dtype=getattr(torch, entry.dtype), device=device))

    def _put(self, optimizer: torch.optim.Optimizer, entry: Entry, value: Tensor) -> None:
        param = self._params[entry.param]
        state = optimizer.state[param]
        if entry.shape is None:
            state[entry.key] = int(value) if entry.dtype == "int" else float(value)
            return
        dtype: torch.dtype = getattr(torch, entry.dtype)
        if entry.key not in state:
            like = param.detach() if entry.shape == tuple(param.shape) else None
            # as optimizers make it themselves: moments as the parameter lies in memory, counts on the host
            device = "cpu" if entry.is_count or like is None else param.device
            state[entry.key] = torch.empty(entry.shape, dtype=dtype, device=device) if like is None else (
                torch.empty_like(like, dtype=dtype))  # fmt: skip
        current = state[entry.key]
        view = real_view(current)
        view.copy_(value.expand(current.shape) if entry.is_count else value.view(view.shape))


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
