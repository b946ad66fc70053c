"""Every rank of a job runs this: ``resume_cases.py FOLDER CASE...`` trains each twice, in one go and in pieces.

In pieces means that the run is asked to stop after every third round, saves, and is taken up by a new trainer, until
it is through. It writes ``FOLDER/rank{N}.pt``: by case the number of stops, and of both runs the rank's final model
and, on rank 0, the table of losses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from ranks_methods.cases import RESUMED  # noqa: E402
from ranks_methods.problem import CLASSES, Case, data, model, pairs  # noqa: E402

from hvd_hetero import algorithms  # noqa: E402
from hvd_hetero.cluster.device_classes import assign  # noqa: E402
from hvd_hetero.cluster.hardware import RankFacts  # noqa: E402
from hvd_hetero.cluster.placement import Placement  # noqa: E402
from hvd_hetero.comm.communicator import hvd  # noqa: E402
from hvd_hetero.comm.kv_store import JobEnv, job_env  # noqa: E402
from hvd_hetero.config.load import device_classes, load  # noqa: E402
from hvd_hetero.errors import Stopped  # noqa: E402
from hvd_hetero.training import startup, trainer  # noqa: E402
from hvd_hetero.training.checkpointer import Saver  # noqa: E402
from hvd_hetero.training.resume import find  # noqa: E402
from hvd_hetero.training.stop_request import StopRequest  # noqa: E402
from hvd_hetero.training.watchdog import Watchdog  # noqa: E402
from hvd_hetero.worker import components  # noqa: E402
from hvd_hetero.worker.components import UserObjects  # noqa: E402
from hvd_hetero.worker.epoch import Progress  # noqa: E402

OFTEN = 3
"""Rounds."""


class Stops:
    """Whether a run is in pieces, and whether rank 0 is asked to stop when all ranks meet next."""

    in_pieces = asked = False


def run(case: Case, env: JobEnv, folder: Path, in_pieces: bool) -> tuple[int, dict[str, Any]]:
    stops, found = 0, None
    Stops.in_pieces = in_pieces
    settings = {"run.dir": str(folder), "run.resume": "auto", "checkpoint.every_rounds": OFTEN}
    config = load((), {**case.overrides(), **settings}, algorithms.method)
    facts = [RankFacts(rank, "localhost", rank, (), "cpu", (0,)) for rank in range(env.size)]
    cluster = assign(device_classes(config.cluster.classes), facts)
    while True:
        given = UserObjects(model=lambda: model(case.model), train_data=data(), test_data=data())
        parts = components.build(config, given)
        job = startup.Job(env, config, parts, cluster, Placement("cpu", 1, None), Watchdog(env))
        this = trainer.Trainer(job, folder, found)
        Stops.asked = False
        try:
            this.prepare()
            this.run()
        except Stopped:
            stops += 1
            found = find(folder, config, env.size) if env.rank == 0 else None
            continue
        finally:
            this.algorithm.close()
            this.job.watchdog.stop()
        losses = None if this.feed.sampler is None else torch.from_numpy(this.feed.sampler.losses)
        return stops, {"model": this.worker.model.state_dict(), "losses": losses}


def main(folder: Path, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    env = job_env()
    meet = Saver.agree

    def agree(self: Any, progress: Progress, length: int, rounds: int, *args: Any) -> Any:
        Stops.asked = Stops.in_pieces and (rounds + progress.averages) % OFTEN == 0
        return meet(self, progress, length, rounds, *args)

    Saver.agree = agree  # type: ignore[method-assign]
    StopRequest.__call__ = lambda self: env.rank == 0 and Stops.asked  # type: ignore[method-assign]
    groups = {tuple(ranks) for classes in CLASSES.values() for ranks in classes.values()}
    groups |= {tuple(ranks[0] for ranks in classes.values()) for classes in CLASSES.values()}
    groups |= set(pairs(env.size))
    sets = [hvd.ProcessSet(list(ranks)) for ranks in sorted(groups) if 1 < len(ranks) < env.size]
    hvd.init(process_sets=sets)
    found = {}
    for i, name in enumerate(names):
        _, whole = run(RESUMED[name], env, folder / f"whole{i}", in_pieces=False)
        stops, pieces = run(RESUMED[name], env, folder / f"pieces{i}", in_pieces=True)
        found[name] = {"stops": stops, "whole": whole, "pieces": pieces}
    torch.save(found, folder / f"rank{env.rank}.pt")
    hvd.barrier()
    hvd.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
