"""Training from a Python program that horovodrun starts on every rank, or from the command line."""

from __future__ import annotations

import gc
import itertools
import os
import select
import stat
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from torch import nn

from hvd_hetero import algorithms
from hvd_hetero.comm.async_ops import PEER_LOST
from hvd_hetero.comm.kv_store import job_env
from hvd_hetero.config.instantiate import in_a_line
from hvd_hetero.config.load import has_helpers, load
from hvd_hetero.config.renamed import RenamedKeyWarning
from hvd_hetero.config.schema import Config
from hvd_hetero.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAULT,
    EXIT_LOST,
    EXIT_NON_FINITE,
    EXIT_STOPPED,
    NonFiniteError,
    RankError,
    Stopped,
    UserError,
)
from hvd_hetero.files import check_writable
from hvd_hetero.log import LOGGER, logged
from hvd_hetero.random_state import RandomState
from hvd_hetero.telemetry.callbacks import Callback
from hvd_hetero.telemetry.run_folder import check_run_dir
from hvd_hetero.training import dry_run, startup
from hvd_hetero.training.helper_rank import HelperRank, help_out
from hvd_hetero.training.process import process_restored
from hvd_hetero.training.resume import Found, check_data, find
from hvd_hetero.training.run_records import say_end
from hvd_hetero.training.startup import Job
from hvd_hetero.training.stop_request import StopRequest
from hvd_hetero.training.trainer import Trainer
from hvd_hetero.worker.components import Components, MakeScheduler, UserObjects
from hvd_hetero.worker.losses import PerSample
from hvd_hetero.worker.parameter_groups import MakeOptimizer

T = TypeVar("T", bound=Trainer | HelperRank)
PEER_GONE_SEC = 1.0
"""A survivor leaves so much later than the rank that failed, so that the launcher sees that one end first; see
:func:`let_cause_end_first`."""
KILLED_SEC = 0.2
"""When horovodrun ends a rank it kills its data workers first: what fails for that only is not to be reported."""


def train(
    config: str | Path | Sequence[str | Path] | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    train_data: Any = None,
    test_data: Any = None,
    loss: PerSample | None = None,
    optimizer: MakeOptimizer | None = None,
    scheduler: MakeScheduler | None = None,
    metrics: Mapping[str, Any] | None = None,
    metric: PerSample | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any] | None:
    """Trains one model on all ranks of the job; every rank calls it.

    A program may call it again, with whatever else: the calls know nothing of each other. What it changes in the
    process (cores, threads, random numbers, warnings) is as before when it returns or raises.

    Args:
        config: a YAML file or several, merged in order; None is the built-in default.
        overrides: dotted keys and their values, ``{"train.epochs": 10}``, or ``key=value`` texts.
        model: a module, or a function without arguments that makes one; in place of ``model`` in the configuration,
            as what follows is in place of its keys.
        train_data: a map-style dataset, or a tuple (inputs, targets) of tensors; ``test_data`` the same.
        loss: ``loss(outputs, targets) -> [B]``, or that and weights ``[B]``, see :mod:`hvd_hetero.worker.losses`.
        optimizer: ``optimizer(parameters)`` makes a torch optimizer, or ``optimizer(named_parameters)`` of pairs (name,
            parameter); ``scheduler(optimizer)`` a scheduler.
        metrics: by name, functions of (outputs, targets) as the loss, metrics of torchmetrics, or a mapping such as
            ``{"target": function, "over": "dataset"}``, see :func:`hvd_hetero.worker.metrics.read_metrics`.
        metric: the former way to give one, which is called ``metric`` then.
        callbacks: objects of classes derived from :class:`hvd_hetero.Callback`, beside ``run.callbacks``.

    Returns:
        The content of ``summary.json`` on rank 0, None on the others; on helpers too, once the job ends
        (``cluster.classes.NAME.role``).

    Raises:
        UserError: something given cannot be used; with more than one rank, rank 0 says so and the job ends with
            status 2 instead: every rank raises SystemExit, which a program that goes on has to catch on all of them.
        Stopped: the run was asked to stop, and has saved; with more than one rank, the job ends with status 3 instead.
        NonFiniteError: no rank's numbers are good any more; with more than one rank, the job ends with status 6
        instead.
    """
    if metric is not None:
        warnings.warn("train(metric=...) is now train(metrics={name: ...})", RenamedKeyWarning, stacklevel=2)
        metrics = {"metric": metric, **(metrics or {})}
    objects = UserObjects(model, train_data, test_data, loss, optimizer, scheduler, metrics, callbacks)

    def prepare() -> tuple[Config, Components]:
        user_objects = any(part is not None for part in (model, train_data, test_data))
        loaded = load(config, overrides, algorithms.method, user_objects)
        return loaded, dry_run.build(loaded, objects)

    with ExitStack() as after:
        after.enter_context(process_restored())
        env = job_env()
        after.enter_context(logged(env.rank))
        if env.rank or env.launched:  # said once a job: by the launcher, else by rank 0
            warnings.simplefilter("ignore", RenamedKeyWarning)
        after.callback(RandomState.capture().restore)
        after.callback(gc.collect)  # a next call needs the memory, and data workers end
        return exit_on_error(lambda: _run(prepare, objects))


def _run(prepare: Callable[[], tuple[Config, Components]], objects: UserObjects) -> dict[str, Any] | None:
    def make(job: Job, found: Found | None) -> Trainer | HelperRank:
        is_helper = job.env.rank >= job.cluster.size
        return HelperRank(job) if is_helper else Trainer(job, run_dir(job.config, objects, job.components.model), found)

    trainer = begin(prepare, make)
    if isinstance(trainer, HelperRank):
        help_out(trainer)
        return None
    summary = carry_out(trainer)
    trainer.close()
    if summary is not None:
        say_end(summary, trainer.saved)
    return summary


def begin(prepare: Callable[[], tuple[Config, Components]], make: Callable[[Job, Found | None], T]) -> T:
    """Starts the job and makes its trainer, of what rank 0 has found to go on from."""
    env = job_env()
    found = None

    def prepare_folder_too() -> tuple[Config, Components]:
        nonlocal found
        config, components = prepare()
        if env.rank == 0 and config.run.dir is not None:
            check_run_dir(config.run.dir, config.run.overwrite or config.run.resume is not None)
            check_writable("run.dir", Path(config.run.dir))
            if config.run.resume is not None:
                found = find(Path(config.run.dir), config, None if has_helpers(config) else env.size)
                if found is not None:
                    check_data(found, components.dataset.train, components.weights)
        return config, components

    started = startup.start(prepare_folder_too)
    if env.size > 1:
        LOGGER.info("%s ranks are there, with data and model; connecting", env.size)
    try:
        return make(started, found)
    except BaseException:
        started.watchdog.stop()
        raise


def carry_out(trainer: Trainer) -> dict[str, Any] | None:
    """Trains to the end; returns the summary on rank 0. Where that fails, the job is left as it has to be."""
    try:
        trainer.prepare()
    except RankError:
        raise
    except UserError:
        trainer.close(EXIT_BAD_INPUT)  # every rank is here: they judge by the same measurements
        raise
    try:
        return trainer.run()
    except Stopped:
        trainer.close(EXIT_STOPPED)
        raise
    except BaseException as error:
        is_fault = isinstance(error, Exception)
        trainer.abandon(saves=is_fault and not isinstance(error, PEER_LOST),
                        survives=is_fault and not isinstance(error, (UserError, NonFiniteError)))  # fmt: skip
        if len(trainer.comm.all_ranks) == 1:  # nobody has to be told, and the program may go on
            trainer.close()
        if isinstance(error, UserError):
            # one rank's own trouble, a broken file for instance: the others are waiting somewhere else
            raise RankError(str(error)) from error
        raise


def run_dir(config: Config, objects: UserObjects | None = None, model: nn.Module | None = None) -> Path:
    """Where the run is kept: as configured, else a new folder under ``runs/`` named after what is trained, and when.

    A program may train several times in a second. Its own model is named by its class, its own data are not named.

    Args:
        objects: what a program has passed; None: nothing.
        model: that was made of it.
    """
    if config.run.dir is not None:
        return Path(config.run.dir)
    objects = objects or UserObjects()
    data, net = ((part.target or part.name or "").rpartition(":")[2] for part in (config.data, config.model))
    what = ["" if objects.train_data is not None else data, net if objects.model is None else type(model).__name__]
    name = config.run.name or "-".join(filter(None, (config.algorithm.name, *what)))
    first = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    others = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([first], others) if not folder.exists())


def exit_on_error(call: Callable[[], Any]) -> Any:
    """Ends a rank as a job should: bad input with one message and status 2, a fault with its rank and cause.

    A process that is the whole job gets the exception instead.
    """
    env = job_env()
    if env.size == 1:
        return call()
    try:
        return call()
    except RankError as error:
        _end(EXIT_BAD_INPUT, f"rank {env.rank} on {env.host}: {error}")
    except UserError as error:
        if env.rank == 0:
            print(f"hvd-hetero: error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_INPUT)
    except NonFiniteError as error:
        if env.rank != error.ranks[0]:
            let_cause_end_first()
            os._exit(EXIT_NON_FINITE)
        _end(EXIT_NON_FINITE, str(error))
    except Stopped as stopped:
        if env.rank == 0:
            print(f"hvd-hetero: {stopped}", file=sys.stderr, flush=True)
        sys.exit(EXIT_STOPPED)
    except PEER_LOST as error:
        let_cause_end_first()
        _end(EXIT_LOST, f"rank {env.rank} on {env.host} stops: {error}")
    except Exception as error:
        time.sleep(KILLED_SEC)
        with suppress(OSError, ValueError):
            traceback.print_exc()
        _end(EXIT_FAULT, f"rank {env.rank} on {env.host} failed: {in_a_line(error)}")


def let_cause_end_first() -> None:
    """Wait, so that the launcher sees the rank end first that failed; not any more where it has seen that.

    It has where it has told this rank to end, and where it reads no more what this rank says: so it ends ranks on other
    hosts. Others may hear of the loss only when this rank has left.
    """
    if StopRequest.was_ended:
        return
    poll = select.poll()
    for stream in (1, 2):
        with suppress(OSError):
            mode = os.fstat(stream).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
                poll.register(stream, 0)  # that it is closed is always told
    poll.poll(1000 * PEER_GONE_SEC)


def _end(status: int, message: str) -> NoReturn:
    """Leaves at once: Horovod's own shutdown would wait for ranks that are not coming."""
    with suppress(OSError, ValueError):  # nobody may read it any more
        print(f"hvd-hetero: error: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(status)
