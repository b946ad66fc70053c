"""What a run may be resumed from: its newest sound checkpoint, if it is of the same run."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hvd_hetero.checkpoint import Checkpoint, CheckpointError, Meta, Store
from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.config.renamed import pairs_renamed
from hvd_hetero.config.schema import AUTO, NUMBERS, RESHAPE, Config
from hvd_hetero.data import Source, alike
from hvd_hetero.errors import ConfigError, UserError
from hvd_hetero.planning.plan import Plan
from hvd_hetero.telemetry.run_folder import EVALUATIONS, METRICS
from hvd_hetero.training.fingerprint import plain, sources
from hvd_hetero.worker.worker import Worker

REMEDY = f"or set run.resume={RESHAPE}"
OF_CLASSES = {"train.tau", "train.batch_size"}
"""Settings that may name classes, and so change with the hosts."""


@dataclass(frozen=True)
class Found:
    """A checkpoint to resume from.

    Attributes:
        round: of the checkpoint.
        state: rank 0's.
        reshaped: it is of other settings or ranks, and is taken all the same.
        restores_ranks: of other ranks at most: each that stays goes on from its own state.
    """

    round: int
    state: Any
    reshaped: bool = False
    restores_ranks: bool = True


def find(run_dir: Path, config: Config, world_size: int | None) -> Found | None:
    """Return the newest checkpoint of a run, an older one where it is damaged, None where there is none.

    Args:
        world_size: ranks that train; None: how many these are is not known yet.

    Raises:
        UserError: there are checkpoints, but none that this run can be resumed from.
    """
    damaged: list[CheckpointError] = []
    for candidate in Store(run_dir).candidates():
        checkpoint = candidate.checkpoint
        if checkpoint is None:
            damaged += [] if candidate.unfinished or candidate.error is None else [candidate.error]
            continue
        other = difference(checkpoint, config, world_size)
        if other is not None and config.run.resume != RESHAPE:
            raise other
        try:
            checkpoint.verify()
            state = load_leads(checkpoint)
            if "rank0" not in state:
                state["rank0"] = _earlier_rank0(run_dir, candidate.round, state["accounts"]["epochs"])
        except CheckpointError as error:
            damaged.append(error)
            continue
        for text in [*map(str, damaged), *changed_sources(checkpoint.meta, config)]:
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        restores_ranks = changed_settings(checkpoint.meta, config).keys() <= OF_CLASSES
        return Found(candidate.round, state, other is not None, restores_ranks)
    if damaged:
        raise damaged[0]
    return None


def load_leads(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the state of a checkpoint's first rank, with the model of one that trained: the first may not have.

    Raises:
        CheckpointError: a part of it cannot be read.
    """
    ranks = checkpoint.meta.ranks
    state: dict[str, Any] = checkpoint.load(ranks[0])
    trained = [rank for c in Plan.from_dict(state["plan"]).training for rank in c.ranks if rank in ranks]
    if trained and min(trained) != ranks[0]:
        state["worker"] = checkpoint.load(min(trained))["worker"]
    return state


def _earlier_rank0(run_dir: Path, number: int, epochs: int) -> dict[str, Any]:
    """What rank 0 alone keeps, where it was lost, from an older checkpoint: losses, averaged iterate; and its rows.

    Args:
        number: of the round that the run goes on from, after so many whole ``epochs``.

    Raises:
        CheckpointError: there is none that has it.
    """
    for candidate in Store(run_dir).candidates():
        if candidate.checkpoint is not None and 0 in candidate.checkpoint.meta.ranks:
            kept: dict[str, Any] = candidate.checkpoint.load(0)["rank0"]
            limits = (METRICS, "epoch", epochs), (EVALUATIONS, "round", number)
            return {**kept, "rows_bytes": [_bytes_until(run_dir / name, key, most) for name, key, most in limits]}
    raise CheckpointError(run_dir, "rank 0 was lost, and with it the losses of samples", "start anew")


def _bytes_until(path: Path, key: str, most: int) -> int:
    """Return the size of a file's rows before the first one with more under a key."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return sum(map(len, itertools.takewhile(lambda line: json.loads(line)[key] <= most, lines)))


def difference(checkpoint: Checkpoint, config: Config, world_size: int | None) -> UserError | None:
    """Say why a checkpoint is none of this run: by its ranks, or by a setting that decides the numbers.

    Returns:
        The error that names both values; None if there is no difference. Which rank is in which class is known later,
        see :func:`check_places`.
    """
    meta, path = checkpoint.meta, checkpoint.path
    if world_size is not None and meta.world_size != world_size:
        problem = f"was saved by {meta.world_size} ranks, and this job has {world_size}"
        return CheckpointError(path, problem, f"start {meta.world_size} ranks, {REMEDY}")
    if meta.lost:
        problem = f"was saved without the ranks {list(meta.lost)}, which had been lost"
        return CheckpointError(path, problem, f"set run.resume={RESHAPE}")
    changed = changed_settings(meta, config)
    if not changed:
        return None
    key, *more = sorted(changed, key=lambda key: key != "algorithm.name")  # from which others may follow
    before, value = changed[key]
    also = f" ({', '.join(more)} differ too)" if more else ""
    problem = f"the checkpoint of round {meta.round} was made with {before!r}{also}"
    return ConfigError(key, value, problem, f"give it the value that it had, {REMEDY}")


def changed_settings(meta: Meta, config: Config) -> dict[str, tuple[Any, Any]]:
    """Return the settings that decide the numbers and differ from a checkpoint's, with both values."""
    built_in, changed = plain(config.built_in()), {}
    made_with = dict(pairs_renamed(meta.made_with.items(), set()))
    for key, value in plain(config.settings(NUMBERS)).items():
        before = made_with.get(key, built_in[key])  # a key that was not there had the effect that it has built in
        if json.dumps(before, sort_keys=True) != json.dumps(value, sort_keys=True):
            changed[key] = before, value
    return changed


def changed_sources(meta: Meta, config: Config) -> list[str]:
    """Say which of the user's own files are not what they were when a checkpoint was made."""
    return [f"{what} has changed since the checkpoint of round {meta.round} was made: start anew, unless it does the "
            "same as before" for what, digest in sources(config).items() if meta.made_with.get(what, digest) != digest]


def check_data(found: Found, source: Source, weights: NDArray[Any] | None = None) -> None:
    """Refuse to resume with other training data, or other weights of them, than a checkpoint was made with.

    Raises:
        ConfigError: another number of samples, or other ones, as far as a look at some of them can tell.
    """
    saved, remedy = found.state["rank0"], "take the data that it was made with"
    known = len(saved["sampler"]["losses"])
    if known not in (0, len(source)):  # a stream has no losses
        problem = f"the checkpoint is of {known} training samples, and these are {len(source)}"
        raise ConfigError("run.resume", RESHAPE if found.reshaped else AUTO, problem, remedy)
    if saved["data"] is not None and not found.reshaped:
        what = alike.difference(saved["data"], alike.facts_of(source, weights))
        if what is not None:
            problem = f"the training data have other {what} than those that the checkpoint was made with"
            raise ConfigError("run.resume", AUTO, problem, f"{remedy}, {REMEDY}")


def check_fits(state: Any, worker: Worker) -> None:
    """Refuse to carry a checkpoint over to another model than it is of.

    Raises:
        ConfigError: it is.
    """
    saved, current = state["worker"]["model"], worker.state.state_dict()
    shapes = [[len(vector) for vector in one["vectors"]] for one in (saved, current)]
    known = current["others"]["tensors"]
    same = all(known[name].shape == t.shape for name, t in saved["others"]["tensors"].items() if name in known)
    if shapes[0] != shapes[1] or saved["layout"] != current["layout"] or not same:
        problem = "the checkpoint is of another model"
        remedy = "take the model that it was made with, and the same train.channels_last"
        raise ConfigError("run.resume", RESHAPE, problem, remedy)


def places(cluster: Cluster) -> list[list[Any]]:
    """Say which ranks are in which class, and on which kind of device, however the classes are chosen."""
    return [[c.name, c.device, list(c.ranks)] for c in cluster.classes]


def slots(cluster: Cluster) -> list[list[Any]]:
    """Say by rank on which host it is, and as which of those there."""
    return [[fact.host, fact.local_rank] for fact in cluster.facts]


def load_for(saved: Checkpoint, config: Config, cluster: Cluster, rank: int, restores_ranks: bool) -> dict[str, Any]:
    """Return what a rank goes on from, of a job with other ranks or settings.

    Args:
        restores_ranks: whether ranks that stay go on from their own states.

    Returns:
        The state of that job's first rank, with the model of one that trained; and ``own``, of the rank that was where
        this one is, or None; ``stayed``, how many ranks have one; ``gone``, on rank 0, the states of those that nobody
        has, with their classes; ``restores_ranks``; ``changed``, whether settings that decide the numbers
        are others now.

    Raises:
        CheckpointError: a part of it cannot be read.
    """
    state = load_leads(saved)
    stays = {new: old for new, old in staying(state, cluster).items() if restores_ranks and old not in saved.meta.lost}
    state["own"] = saved.load(stays[rank]) if rank in stays else None
    left = set(saved.meta.ranks).difference(stays.values()) if rank == 0 and restores_ranks else set()
    names = {other: name for name, _, ranks in state["classes"] for other in ranks}
    state["gone"] = [(names[other], saved.load(other)) for other in sorted(left)]
    changed = bool(changed_settings(saved.meta, config))
    return {**state, "stayed": len(stays), "restores_ranks": restores_ranks, "changed": changed}


def staying(state: Mapping[str, Any], cluster: Cluster) -> dict[int, int]:
    """Return the ranks of a job that are where there was one before, each with the number that it had then."""
    slots = dict(enumerate(state.get("slots", ())))
    before = {(*slots[rank], name, device): rank for name, device, ranks in state["classes"] for rank in ranks
              if rank in slots}  # fmt: skip
    now = {fact.rank: (fact.host, fact.local_rank, c.name, c.device) for fact in cluster.facts
           for c in [cluster.class_of(fact.rank)]}  # fmt: skip
    return {rank: before[where] for rank, where in now.items() if where in before}


def known_plan(state: Mapping[str, Any], cluster: Cluster) -> Plan | None:
    """Return the plan that a job had with the same ranks and settings; speeds need not be measured again then."""
    same = state["classes"] == places(cluster) and state.get("slots") == slots(cluster)
    return Plan.from_dict(state["plan"]) if state["restores_ranks"] and not state["changed"] and same else None


def check_places(state: Any, cluster: Cluster) -> None:
    """Refuse to resume with ranks in other classes than they were in, or on other devices; all ranks call it.

    Raises:
        ConfigError: they are.
    """
    if (before := state["classes"]) != (now := places(cluster)):
        problem = f"these are the ranks, and the checkpoint was made with {_named(before)}"
        raise ConfigError("cluster.classes", _named(now), problem, f"give them back, {REMEDY}")


def _named(classes: list[list[Any]]) -> dict[str, str]:
    return {name: f"{device} {ranks}" for name, device, ranks in classes}
