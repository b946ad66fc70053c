"""How a job begins: how fast each device class is, measured or known from a profile, the first plan, the method."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hvd_hetero.algorithms.execution.base import Executor
from hvd_hetero.algorithms.policy import Policy
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.data import Source, read
from hvd_hetero.errors import ConfigError, Unquoted, UserError
from hvd_hetero.log import LOGGER
from hvd_hetero.planning.plan import Plan
from hvd_hetero.planning.speed_profile import known_speeds
from hvd_hetero.training.startup import Job
from hvd_hetero.worker.memory import micro_batches_that_fit
from hvd_hetero.worker.step_benchmark import Measurement
from hvd_hetero.worker.worker import Worker

OF_DEVICES = ("foreach", "fused", "capturable", "differentiable")
"""Options of optimizers that say how a step is computed, and not what."""
TRIED_STEPS = 2
"""Only with the second step is all there that an optimizer keeps."""


def measurement(job: Job, worker: Worker, source: Source, comm: Comm) -> Measurement:
    """What measures this job's speeds, before it trains."""
    spec = job.config.profile
    return Measurement(worker, source, job.cluster, comm, spec.seconds, spec.warmup_steps)


def first_plan(job: Job, policy: Policy, worker: Worker, source: Source, comm: Comm) -> Plan:
    """The plan that the job begins with, and the way that averages take; all ranks call it.

    Raises:
        ConfigError: the measured speeds allow no plan; the same on all ranks.
        RankError: this rank cannot take a step, while the others wait for it.
    """
    cluster = job.cluster
    choose_path(policy, measurement(job, worker, source, comm))
    if not policy.needs_speeds:
        return policy.make_plan(None)
    if len(cluster.classes) == 1 and not policy.needs_average_sec:
        return policy.make_plan({cluster.classes[0].name: 1.0}).without_step_times()
    known, measure = _known(job, comm), measurement(job, worker, source, comm)
    if known is not None:
        step_sec, policy.average_sec = known
    else:
        if comm.rank == 0:
            LOGGER.info("measuring how fast each class is, for %g s (profile.seconds)", measure.seconds)
        step_sec = {name: figures.step_sec for name, figures in measure.classes(policy.batch_size).items()}
        policy.average_sec = measure.average_sec() if policy.needs_average_sec else 0.0
    plan = policy.make_plan(step_sec)
    if policy.needs_average_sec and comm.rank == 0:
        LOGGER.info("train.tau=auto: %s", round_text(plan, policy.average_sec))
        if (hint := policy.few_rounds(plan)) is not None:
            LOGGER.info("train.tau=auto: %s", hint)
    return plan


def round_text(plan: Plan, average_sec: float) -> str:
    """Tell the taus of a plan, and what its rounds cost by measured times."""
    taus = ", ".join(f"{c.name} {c.tau}" for c in plan.classes)
    longest = max(c.tau * c.step_sec for c in plan.training if c.step_sec is not None)
    times = f"a round takes {1e3 * longest:.3g} ms and its average {1e3 * average_sec:.3g} ms"
    return f"local steps of a round: {taus}; {times}"


def choose_micro_batches(job: Job, policy: Policy, worker: Worker, source: Source, comm: Comm) -> None:
    """Cut batches as little as devices' memory allows, where that is to be tried out; all ranks call it.

    Raises:
        torch.OutOfMemoryError: the smallest micro-batches do not fit, while others wait for this rank.
    """
    mine, tried = job.cluster.class_of(comm.rank), [name for name, count in policy.micro_batches.items() if not count]
    size = policy.batch_size[mine.name]

    def steps(count: int) -> None:
        worker.micro_batches, restore = count, worker.snapshot()
        rows = np.arange(TRIED_STEPS * size).reshape(TRIED_STEPS, size) % len(source)
        try:
            worker.local_steps(read(source, rows, worker.generator), TRIED_STEPS)
        finally:
            restore()

    if not tried:
        return
    if mine.name in tried:
        micro_batches_that_fit(steps, max(1, size // worker.min_batch))
    counts = [int(count) for count in comm.gather(torch.tensor([worker.micro_batches]), "micro_batches")]
    worker.micro_batches = max(counts[rank] for rank in mine.ranks)
    worker.watch.drain()
    for c in job.cluster.classes:
        if c.name in tried:
            count = max(counts[rank] for rank in c.ranks)
            size = -(-policy.batch_size[c.name] // count)
            LOGGER.info("class %s: train.micro_batches=%s, of %s samples, as memory allows", c.name, count, size)


def choose_path(policy: Policy, measure: Measurement) -> None:
    """Lets averages take the faster way, where there are two and that is to be measured; all ranks call it."""
    comm = measure.comm
    if policy.has_blocking_average and len(comm.paths) > 1:
        found = measure.choose_path()
        if comm.rank == 0:
            times = ", ".join(f"{path} {1e3 * sec:.3g} ms" for path, sec in found.items())
            LOGGER.info("averages take the %s path, the faster one: %s", comm.path, times)


def share_model(worker: Worker, comm: Comm) -> None:
    """Gives all ranks rank 0's model, and makes an optimizer of it: some keep copies of what parameters began with."""
    comm.broadcast_state(worker.state)
    worker.make_optimizer()


def share_result(worker: Worker, comm: Comm, plan: Plan) -> None:
    """Give rank 0's model to ranks that took no steps, if there are any; all ranks call it."""
    if len(plan.training) < len(plan.classes):
        restore = worker.snapshot()
        comm.broadcast_state(worker.state)
        if plan.of_rank(comm.rank).tau:  # what each rank has for itself stays so
            restore()


def check_optimizers(optimizer: torch.optim.Optimizer, comm: Comm) -> None:
    """Refuses optimizers whose groups are not the same on all ranks, as settings have to be; all ranks call it.

    Raises:
        ConfigError: naming an option, and its value on rank 0 and on the first rank that has another.
    """
    own = [{"parameters": len(group["params"]), **_plain_options(group)} for group in optimizer.param_groups]
    first, *others = (json.loads(text) for text in comm.gather_text(json.dumps(own), "optimizer.groups"))
    for rank, groups in enumerate(others, 1):
        if len(groups) != len(first):
            raise _unlike("groups", len(groups), rank, len(first))
        for mine, theirs in zip(first, groups, strict=True):
            for option in mine | theirs:
                if not _same(mine.get(option), theirs.get(option)):
                    raise _unlike(option, theirs.get(option), rank, mine.get(option))


def _plain_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group that are numbers or flags, or several of them, but for those that go by the device."""
    found = {key: _numbers(value) for key, value in group.items() if key not in (*OF_DEVICES, "params")}
    return {key: value for key, value in found.items() if value is not None}


def _numbers(value: Any) -> Any:
    """A number, also one in a tensor, or a list of numbers; None of all else."""
    if isinstance(value, (tuple, list)):
        several = [_numbers(item) for item in value]
        return None if None in several else several
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else None
    return value if isinstance(value, (bool, int, float)) else None


def _same(one: Any, other: Any) -> bool:
    """Whether two such values are the same, up to what a tensor rounds a number to."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-6) or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


def _unlike(option: str, value: Any, rank: int, first: Any) -> ConfigError:
    problem = f"so it is for rank {rank}, for rank 0 it is {first}"
    return ConfigError(f"the optimizer's {option}", Unquoted(value), problem, "make the same optimizer on all ranks")


def start_together(algorithm: Executor, plan: Plan, worker: Worker, comm: Comm) -> None:
    """Starts the method on all ranks.

    Raises:
        UserError: on all of them, what any of them has to complain of.
    """
    check_optimizers(worker.optimizer, comm)
    problem = None
    try:
        algorithm.start(plan, worker, comm)
    except UserError as error:
        problem = error
        if comm.rank:
            print(f"hvd-hetero: error: {error}", file=sys.stderr, flush=True)
    if comm.max([float(problem is not None)], "start.problem")[0]:
        raise problem or UserError("another rank cannot begin, and has said why")


def _known(job: Job, comm: Comm) -> tuple[dict[str, float], float] | None:
    """Step times and that of an average from an earlier profile, found by rank 0; what is wrong with it ends all."""
    names = [c.name for c in job.cluster.classes]
    step_times, error = [0.0] * (len(names) + 1), UserError("rank 0 says why")
    if comm.rank == 0:
        try:
            known = known_speeds(job.config, job.cluster)
        except ConfigError as problem:
            step_times, error = [math.nan] * len(step_times), problem
        else:
            if known is not None:
                step_times = [*(known[0].step_sec[name] for name in names), known[0].average_sec]
                LOGGER.info("step times from %s; profile.reuse=false measures them", known[1])
    received = comm.broadcast(torch.tensor(step_times, dtype=torch.float64), "profile.known").tolist()
    if math.isnan(received[0]):
        raise error
    return (dict(zip(names, received, strict=False)), received[-1]) if any(received) else None
