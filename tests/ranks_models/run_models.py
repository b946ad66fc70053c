"""Both ranks of a job run this: ``run_models.py FOLDER [NAME...]`` trains each case in one go, and stopped and resumed.

It writes ``FOLDER/rank{N}.pt``: by case what the rank's model came to in both runs, or the error that ended it.
"""

from __future__ import annotations

import copy
import os
import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from models import CASES, Case

from hvd_hetero import algorithms
from hvd_hetero.cluster.device_classes import assign
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.cluster.placement import Placement
from hvd_hetero.comm.communicator import hvd
from hvd_hetero.comm.kv_store import TRIED, JobEnv, job_env
from hvd_hetero.config.load import device_classes, load
from hvd_hetero.errors import Stopped
from hvd_hetero.training import dry_run, startup, trainer
from hvd_hetero.training.resume import find
from hvd_hetero.training.stop_request import StopRequest
from hvd_hetero.training.watchdog import Watchdog
from hvd_hetero.worker.components import UserObjects

SETTINGS: Mapping[str, Any] = {
    "cluster.classes": {"fast": {"ranks": [0]}, "slow": {"ranks": [1]}}, "train.tau": {"fast": 3, "slow": 1},
    "train.batch_size": 4, "train.epochs": 3, "train.lr": 0.05, "train.loss_args": {}, "train.optimizer_args": {},
    "eval.every_epochs": 2, "run.resume": "auto", "checkpoint.keep": 1,
}  # fmt: skip
FIRST_PIECE: Mapping[str, Any] = {"checkpoint.every_rounds": 1}
"""Ranks meet after each round, so that one can be asked to stop."""


class Stops:
    """Whether the run is asked to stop at the end of its first segment."""

    asked = False


def run(case: Case, env: JobEnv, folder: Path, in_pieces: bool) -> dict[str, Any]:
    facts = [RankFacts(rank, "localhost", rank, (), "cpu", (0,)) for rank in range(env.size)]
    Stops.asked, found = in_pieces, None
    while True:
        settings = {**SETTINGS, **(FIRST_PIECE if Stops.asked else {}), **case.settings, "run.dir": str(folder)}
        config = load((), settings, algorithms.method)
        cluster = assign(device_classes(config.cluster.classes), facts)
        torch.manual_seed(env.rank)  # rank 0's model is where all start
        train, test = case.data()
        given = UserObjects(model=case.model(), train_data=train, test_data=test,
                            **copy.deepcopy(dict(case.given)))
        parts = dry_run.build(config, given)
        os.environ[TRIED] = "1"
        this = trainer.Trainer(
            startup.Job(env, config, parts, cluster, Placement("cpu", 1, None), Watchdog(env)), folder, found
        )
        try:
            this.prepare()
            summary = this.run()
        except Stopped:
            Stops.asked = False
            found = find(folder, config, env.size) if env.rank == 0 else None
            if not hvd.broadcast(torch.tensor(float(found is not None)), 0, name="found"):
                raise RuntimeError("there is no checkpoint to resume from") from None
            continue
        finally:
            this.algorithm.close()
            this.job.watchdog.stop()
        model = this.worker.model
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        extra = {name: value for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor)}
        loss = None if summary is None else summary["eval"]["final_loss"]
        return {"state": {name: t.detach().clone() for name, t in state.items()}, "extra": extra, "loss": loss}


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    env = job_env()
    StopRequest.__call__ = lambda self: env.rank == 0 and Stops.asked  # type: ignore[method-assign]
    hvd.init()
    found: dict[str, Any] = {}
    for number, name in enumerate(names or CASES):
        try:
            os.environ.pop(TRIED, None)  # the first piece alone is tried out: the run in one go shows what that left
            pieces = run(CASES[name], env, folder / f"pieces{number}", in_pieces=True)
            whole = run(CASES[name], env, folder / f"whole{number}", in_pieces=False)
            runs = {"whole": whole, "pieces": pieces}
        except Exception as error:
            runs = {"error": "".join(traceback.format_exception(error))}
        found[name] = runs
        if hvd.allreduce(torch.tensor(float("error" in runs)), op=hvd.Max, name=f"case.{number}"):
            found[name].setdefault("error", "the other rank has failed")
    torch.save(found, folder / f"rank{env.rank}.pt")
    hvd.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
