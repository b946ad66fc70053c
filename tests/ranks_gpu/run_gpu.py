"""Every rank of a job runs this: ``run_gpu.py FOLDER DEVICE GROUP...`` trains the cases of these groups.

A group is one of ``cases.GROUPS``, or ``kinds``. DEVICE is cuda, or cpu to try this out: a part of the cases then.

It writes ``FOLDER/rank{N}.pt`` after each case: by case the rank's final model and what else is to be looked at, or the
error that ended it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

from ranks_gpu.cases import GROUPS, SIZE, settings_of  # noqa: E402
from ranks_gpu.kinds import KINDS, SETTINGS, SMALL, Kind  # noqa: E402
from ranks_methods.problem import data, model  # noqa: E402
from ranks_methods.run_cases import RecordedFeed  # noqa: E402

from hvd_hetero import algorithms  # noqa: E402
from hvd_hetero.cluster.device_classes import assign  # noqa: E402
from hvd_hetero.cluster.hardware import RankFacts  # noqa: E402
from hvd_hetero.cluster.placement import Placement  # noqa: E402
from hvd_hetero.comm.communicator import hvd  # noqa: E402
from hvd_hetero.comm.kv_store import JobEnv, job_env  # noqa: E402
from hvd_hetero.config.load import device_classes, load  # noqa: E402
from hvd_hetero.errors import Stopped  # noqa: E402
from hvd_hetero.training import startup, trainer, trainer_parts  # noqa: E402
from hvd_hetero.training.resume import find  # noqa: E402
from hvd_hetero.training.stop_request import StopRequest  # noqa: E402
from hvd_hetero.training.watchdog import Watchdog  # noqa: E402
from hvd_hetero.worker import components  # noqa: E402
from hvd_hetero.worker.components import UserObjects  # noqa: E402


class Stops:
    """Whether the run is asked to stop at the end of its first segment."""

    asked = False


def train(settings: Mapping[str, Any], objects: UserObjects | None, env: JobEnv, folder: Path) -> dict[str, Any]:
    """Trains; one that is stopped is resumed by a new trainer."""
    config = load((), {**settings, "run.dir": str(folder)}, algorithms.method)
    facts = [RankFacts(rank, "localhost", rank, ("a GPU",), "cpu", (0,)) for rank in range(env.size)]
    cluster = assign(device_classes(config.cluster.classes), facts, share_gpus=True)
    on_gpu = cluster.class_of(env.rank).device == "cuda"
    found, graphs = None, list[Mapping[str, int]]()
    while True:
        parts = components.build(config, objects)
        startup.check(config, parts, cluster)
        place = Placement("cuda:0" if on_gpu else "cpu", 1, None)
        RecordedFeed.dealt = []
        this = trainer.Trainer(startup.Job(env, config, parts, cluster, place, Watchdog(env)), folder, found)
        this._end_epoch = after(this._end_epoch, lambda: graphs.append(compiled()))  # type: ignore[method-assign]
        try:
            this.prepare()
            graphs.append(compiled())
            summary = this.run()
        except Stopped:
            Stops.asked = False
            found = find(folder, config, env.size) if env.rank == 0 else None
            continue
        finally:
            this.algorithm.close()
            this.job.watchdog.stop()
        tensors = dict(this.worker.model.named_parameters()) | dict(this.worker.model.named_buffers())
        return {"model": {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()},
                "dealt": RecordedFeed.dealt, "summary": summary, "excluded": this.comm.excluded.count,
                "graphs": graphs, "is_compiled": this.worker._compiled is not None}


def after(call: Any, then: Any) -> Any:
    def both(*args: Any) -> Any:
        result = call(*args)
        then()
        return result

    return both


def compiled() -> dict[str, int]:
    """How many graphs torch.compile has made in this process, and where it had to break them."""
    from torch._dynamo.utils import counters

    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}


def run_case(name: str, group: str, device: str, env: JobEnv, folder: Path) -> dict[str, Any]:
    case = GROUPS[group].cases[name]
    inputs, targets = data(case.poisoned)
    made = UserObjects(model=lambda: model(case.model).float(), train_data=(inputs.float(), targets),
                 test_data=(data()[0].float(), targets))  # fmt: skip
    return train(settings_of(name, GROUPS[group], device), None if case.model == "digits" else made, env, folder)


def run_kind(kind: Kind, device: str, env: JobEnv, folder: Path) -> dict[str, Any]:
    classes = {name: {"device": device if ranks[0] in kind.gpus else "cpu", "ranks": ranks}
               for name, ranks in (("fast", [0]), ("slow", [1, 2]))}  # fmt: skip
    settings = {**SETTINGS, **kind.settings, "cluster.classes": classes}

    def once(in_pieces: bool) -> dict[str, Any]:
        Stops.asked = in_pieces
        torch.manual_seed(3)
        objects = UserObjects(model=kind.model(device), train_data=kind.data(0), test_data=kind.data(1), **kind.given)
        return train(settings, objects, env, folder / ("pieces" if in_pieces else "whole"))

    if settings.get("train.compile"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    whole = once(False)
    return {**whole, "pieces": once(True)["model"]} if kind.resumed else whole


def main(folder: Path, device: str, groups: list[str]) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    startup.set_precision("highest")
    env = job_env()
    if device == "cuda":
        torch.cuda.set_device(0)
    trainer_parts.Feed = RecordedFeed  # type: ignore[misc]
    StopRequest.__call__ = lambda self: env.rank == 0 and Stops.asked  # type: ignore[method-assign]
    # the leaders of two classes, and the second class
    hvd.init(process_sets=[hvd.ProcessSet([0, 1]), hvd.ProcessSet([1, 2])])
    assert env.size == SIZE
    found: dict[str, Any] = {}
    todo = [(group, name) for group in groups if group != "kinds" for name in GROUPS[group].chosen(device)]
    todo += [("kinds", name) for name in (KINDS if device == "cuda" else SMALL)] if "kinds" in groups else []
    for number, (group, name) in enumerate(todo):
        print(f"rank {env.rank}: {group}: {name}", flush=True)
        where = folder / f"run{number}"
        try:
            found[name] = (run_kind(KINDS[name], device, env, where) if group == "kinds" else
                           run_case(name, group, device, env, where))  # fmt: skip
        except Exception as error:
            found[name] = {"error": "".join(traceback.format_exception(error))}
        torch.save(found, folder / f"rank{env.rank}.pt")
        if hvd.allreduce(torch.tensor(float("error" in found[name])), op=hvd.Max, name=f"case.{number}"):
            found[name].setdefault("error", "another rank has failed")
            torch.save(found, folder / f"rank{env.rank}.pt")
    hvd.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
