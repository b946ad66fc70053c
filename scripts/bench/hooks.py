"""What scripts/bench/overhead turns on besides: a callback with all its hooks, and metrics of the whole test set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hvd_hetero import Callback


class Counting(Callback):
    """Counts how often each hook is called, and adds the counts to the rows."""

    on_all_ranks = True

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def on_start(self, run: Any) -> None:
        self.calls["start"] += 1

    def on_evaluation(self, row: dict[str, Any]) -> None:
        self.calls["evaluation"] += 1

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        self.calls["epoch_end"] += 1
        row["calls"] = self.calls["epoch_end"]

    def on_checkpoint(self, round: int) -> None:
        self.calls["checkpoint"] += 1

    def on_end(self, summary: Mapping[str, Any] | None) -> None:
        self.calls["end"] += 1


def top_3(outputs: Tensor, targets: Tensor) -> Tensor:
    """Whether the class is among the three likeliest, for each sample."""
    return (outputs.topk(3).indices == targets[:, None]).any(1).float()


def macro_recall(outputs: Tensor, targets: Tensor) -> float:
    """The mean over classes of the share of their samples that is recognised, of the whole test set."""
    right = (outputs.argmax(1) == targets).double()
    classes = int(targets.max()) + 1
    found = torch.bincount(targets, right, classes) / torch.bincount(targets, minlength=classes).clamp(min=1)
    return float(found.mean())
