"""The accounts of partial collectives: what was sent fresh, late or not at all, and how old it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

AGES = 65
"""Ages are told apart up to this one less 1; what is older counts there."""
KINDS = ("fresh", "late", "empty", "waited_for", "dropped", "lost_samples")
NUMBERS = len(KINDS) + AGES


@dataclass
class Counts:
    """What one rank sent: rounds with something fresh in it, with nothing but late contributions, and empty ones.

    Attributes:
        staleness: contributions by age: rounds between the model they were computed on and the round they went with.
        waited_for: rounds that this rank held up, because it had too many results left to take.
        dropped: contributions that came too late for a method that takes fresh ones alone, with ``lost_samples``
            samples in them.
    """

    fresh: int = 0
    late: int = 0
    empty: int = 0
    waited_for: int = 0
    staleness: Counter[int] = field(default_factory=Counter)
    dropped: int = 0
    lost_samples: int = 0


def to_numbers(counts: Counts) -> Tensor:
    """One rank's counts in the form in which they are gathered."""
    ages = [0] * AGES
    for age, times in counts.staleness.items():
        ages[min(age, AGES - 1)] += times
    return torch.tensor([getattr(counts, kind) for kind in KINDS] + ages)


class PartialAccounts:
    """Adds up all ranks' counts over epochs.

    Attributes:
        ranks: rounds by kind, for each rank.
    """

    def __init__(self) -> None:
        self.ranks: list[dict[str, int]] = []
        self._ages = torch.zeros(AGES, dtype=torch.int64)

    def enter(self, gathered: Sequence[Tensor]) -> dict[str, float]:
        """Enters an epoch; returns its shares of all ranks' rounds, and the mean age of what was sent."""
        counts_by_rank = torch.stack(list(gathered))
        self.ranks = self.ranks or [dict.fromkeys(KINDS, 0) for _ in gathered]
        for mine, row in zip(self.ranks, counts_by_rank.tolist(), strict=True):
            for kind, times in zip(KINDS, row, strict=False):
                mine[kind] += times
        ages = counts_by_rank[:, len(KINDS) :].sum(0)
        self._ages += ages
        fresh, late, empty = (int(counts_by_rank[:, i].sum()) for i in range(3))
        rounds = max(fresh + late + empty, 1)
        age = float((ages * torch.arange(AGES)).sum()) / max(int(ages.sum()), 1)
        return {"fresh": fresh / rounds, "late": late / rounds, "empty": empty / rounds, "mean_staleness": age}

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": self.ranks, "ages": self._ages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ranks, self._ages = [dict(mine) for mine in state["ranks"]], state["ages"].clone()

    def to_dict(self) -> dict[str, Any]:
        """``partial`` of summary.json."""
        ages = self._ages.tolist()
        last = max((age for age, times in enumerate(ages) if times), default=0)
        return {"ranks": self.ranks, "staleness": ages[: last + 1]}
