"""What rank 0 writes of a run besides its rows: how it starts, its trace, its summary."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvd_hetero.checkpoint.export import FOLDER, save_model
from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.horovod_build import build_info
from hvd_hetero.config.schema import Config
from hvd_hetero.log import LOGGER
from hvd_hetero.planning.plan import Plan, round_way
from hvd_hetero.telemetry.environment import environment
from hvd_hetero.telemetry.run_folder import SUMMARY, RunFolder, say_missing
from hvd_hetero.telemetry.tables import closing_table
from hvd_hetero.telemetry.time_accounts import Accounts
from hvd_hetero.telemetry.trace import TRACE, Recorder, from_numbers, timeline, to_chrome

RESHAPED = """reshaped: model, outer optimizer, loss table and counters are carried over; optimizer states, what a \
loop keeps, random numbers, measured speeds and what was done of an epoch are not"""
RESHAPED_RANKS = "reshaped: {} of {} ranks were there before, and keep their optimizers' states"


def say_resumed(place: str, over: bool) -> None:
    """Tells where a run goes on, and if it does not because it has come to its end already."""
    LOGGER.info("resumed after %s", place)
    if over:
        LOGGER.info("there the run has ended: for more, raise its limits (train.epochs, train.max_*)")


def write_start(folder: RunFolder, config: Config, cluster: Cluster, plan: Plan) -> None:
    """What is going to be done, where, and by what; the classes also on standard output."""
    folder.write("config.yaml", config.to_yaml())
    folder.write("environment.json", environment(cluster, build_info()))
    folder.write("plan.json", plan.to_dict())
    for c in plan.classes:
        step = "" if c.step_sec is None else f", {1e3 * c.step_sec:.3g} ms a step"
        work = f"tau {c.tau}, batch {c.batch_size}, weight {c.weight:.4f}{step}" if c.tau else c.role
        slowdown = cluster.class_of(c.ranks[0]).slowdown
        name = c.name + (f" (x{slowdown:g} emulated)" if slowdown > 1 else "")
        LOGGER.info("class %s: ranks %s, %s", name, list(c.ranks), work)
    for item in cluster.helpers:
        LOGGER.info("class %s: ranks %s, role %s, trains nothing", item.name, list(item.ranks), item.role)


def write_trace(
    folder: RunFolder | None, comm: Comm, cluster: Cluster, recorder: Recorder, name: str = TRACE
) -> None:
    """Every rank's recorded spans, into a file of this name; all ranks call it."""
    numbers = torch.tensor(recorder.to_numbers(), dtype=torch.float64)
    sizes = [int(size) for size in comm.gather(torch.tensor([len(numbers)]), "trace.sizes")]
    gathered = comm.gather(numbers, "trace", sizes)
    if folder is not None and any(sizes):
        spans = timeline([from_numbers(part.tolist()) for part in gathered])
        classes = [cluster.class_of(rank) for rank in range(comm.size)]
        slower = [f", x{c.slowdown:g} emulated" if c.slowdown > 1 else "" for c in classes]
        lanes = [f"rank {rank}, {c.name} ({c.device}{slower[rank]})" for rank, c in enumerate(classes)]
        folder.write(name, json.dumps(to_chrome(spans, lanes)))


def write_summary(
    folder: RunFolder,
    config: Config,
    cluster: Cluster,
    plan: Plan,
    classes: list[dict[str, Any]],
    accounts: Accounts,
    path: str,
    evaluated: Mapping[str, Any],
    begin: float,
) -> dict[str, Any]:
    """The figures of the whole run, see docs/results.md; the folder is done with then."""
    summary = {
        "algorithm": config.algorithm.name,
        "world_size": cluster.size,
        "seed": config.run.seed,
        "emulated": bool(accounts.emulation),
        "emulation": list(accounts.emulation),
        "rounds": accounts.rounds,
        "epochs": accounts.epochs,
        "samples_seen": accounts.samples_seen,
        "wall_sec": time.perf_counter() - begin,
        "train_sec": accounts.train_sec,
        "path": path,
        "round_way": round_way(plan, str(config.aggregation.weights), config.aggregation.max_extrapolation),
        "eval": dict(evaluated),
        "classes": classes,
    }
    if cluster.helpers:
        summary["helpers"] = [
            {"name": c.name, "device": c.device, "ranks": list(c.ranks), "role": c.role} for c in cluster.helpers
        ]
    if accounts.partial.ranks:
        summary["partial"] = accounts.partial.to_dict()
    folder.write(SUMMARY, summary)
    folder.close()
    return summary


def write_model(folder: RunFolder | None, model: nn.Module, name: str) -> Path | None:
    """Save the model for other programs, on rank 0; return where it is, if it is."""
    if folder is None:
        return None
    try:
        return save_model(folder.path, model, name)
    except Exception as error:  # whatever a model's own state_dict or the disk may raise: the figures come next
        say_missing(folder.path / FOLDER / name, error)
        return None


def say_end(summary: Mapping[str, Any], saved: Path | None) -> None:
    """Tell what a run came to, and where its weights are."""
    LOGGER.info("%s", closing_table(summary))
    if saved is not None:
        LOGGER.info("saved: %s", saved)
