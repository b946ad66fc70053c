"""Runs of two ranks that train and one that helps, one after another; rank 0 tells in said.json what it has seen."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hvd_hetero
from hvd_hetero.comm import helper_channel
from hvd_hetero.comm.helper_channel import HelperServer
from hvd_hetero.training.stop_request import STOP
from hvd_hetero.worker.index_feed import Feed

CASE, FOLDER, RANK = sys.argv[1], Path(sys.argv[2]), int(os.environ["HOROVOD_RANK"])
X = torch.randn(240, 6, generator=torch.Generator().manual_seed(1))
Y = (X.sum(1) > 0).long()
COMMON: dict[str, Any] = {
    "cluster.classes": {"fast": {"ranks": [0]}, "slow": {"ranks": [1]}, "aide": {"ranks": [2], "role": "evaluate"}},
    "train.tau": {"fast": 6, "slow": 2}, "train.batch_size": 4, "train.epochs": 6, "train.loss_args": {},
    "checkpoint.every_sec": None, "checkpoint.every_rounds": 1, "checkpoint.keep": 1000, "run.trackers": [],
    "profile.reuse": False,
}  # fmt: skip
SCORES = {"cluster.classes": COMMON["cluster.classes"] | {"aide": {"ranks": [2], "role": "score"}}}


def model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


class Trained(hvd_hetero.Callback):
    """Writes down that an epoch is done, and may wait for what a helper has sent.

    The waiting is the test's: it makes sure that there is something to look at, however short a run is.
    """

    def __init__(self, name: str, waits: bool) -> None:
        self.name, self.waits, self.evaluated = name, waits, list[int]()

    def on_evaluation(self, row: dict[str, Any]) -> None:
        self.evaluated.append(row["round"])

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        (FOLDER / f"{self.name}.epoch{row['epoch']}").touch()
        if self.name == "stopped" and row["epoch"] == 3:
            (FOLDER / self.name / STOP).touch()
        seen = FOLDER / f"{self.name}.sent"
        until = time.monotonic() + 20
        while self.waits and not seen.exists() and time.monotonic() < until:
            time.sleep(0.01)
        seen.unlink(missing_ok=True)




def run(name: str, settings: dict[str, Any], waits: bool = False, **more: Any) -> dict[str, Any]:
    callback = Trained(name, waits)
    summary, status = None, 0
    try:
        summary = hvd_hetero.train(None, COMMON | {"run.dir": str(FOLDER / name)} | settings, model=model(),
                                   train_data=(X, Y), test_data=(X[:100], Y[:100]), callbacks=[callback], **more)
    except SystemExit as error:
        status = error.code
    (FOLDER / f"{name}.status{RANK}").write_text(str(status))
    return {"summary": summary, "evaluated": callback.evaluated}


class Watched(list[Any]):
    """Rows or scores as they come: a file says so."""

    name = ""

    def append(self, item: Any) -> None:
        super().append(item)
        (FOLDER / f"{self.name}.sent").touch()


def watched(name: str) -> None:
    """Let the server of the next run say when something has come."""
    Watched.name = name
    taken = HelperServer.drain

    def drain(self: HelperServer) -> Any:
        found = taken(self)
        self._rows, self._scores = Watched(self._rows), Watched(self._scores)
        return found

    HelperServer.drain = drain  # type: ignore[method-assign]


def until_trained(outputs: Tensor, targets: Tensor) -> Tensor:
    """A metric that a helper is not done with before the last epoch is trained."""
    if RANK == 2 and len(targets) > 2:  # not in the dry run, for which all would wait
        until = time.monotonic() + 60
        while not (FOLDER / "stuck.epoch6").exists() and time.monotonic() < until:
            time.sleep(0.01)
    return targets.float()


def scored() -> dict[str, Any]:
    """What a helper has scored, by epoch and round of its model, and what of it went into the table."""
    found: list[Any] = []
    collect = Feed.collect

    def look(self: Feed, indices: Any, at: Any, losses: Any, shapes: Any = None, scored: Any = ()) -> None:
        collect(self, indices, at, losses, shapes, scored)
        if self.sampler is not None:
            table = self.sampler.losses
            found.append([{"rounds": s.rounds, "indices": s.indices.tolist(), "losses": s.losses.tolist(),
                           "table": table[s.indices.numpy()].tolist()} for s in scored])  # fmt: skip

    Feed.collect = look  # type: ignore[method-assign]
    try:
        run("scored", SCORES | {"sampling.scheme": "separate"}, waits=True)
    finally:
        Feed.collect = collect  # type: ignore[method-assign]
    return {"epochs": found}


def annealed() -> list[float]:
    """The weight of this rank in each average of a run whose weights become uniform from its half on."""
    from hvd_hetero.algorithms.averaging import blocking

    weights, average = list[float](), blocking.average

    def look(comm: Any, state: Any, weight: float, *args: Any, **options: Any) -> bool:
        weights.append(weight)
        return average(comm, state, weight, *args, **options)

    blocking.average = look
    run("annealed", {"aggregation.anneal_from": 0.5, "checkpoint.every_rounds": None})
    blocking.average = average
    return weights


def main() -> None:
    output: dict[str, Any] = {}
    if CASE == "dies":
        if RANK == 2:
            from hvd_hetero.training.helper_rank import HelperRank

            HelperRank._evaluate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        run("dies", {"train.epochs": 100000, "checkpoint.every_rounds": None})
        return
    if CASE == "groups":
        classes = {"every": {"ranks": [0, 1, 2, 3]}, "aide": {"ranks": [4], "role": "evaluate"}}
        watched("groups")
        run("groups", {"cluster.classes": classes, "train.tau": 1, "algorithm.name": "wagma_sgd", "train.epochs": 2,
                       "checkpoint.every_rounds": None}, waits=True)  # fmt: skip
        return
    helper_channel.COPY_SHARE = 1e9  # whoever waits for a helper here must not wait for the next copy too
    watched("stopped")
    output["stopped"] = run("stopped", {}, waits=True)
    Watched.name = "resumed"
    output["resumed"] = run("resumed", {"run.dir": str(FOLDER / "stopped"), "run.resume": "auto"}, waits=True)
    output["stuck"] = run("stuck", {"checkpoint.every_rounds": None}, metrics={"until": until_trained})
    Watched.name = "scored"
    output["scored"] = scored()
    Watched.name = "served"
    served = {"algorithm.name": "asgd", "train.tau": 1, "checkpoint.every_rounds": None}
    output["served"] = run("served", served, waits=True)
    output["annealed"] = annealed()
    (FOLDER / f"annealed.weights{RANK}").write_text(json.dumps(output["annealed"]))
    if RANK == 0:
        (FOLDER / "said.json").write_text(json.dumps(output))


if __name__ == "__main__":
    main()
