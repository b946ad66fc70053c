"""Every rank of a job runs this: ``run_cases.py FOLDER`` trains each of the cases with the real trainer.

``run_cases.py FOLDER poisoned`` takes those of ``poisoned.POISONED`` that are for the job's number of ranks. A further
word ``slow``: those too that others stand for.

It writes ``FOLDER/rank{N}.pt``: by case the rank's final model, the indices it was dealt in each epoch, and on rank 0
the summary and the laps of all ranks, where they are traced.
All process sets are made by the first ``hvd.init``, and each run's ``Comm`` finds its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from ranks_methods.cases import CASES, CASES_SLOW  # noqa: E402
from ranks_methods.poisoned import POISONED, POISONED_SLOW  # noqa: E402
from ranks_methods.problem import CLASSES, Case, chosen, data, model, pairs  # noqa: E402

from hvd_hetero import algorithms  # noqa: E402
from hvd_hetero.cluster.device_classes import assign  # noqa: E402
from hvd_hetero.cluster.hardware import RankFacts  # noqa: E402
from hvd_hetero.cluster.placement import Placement  # noqa: E402
from hvd_hetero.comm.communicator import hvd  # noqa: E402
from hvd_hetero.comm.kv_store import JobEnv, job_env  # noqa: E402
from hvd_hetero.config.load import device_classes, load  # noqa: E402
from hvd_hetero.telemetry.trace import TRACE, from_chrome  # noqa: E402
from hvd_hetero.training import startup, trainer, trainer_parts  # noqa: E402
from hvd_hetero.training.watchdog import Watchdog  # noqa: E402
from hvd_hetero.worker import components, loss_scaler  # noqa: E402
from hvd_hetero.worker.components import UserObjects  # noqa: E402
from hvd_hetero.worker.index_feed import Feed  # noqa: E402


class RecordedFeed(Feed):
    """Remembers what it dealt, or what was taken of what it handed out."""

    dealt: list[torch.Tensor] = []
    deals_all = False

    def deal(self, plan: Any, full: Any) -> Any:
        rows = super().deal(plan, full)
        RecordedFeed.dealt.append(torch.from_numpy(rows.copy()).long())
        return rows

    def deal_all(self, plan: Any) -> Any:
        self.deals_all = True
        return super().deal_all(plan)

    def collect(self, indices: Any, *results: Any) -> None:
        if self.deals_all:
            RecordedFeed.dealt.append(torch.from_numpy(indices.copy()).long())
        super().collect(indices, *results)


def run(case: Case, env: JobEnv, folder: Path) -> dict[str, Any]:
    config = load((), case.overrides(), algorithms.method)
    given = UserObjects(model=lambda: model(case.model), train_data=data(case.poisoned), test_data=data())
    parts = components.build(config, None if case.model == "digits" else given)
    facts = [RankFacts(rank, "localhost", rank, (), "cpu", (0,)) for rank in range(env.size)]
    cluster = assign(device_classes(config.cluster.classes), facts)
    startup.check(config, parts, cluster)
    RecordedFeed.dealt = []
    half = case.half and env.rank % 2  # as if it were on a GPU without bfloat16
    startup.autocast_type = lambda wanted, device: torch.float16 if half else None  # type: ignore[assignment]
    loss_scaler.START = 2.0**30
    this = trainer.Trainer(startup.Job(env, config, parts, cluster, Placement("cpu", 1, None), Watchdog(env)), folder)
    this.prepare()
    summary = this.run()
    this.algorithm.close()
    this.job.watchdog.stop()
    written = (folder / TRACE).read_text() if env.rank == 0 and config.run.trace_rounds else None
    trace = from_chrome(json.loads(written))[0] if written else []
    return {"model": this.worker.model.state_dict(), "dealt": RecordedFeed.dealt, "summary": summary,
            "excluded": this.comm.excluded.count, "trace": trace}


def main(folder: Path, poisoned: bool, slow: bool) -> None:
    torch.set_num_threads(1)
    env = job_env()
    trainer_parts.Feed = RecordedFeed  # type: ignore[misc]
    cases = chosen(CASES, CASES_SLOW, slow) if not poisoned else {
        name: case for name, case in chosen(POISONED, POISONED_SLOW, slow).items()
        if sum(map(len, CLASSES[case.classes].values())) == env.size
    }  # fmt: skip
    groups = {tuple(ranks) for classes in CLASSES.values() for ranks in classes.values()}
    groups |= {tuple(ranks[0] for ranks in classes.values()) for classes in CLASSES.values()}
    groups |= set(pairs(env.size))
    groups = {ranks for ranks in groups if 1 < len(ranks) < env.size and max(ranks) < env.size}
    sets = [hvd.ProcessSet(list(ranks)) for ranks in sorted(groups)]
    hvd.init(process_sets=sets)
    found = {name: run(case, env, folder / f"run{i}") for i, (name, case) in enumerate(cases.items())}
    torch.save(found, folder / f"rank{env.rank}.pt")
    hvd.barrier()
    hvd.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), poisoned="poisoned" in sys.argv[2:], slow="slow" in sys.argv[2:])
