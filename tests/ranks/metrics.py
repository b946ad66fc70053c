"""Every rank of a job runs this: ``metrics.py FOLDER`` trains with metrics of all kinds, and with patience."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hvd_hetero

CLASSES = {"a": {"ranks": [0]}, "b": {"ranks": [1, 2]}}
X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
TEST = X[:11], Y[:11]


class Net(nn.Module):
    """Has named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(x), "x": x}


def loss(outputs: Any, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs["logits"], targets, reduction="none")


def right(outputs: Any, targets: Tensor) -> Tensor:
    return outputs["logits"].argmax(1) == targets


def of_all(outputs: Any, targets: Tensor) -> dict[str, float]:
    """Depends on the order of the samples, which is that of the test set."""
    order = torch.arange(1, len(targets) + 1)
    assert torch.equal(outputs["x"], TEST[0]) if len(targets) == len(TEST[1]) else True
    return {"targets": float((order * targets).sum()), "logits": float((order * outputs["logits"][:, 0]).sum())}


def metrics() -> dict[str, Any]:
    from torchmetrics.classification import MulticlassAUROC, MulticlassF1Score

    class OfLogits(MulticlassF1Score):
        def update(self, outputs: Any, targets: Tensor) -> None:
            super().update(outputs["logits"], targets)

    class Exact(MulticlassAUROC):  # type: ignore[misc]
        """Keeps all samples as its state, which ranks have different numbers of."""

        def update(self, outputs: Any, targets: Tensor) -> None:
            super().update(outputs["logits"].softmax(1), targets)

    return {"right": right, "all": {"target": of_all, "over": "dataset"}, "f1": OfLogits(num_classes=3),
            "auc": Exact(num_classes=3)}  # fmt: skip


def constant(outputs: Any, targets: Tensor) -> float:
    return 1.0


def train(name: str, given: dict[str, Any], **settings: Any) -> None:
    overrides = {"cluster.classes": CLASSES, "train.batch_size": 2, "train.tau": {"a": 3, "b": 2}, "eval.batch_size": 2,
                 "run.dir": str(Path(sys.argv[1]) / name), "train.loss_args": {}, "sampling.scheme": "uniform",
                 **{key.replace("__", "."): value for key, value in settings.items()}}  # fmt: skip
    hvd_hetero.train(None, overrides, model=Net, train_data=(X, Y), test_data=TEST, loss=loss, metrics=given)


if __name__ == "__main__":
    train("kinds", metrics(), train__epochs=2, eval__average="ema", eval__best={"metric": "all_logits", "mode": "min"})
    train("idle", metrics(), train__epochs=1, algorithm__name="sync_sgd", algorithm__participants="b",
          train__tau=1, aggregation__weights=None)
    given = {"same": {"target": constant, "over": "dataset"}}
    best: dict[str, Any] = {"eval__best": {"metric": "same", "mode": "max"}, "train__epochs": 9}
    train("patience", given, train__patience=2, **best)
    train("patience", given, train__patience=4, run__resume="auto", **best)
