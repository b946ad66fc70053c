"""What becomes of frozen parameters and buffers outside of the flat vectors, when ranks meet."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.tensor_slots import as_bytes, from_bytes, real_view
from hvd_hetero.comm.untrained_state import AVERAGE, KEY, MAX, ROOT, SUM, UntrainedState, is_tensor_finite
from hvd_hetero.comm.weighted_sums import average_tensors
from hvd_hetero.errors import UserError


class UntrainedAverages:
    """One meeting of ranks, at which these tensors follow their policies.

    Maxima travel beside the sum of the models: one collective after the other would wait for slow ranks to wake up once
    more. Where that sum fails, they are left on their way, and no more is sent: the rank ends.

    Args:
        weight: of this rank in averages.
        is_finite: whether this rank's model is free of NaN and Inf; else it gives nothing.
        ranks: those that take part: all, or one class.
    """

    def __init__(
        self, comm: Comm, untrained: UntrainedState, weight: float, is_finite: bool, name: str,
        ranks: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        self._comm, self._untrained, self._weight, self._is_finite = comm, untrained, weight, is_finite
        self._name, self._ranks = name, ranks or tuple(range(comm.size))
        self._alone = len(self._ranks) == 1
        self._finish_maxima: Callable[[], None] = lambda: None

    def begin(self) -> None:
        """Send what maxima are taken of."""
        if not self._alone and self._untrained.active:
            self._finish_maxima = self._begin_maxima(self._untrained.active)

    def finish(self) -> None:
        """Wait for the maxima, and do everything else."""
        self._finish_maxima()
        if not self._alone and self._untrained.active:
            self._follow(self._untrained.active)

    def agree_on_changes(self) -> None:
        """Look thoroughly for what has changed; where a rank finds something, all agree on what becomes of it."""
        if self._alone:
            return
        found = torch.tensor([bool(self._untrained.changed(thorough=True))], dtype=torch.float32)
        self._comm.max_async_(found, f"{self._name}.changed", self._ranks)()
        if found[0]:
            self.agree()

    def agree(self) -> None:
        """Take up what has changed on some rank.

        Raises:
            UserError: it is of another shape or type on another rank.
        """
        if self._alone:
            return
        changed, tensors = self._untrained.changed(thorough=True), self._untrained.tensors()
        local = {
            name: [f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}", name in changed,
                   self._untrained.is_cache(name, tensor)]
            for name, tensor in tensors.items() if name not in self._untrained.active
        }  # fmt: skip
        gathered: list[dict[str, Any]] = [
            json.loads(text) for text in self._comm.gather_text(json.dumps(local), f"{self._name}.names", self._ranks)
        ]
        names = sorted({name for each in gathered for name, (_, has_changed, _) in each.items() if has_changed})
        caches = [name for name in names if any(name in each and each[name][2] for each in gathered)]
        fresh = [name for name in names if name not in caches]
        for name in fresh:
            kinds = [each[name][0] if name in each else "missing" for each in gathered]
            for rank, kind in zip(self._ranks, kinds, strict=True):
                if kind != kinds[0]:
                    problem = f"the model's {name} is {kinds[0]} on rank {self._ranks[0]} and {kind} on rank {rank}"
                    raise UserError(f"{problem}; keep its shape the same on all ranks, or set {KEY}.{name}=local")
        self._untrained.keep_local(caches)
        self._untrained.activate(fresh)
        new = {name: self._untrained.active[name] for name in fresh}
        self._begin_maxima(new)()
        self._follow(new)

    # ---- the policies -----------------------------------------------------------------------------------------------

    def _begin_maxima(self, policies: Mapping[str, str]) -> Callable[[], None]:
        """Begin to take maxima; the result waits for them."""
        tensors = self._chosen(policies, MAX)
        if not tensors:
            return lambda: None
        ordered = {name: _ordered(tensor) for name, tensor in tensors.items()}
        types = sorted({value.dtype for value in ordered.values()}, key=str)
        vectors, waits = {}, []
        for dtype in types:
            parts = [value.reshape(-1) for value in ordered.values() if value.dtype == dtype]
            vectors[dtype] = torch.cat(parts).cpu()
            waits.append(self._comm.max_async_(vectors[dtype], f"{self._name}.max.{dtype}", self._ranks))

        def restore() -> None:
            for wait in waits:
                wait()
            places = dict.fromkeys(types, 0)
            for name, value in ordered.items():
                start = places[value.dtype]
                places[value.dtype] = start + value.numel()
                part = vectors[value.dtype][start : start + value.numel()].view(value.shape)
                self._untrained.put(name, _unordered(part.to(value.device), tensors[name].dtype))

        return restore

    def _follow(self, policies: Mapping[str, str]) -> None:
        """Everything but maxima."""
        self._average(self._chosen(policies, AVERAGE))
        self._sum(self._chosen(policies, SUM))
        self._broadcast_root(self._chosen(policies, ROOT))

    def _chosen(self, policies: Mapping[str, str], policy: str) -> dict[str, Tensor]:
        names = [name for name in sorted(policies) if policies[name] == policy]
        return self._untrained.checked(names) if names else {}

    @torch.no_grad()
    def _average(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            return
        work = [real_view(tensor).clone() for tensor in tensors.values()]
        is_finite = self._is_finite and all(map(is_tensor_finite, work))
        average_tensors(self._comm, work, is_finite, f"{self._name}.average", weight=self._weight,
                        prescaled_weight=1.0, ranks=self._ranks)  # fmt: skip
        for (name, tensor), average in zip(tensors.items(), work, strict=True):
            self._untrained.put(name, torch.view_as_complex(average) if tensor.is_complex() else average)
        if self._is_finite and not is_finite:
            self._comm.excluded.record()

    @torch.no_grad()
    def _sum(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            return
        for wide in (torch.int64, torch.float64):
            chosen = {name: t for name, t in tensors.items() if t.is_floating_point() == wide.is_floating_point}
            if not chosen:
                continue
            bases = {name: self._untrained.base[name].to(wide) for name in chosen}
            added = torch.cat([(t.to(wide) - bases[name]).reshape(-1) for name, t in chosen.items()]).cpu()
            if not self._is_finite:
                added.zero_()
            self._comm.sum_(added, f"{self._name}.sum.{wide}", self._ranks)
            parts = added.split([t.numel() for t in chosen.values()])
            for (name, tensor), part in zip(chosen.items(), parts, strict=True):
                total = bases[name] + part.view(tensor.shape).to(tensor.device)
                self._untrained.put(name, total.to(tensor.dtype))
                self._untrained.base[name] = total.to(tensor.dtype)

    def _broadcast_root(self, tensors: Mapping[str, Tensor]) -> None:
        """Give all ranks what the first of those has that weigh most."""
        if not tensors:
            return
        mine = torch.tensor([self._weight if self._is_finite else 0.0], dtype=torch.float64)
        weights = [float(w) for w in self._comm.gather(mine, f"{self._name}.weights", ranks=self._ranks)]
        if not any(weights):
            return
        root = self._ranks[weights.index(max(weights))]
        parts = [as_bytes(tensor).cpu() for tensor in tensors.values()]
        received = self._comm.broadcast(torch.cat(parts), f"{self._name}.from_root", root, self._ranks)
        for (name, tensor), part in zip(tensors.items(), received.split([len(t) for t in parts]), strict=True):
            self._untrained.put(name, from_bytes(part, tensor.dtype, tensor.shape).to(tensor.device))


def _ordered(tensor: Tensor) -> Tensor:
    """Numbers in the same order, of a type that Horovod takes maxima of."""
    if tensor.dtype == torch.uint64:
        return tensor.view(torch.int64) ^ torch.iinfo(torch.int64).min
    if not tensor.is_floating_point():
        return tensor.to(torch.int64)
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _unordered(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """What :func:`_ordered` was made of."""
    if dtype == torch.uint64:
        return (numbers ^ torch.iinfo(torch.int64).min).view(torch.uint64)
    return numbers.to(dtype)
