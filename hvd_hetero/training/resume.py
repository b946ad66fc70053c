"""What a run may be resumed from: its newest sound checkpoint, if it is of the same run."""

from __future__ import annotations

import json
import warnings
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
from hvd_hetero.training.fingerprint import plain, sources
from hvd_hetero.worker.worker import Worker

REMEDY = f"or set run.resume={RESHAPE}"


@dataclass(frozen=True)
class Found:
    """A checkpoint to resume from.

    Attributes:
        round: of the checkpoint.
        state: rank 0's.
        reshaped: it is of other settings or ranks, and is taken all the same.
    """

    round: int
    state: Any
    reshaped: bool = False


def find(run_dir: Path, config: Config, world_size: int) -> Found | None:
    """Return the newest checkpoint of a run, an older one where it is damaged, None where there is none.

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
            state = checkpoint.load(0)
        except CheckpointError as error:
            damaged.append(error)
            continue
        for text in [*map(str, damaged), *changed_sources(checkpoint.meta, config)]:
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        return Found(candidate.round, state, other is not None)
    if damaged:
        raise damaged[0]
    return None


def difference(checkpoint: Checkpoint, config: Config, world_size: int) -> UserError | None:
    """Say why a checkpoint is none of this run: by its ranks, or by a setting that decides the numbers.

    Returns:
        The error that names both values; None if there is no difference. Which rank is in which class is known later,
        see :func:`check_places`.
    """
    meta, path = checkpoint.meta, checkpoint.path
    if meta.world_size != world_size:
        problem = f"was saved by {meta.world_size} ranks, and this job has {world_size}"
        return CheckpointError(path, problem, f"start {meta.world_size} ranks, {REMEDY}")
    built_in, changed = plain(config.built_in()), {}
    made_with = dict(pairs_renamed(meta.made_with.items(), set()))
    for key, value in plain(config.settings(NUMBERS)).items():
        before = made_with.get(key, built_in[key])  # a key that was not there had the effect that it has built in
        if json.dumps(before, sort_keys=True) != json.dumps(value, sort_keys=True):
            changed[key] = before, value
    if not changed:
        return None
    key, *more = sorted(changed, key=lambda key: key != "algorithm.name")  # from which others may follow
    before, value = changed[key]
    also = f" ({', '.join(more)} differ too)" if more else ""
    problem = f"the checkpoint of round {meta.round} was made with {before!r}{also}"
    return ConfigError(key, value, problem, f"give it the value that it had, {REMEDY}")


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
    saved, own = state["worker"]["model"], worker.state.state_dict()
    shapes = [[len(vector) for vector in one["vectors"]] for one in (saved, own)]
    known = own["others"]["tensors"]
    same = all(known[name].shape == t.shape for name, t in saved["others"]["tensors"].items() if name in known)
    if shapes[0] != shapes[1] or saved["layout"] != own["layout"] or not same:
        problem = "the checkpoint is of another model"
        remedy = "take the model that it was made with, and the same train.channels_last"
        raise ConfigError("run.resume", RESHAPE, problem, remedy)


def places(cluster: Cluster) -> list[list[Any]]:
    """Say which ranks are in which class, and on which kind of device, however the classes are chosen."""
    return [[c.name, c.device, list(c.ranks)] for c in cluster.classes]


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
