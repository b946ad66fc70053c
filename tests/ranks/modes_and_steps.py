"""Every rank of a job of two runs this: ``modes_and_steps.py FOLDER`` trains models and optimizers of unusual kind.

It writes ``FOLDER/rank{N}.pt``: by case the rank's model, the modes of its submodules, what the model and the optimizer
have noted themselves, and on rank 0 the summary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvd_hetero import algorithms
from hvd_hetero.cluster.device_classes import assign
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.cluster.placement import Placement
from hvd_hetero.comm.communicator import hvd
from hvd_hetero.comm.kv_store import job_env
from hvd_hetero.config.load import device_classes, load
from hvd_hetero.training import dry_run, startup, trainer
from hvd_hetero.training.watchdog import Watchdog
from hvd_hetero.worker.components import UserObjects

CLASSES = {"fast": {"device": "cpu", "ranks": [0]}, "slow": {"device": "cpu", "ranks": [1]}}
SETTINGS: dict[str, Any] = {
    "cluster.classes": CLASSES, "train.epochs": 2, "train.batch_size": 4, "train.tau": {"fast": 4, "slow": 2},
    "train.lr": 0.1, "train.loss_args": {}, "train.optimizer_args": {}, "run.trace_rounds": 0,
    "checkpoint.every_sec": None, "profile.seconds": 0.1, "profile.reuse": False,
}  # fmt: skip
SYNC, EAGER = {"algorithm.name": "sync_sgd"}, {"algorithm.name": "eager_sgd"}
BYTEPS = {"algorithm.name": "byteps", "algorithm.participants": "slow"}


class Averaging(torch.optim.Optimizer):
    """Plain SGD on z; evaluated is x, the mean of all z; gradients are taken at y, between the two.

    The parameters are y in training mode, x in evaluation mode, as in "The Road Less Scheduled" (Defazio et al., 2024).
    """

    def __init__(self, params: Any, lr: float, between: float) -> None:
        super().__init__(params, {"lr": lr, "steps": 0, "trains": False})
        self.between, self.modes = between, list[str]()

    def _toward_z(self, trains: bool, weight: float) -> None:
        self.modes.append("train" if trains else "eval")
        for group in self.param_groups:
            for p in group["params"] if group["trains"] != trains else ():
                if "z" in self.state[p]:
                    p.data.lerp_(self.state[p]["z"], weight)
            group["trains"] = trains

    def train(self) -> None:
        self._toward_z(True, 1 - self.between)

    def eval(self) -> None:
        self._toward_z(False, 1 - 1 / self.between)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert group["trains"]
            group["steps"] += 1
            share, lr = 1 / group["steps"], group["lr"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, share).sub_(p.grad, alpha=lr * (1 - self.between * (1 - share)))
                z.sub_(p.grad, alpha=lr)


class Frozen(nn.Module):
    """A frozen backbone in evaluation mode, with dropout that is to be active there, and a head that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).requires_grad_(False).eval()
        self.backbone[2].train()
        self.head, self.noted = nn.Linear(8, 3), list[tuple[bool, ...]]()

    def forward(self, x: Tensor) -> Tensor:
        self.noted.append((self.training, self.backbone[1].training, self.backbone[2].training))
        out: Tensor = self.head(self.backbone(x))
        return out


class Bag(nn.Module):
    """Gradients of the embedding are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8, sparse=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding((x * 4).long().clamp(-9, 9) + 10).mean(1))
        return out


class Twice(nn.Module):
    """A layer that is used twice, each time checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=False)
        out: Tensor = self.head(x)
        return out


def linear() -> nn.Module:
    return nn.Linear(8, 3)


def averaging(params: Any) -> Averaging:
    return Averaging(params, 0.1, between=0.8)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Callable[[Any], Any] | None]] = {
    "frozen": (Frozen, {}, None),
    "frozen, synchronous": (Frozen, SYNC, None),
    "evaluation mode": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 3)).eval(), {}, None),
    "modes": (linear, {}, averaging),
    "modes, states averaged": (linear, {"aggregation.optimizer_state": "average"}, averaging),
    "modes, synchronous": (linear, SYNC, averaging),
    "modes, eager": (linear, EAGER, averaging),
    "modes, byteps": (linear, BYTEPS, averaging),
    "sparse": (Bag, {"train.optimizer": "Adagrad"}, None),
    "sparse, eager": (Bag, {**EAGER, "train.optimizer": "Adam", "train.clip_norm": 1.0}, None),
    "sparse, byteps": (Bag, {**BYTEPS, "train.optimizer": "Adam"}, None),
    "Adagrad, measured": (linear, {"train.optimizer": "Adagrad", "train.tau": 4}, None),
    "checkpointed, synchronous": (Twice, SYNC, None),
}


def data(seed: int) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
    return inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()


def run(name: str, folder: Path) -> dict[str, Any]:
    model, settings, optimizer = CASES[name]
    env = job_env()
    config = load((), SETTINGS | settings, algorithms.method)
    parts = dry_run.build(config, UserObjects(model, data(0), data(1), optimizer=optimizer))
    facts = [RankFacts(rank, "localhost", rank, (), "cpu", (0,)) for rank in range(env.size)]
    cluster = assign(device_classes(config.cluster.classes), facts)
    startup.check(config, parts, cluster)
    this = trainer.Trainer(startup.Job(env, config, parts, cluster, Placement("cpu", 1, None), Watchdog(env)), folder)
    this.prepare()
    summary = this.run()
    this.algorithm.close()
    this.job.watchdog.stop()
    trained = this.worker.model
    return {"model": {k: v.clone() for k, v in trained.state_dict().items()}, "summary": summary,
            "modes": [m.training for m in trained.modules()], "noted": getattr(trained, "noted", None),
            "of_optimizer": getattr(this.worker.optimizer, "modes", None)}  # fmt: skip


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    hvd.init()
    found = {name: run(name, folder / f"run{i}") for i, name in enumerate(CASES)}
    torch.save(found, folder / f"rank{job_env().rank}.pt")
    hvd.barrier()
    hvd.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
