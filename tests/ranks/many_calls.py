"""Every rank of a job runs this: trains again and again in one program.

``many_calls.py FOLDER`` writes what it was like to ``FOLDER/rank{N}.json``.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hvd_hetero

FOLDER, RANK = Path(sys.argv[1]), int(os.environ["HOROVOD_RANK"])
SWAPPED = {"fast": {"ranks": [1]}, "slow": {"ranks": [0]}}
COMMON = {
    "train.epochs": 2, "train.batch_size": 4, "train.tau": {"fast": 4, "slow": 2}, "train.loss_args": {},
    "cluster.classes": {"fast": {"ranks": [0]}, "slow": {"ranks": [1]}}, "checkpoint.every_rounds": 1,
}  # fmt: skip


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.3), nn.Linear(4, 2))


class Unsaved(nn.Linear):
    """Fails where its weights are to be saved, after the training."""

    def state_dict(self, *args: Any, **options: Any) -> Any:
        raise KeyError("no weights today")


class Projects(nn.Linear):
    """Projects its inputs by numbers that each rank has drawn for itself, and that are no buffer."""

    def __init__(self) -> None:
        super().__init__(8, 2)
        self.kept = {"projection": torch.randn(8, 8, generator=torch.Generator().manual_seed(RANK))}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.kept["projection"])


def data(shift: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(48, 8, generator=torch.Generator().manual_seed(shift))
    return x, (x[:, 0] > 0).long()


def train(name: str | None, shift: int = 0, model: Any = model, optimizer: Any = None, **settings: Any) -> str:
    folder = {} if name is None else {"run.dir": str(FOLDER / name)}
    settings = {key.replace("__", "."): value for key, value in settings.items()}
    test = data(9)
    hvd_hetero.train(model=model, train_data=data(shift), test_data=test, optimizer=optimizer,
                     overrides={**COMMON, **folder, **settings})  # fmt: skip
    return "done"


def loop() -> str:
    rounds = hvd_hetero.Loop(model(), data(), {key: COMMON[key] for key in COMMON if "checkpoint" not in key})
    optimizer = torch.optim.SGD(rounds.model.parameters(), lr=0.1)
    for each in rounds:
        for x, y in each:
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(rounds.model(x), y, reduction="none")
            losses.mean().backward()
            optimizer.step()
            each.losses(losses)
    rounds.close()
    return "done"


CALLS: dict[str, Any] = {
    "first": lambda: train("first"),
    "refused everywhere": lambda: train("none", train__lr=-1.0),
    "refused between ranks": lambda: train("none", train__lr=0.1 * (RANK + 1)),
    "refused after the start": lambda: train("first", run__resume="auto", cluster__classes=SWAPPED),
    "an array refused": lambda: train("none", model=Projects),
    "an optimizer refused": lambda: train("none", optimizer=lambda p: torch.optim.SGD(p, lr=0.1 * (RANK + 1))),
    "again": lambda: train("again"),
    "other data": lambda: train("other", shift=3, run__seed=5),
    "other metric": lambda: train("other", shift=3, run__seed=5, run__resume="auto", train__epochs=3,
                                  eval__metrics={}),
    "eager": lambda: train("eager", algorithm__name="eager_sgd", train__tau=4),
    "no name": lambda: train(None),
    "no name again": lambda: train(None),
    "loop": loop,
    "unsaved": lambda: train("unsaved", model=lambda: Unsaved(8, 2)),
    "last": lambda: train("last", train__matmul_precision="high"),
}


def facts() -> dict[str, Any]:
    """What a program has a right to find as it was."""
    tasks = [int(task) for task in os.listdir("/proc/self/task")]
    umask = os.umask(0o077)
    os.umask(umask)
    return {
        "cores": sorted({tuple(sorted(os.sched_getaffinity(task))) for task in tasks}),
        "threads": torch.get_num_threads(), "precision": torch.get_float32_matmul_precision(), "umask": umask,
        "filters": [str(each) for each in warnings.filters],
    }  # fmt: skip


def drawn() -> list[float]:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    numbers = [float(torch.rand(())), float(np.random.rand()), random.random()]
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    return numbers


def main() -> None:
    os.umask(0o002)
    warnings.filterwarnings("ignore", message="mine")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0)))
    torch.set_num_threads(2)
    torch.manual_seed(77)
    begin = facts()
    found: dict[str, Any] = {}
    for name, call in CALLS.items():
        before = drawn()
        try:
            status: Any = call()
        except SystemExit as end:
            status = end.code
        found[name] = {"status": status, "facts": facts(), "files": len(os.listdir("/proc/self/fd")),
                       "draws as before": drawn() == before,
                       "running": sorted(thread.name for thread in threading.enumerate())}  # fmt: skip
    found["begin"] = begin
    (FOLDER / f"rank{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
