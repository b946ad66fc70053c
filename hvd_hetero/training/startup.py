"""Starting a job: what the ranks tell each other, which class each belongs to, and their connection."""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from hvd_hetero import algorithms
from hvd_hetero.cluster.device_classes import Cluster, assign
from hvd_hetero.cluster.hardware import RankFacts, autocast_type, local_facts
from hvd_hetero.cluster.placement import Placement, place
from hvd_hetero.comm.kv_store import JobEnv, exchange, job_env
from hvd_hetero.config.load import device_classes, per_class
from hvd_hetero.config.schema import AUTO, Config
from hvd_hetero.data.alike import check_alike, check_arrays, facts_of, facts_of_arrays
from hvd_hetero.errors import ConfigError, UserError
from hvd_hetero.files import restrict_umask
from hvd_hetero.planning.injected_delays import check_delays
from hvd_hetero.planning.plan import check_bias_to
from hvd_hetero.planning.schedules import check_schedule
from hvd_hetero.planning.stop_criteria import check_limits
from hvd_hetero.telemetry.stopwatch import Stopwatch
from hvd_hetero.training.fingerprint import check_same, fingerprint
from hvd_hetero.training.roles import check_roles
from hvd_hetero.training.watchdog import Watchdog
from hvd_hetero.worker.components import Components
from hvd_hetero.worker.own_attributes import arrays_of
from hvd_hetero.worker.worker import Worker

PREPARE_TIMEOUT_SEC = 1800.0
"""Reading a large dataset takes its time; a rank that dies meanwhile is ended by horovodrun much sooner."""


@dataclass(frozen=True)
class Job:
    """One rank's view of a job that is about to start; Horovod is not initialized yet.

    Attributes:
        data: what this rank has read, by split, see :func:`hvd_hetero.data.alike.facts_of`; nothing of a rank alone.
    """

    env: JobEnv
    config: Config
    components: Components
    cluster: Cluster
    placement: Placement
    watchdog: Watchdog
    data: Mapping[str, Any] = field(default_factory=dict)


def start(prepare: Callable[[], tuple[Config, Components]]) -> Job:
    """Prepares this rank, learns what the others found, and gives every rank its place.

    Args:
        prepare: reads the configuration and builds what is trained. What it finds wrong ends all ranks together.

    Raises:
        UserError: a rank could not prepare, ranks disagree, or the device classes do not fit the ranks. The same
            error on every rank.
    """
    restrict_umask()
    torch.set_num_threads(1)  # until this rank knows which cores are its own
    if not faulthandler.is_enabled():  # a rank that crashes in compiled code says where
        faulthandler.enable(file=sys.__stderr__ or 2)
    env = job_env()
    watchdog = Watchdog(env)
    try:
        return _start(env, watchdog, prepare)
    except BaseException:
        watchdog.stop()
        raise


def _start(env: JobEnv, watchdog: Watchdog, prepare: Callable[[], tuple[Config, Components]]) -> Job:
    if env.rank > 0:
        warnings.simplefilter("ignore")  # rank 0 has the same ones to say
    try:
        config, components = prepare()
    except UserError as error:
        _exchange(env, {"error": str(error)})
        raise
    data = components.dataset
    looked_at = {}
    if env.size > 1:
        looked_at = {"training": facts_of(data.train, components.weights), "test": facts_of(data.test)}
    gathered = _exchange(env, {
        "facts": local_facts(env.rank, env.host, env.local_rank).to_dict(),
        "fingerprint": fingerprint(config, components.model),
        "data": looked_at,
        "arrays": facts_of_arrays(arrays_of(components.model, components.loss)) if env.size > 1 else {},
    })
    watchdog.arm(config.run.watchdog_sec)
    facts = [RankFacts.from_dict(other["facts"]) for other in gathered]
    hosts = [fact.host for fact in facts]
    check_same([other["fingerprint"] for other in gathered], hosts)
    check_alike([other["data"] for other in gathered], hosts)
    check_arrays([other["arrays"] for other in gathered], hosts)
    classes = config.cluster.classes
    classes = classes if classes == AUTO else device_classes(classes)
    cluster = assign(classes, facts, config.cluster.share_gpus)
    check(config, components, cluster)
    for name in cluster.empty:
        warnings.warn(f"class {name} matches no rank and is left out", stacklevel=2)
    placement = place(cluster, env.rank, config.cluster.gpu_cores, config.cluster.affinity)
    if placement.cores is not None:
        os.sched_setaffinity(0, placement.cores)
    torch.set_num_threads(placement.threads)
    if placement.device != "cpu":
        torch.cuda.set_device(torch.device(placement.device))
        warnings.filterwarnings("default", "train.compile")  # what fails on a GPU may go well on rank 0
    return Job(env, config, components, cluster, placement, watchdog, gathered[env.rank]["data"])


W = TypeVar("W", bound=Worker)


def make_worker(job: Job, watch: Stopwatch, kind: type[W]) -> W:
    """This rank's worker, on its device."""
    config, components, mine = job.config, job.components, job.cluster.class_of(job.env.rank)
    cut = per_class("train.micro_batches", config.train.micro_batches, [c.name for c in job.cluster.classes], word=AUTO)
    set_precision(config.train.matmul_precision)
    return kind(
        components.model,
        components.loss,
        components.optimizer,
        components.scheduler,
        device=job.placement.device,
        slowdown=mine.slowdown,
        watch=watch,
        metrics=components.metrics,
        seed=config.run.seed * 1000003 + job.env.rank,
        clip_norm=config.train.clip_norm,
        autocast=autocast_type(config.train.autocast, job.placement.device),
        compile_mode=config.train.compile,
        channels_last=config.train.channels_last,
        state_policies=config.aggregation.state,
        micro_batches=cut.get(mine.name) or 1,
        min_batch=components.min_batch,
    )


def set_precision(precision: str) -> None:
    """How exactly float32 is multiplied, in matrices and in convolutions, which torch has two settings for."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"


def check(config: Config, components: Components, cluster: Cluster) -> None:
    """Finds what is wrong between the method's settings, the data and the device classes.

    Raises:
        ConfigError: naming the key.
    """
    check_roles(config, cluster)
    policy = algorithms.policy(config, cluster, len(components.dataset.train), components.min_batch)
    policy.check()
    if not policy.derives_tau:
        check_limits(config.train, policy.make_plan(None))
    elif config.train.tau != AUTO and (limit := config.train.max_fast_steps or math.inf) < config.train.tau:
        problem = f"one round takes {config.train.tau} steps of the fastest class"
        raise ConfigError("train.max_fast_steps", limit, problem, f"set it to {config.train.tau} or more")
    normalized = [name for name, part in components.model.named_modules()
                  if isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and part.training]  # fmt: skip
    if policy.needs_fixed_losses and normalized:
        key = "model.name" if config.model.target is None else "model.target"
        problem = f"{normalized[0]} is batch normalization, whose statistics {config.algorithm.name} would take twice"
        raise ConfigError(key, config.model.target or config.model.name, problem, "choose a model without, or a method")
    if policy.claims_samples and config.sampling.scheme != "uniform":
        problem = f"{config.algorithm.name} hands out samples as ranks ask for them, to no class in particular"
        raise ConfigError("sampling.scheme", config.sampling.scheme, problem, "set sampling.scheme=uniform")
    check_delays(config.delays)
    check_schedule(config.train)
    check_bias_to(config.sampling.bias_to, [c.name for c in cluster.classes])


def _exchange(env: JobEnv, content: dict[str, Any]) -> list[dict[str, Any]]:
    """Exchanges facts; a complaint of any rank becomes one error on all of them."""
    gathered = exchange(env, "start", content, PREPARE_TIMEOUT_SEC)
    errors: dict[str, list[int]] = {}
    for rank, other in enumerate(gathered):
        if "error" in other:
            errors.setdefault(str(other["error"]), []).append(rank)
    if errors:
        everywhere = len(next(iter(errors.values()))) == env.size
        lines = [text if everywhere else f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in errors.items()]
        raise UserError("\n".join(lines))
    return gathered
