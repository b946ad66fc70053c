"""Training from a Python program that horovodrun starts on every rank, or from the command line."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hvd_hetero import algorithms, components, job
from hvd_hetero.comm.rendezvous import job_env
from hvd_hetero.comm.waiting import PEER_LOST
from hvd_hetero.components import Components, Given
from hvd_hetero.config import load
from hvd_hetero.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAULT,
    EXIT_LOST,
    EXIT_NUMBERS,
    EXIT_STOPPED,
    BadNumbers,
    MidRunError,
    Stopped,
    UserError,
)
from hvd_hetero.files import check_writable
from hvd_hetero.imports import in_a_line
from hvd_hetero.metrics import check_run_dir
from hvd_hetero.saving import find
from hvd_hetero.schema import RESHAPE, Config
from hvd_hetero.trainer import Trainer

PEER_GONE_SEC = 1.0
"""A survivor leaves so much later than the rank that failed, so that the launcher sees that one end first."""
KILLED_SEC = 0.2
"""When horovodrun ends a rank it kills its data workers first: what fails for that only is not to be reported."""


def train(
    config: str | Path | Sequence[str | Path] | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    **given: Any,
) -> dict[str, Any] | None:
    """Trains one model on all ranks of the job; every rank calls it.

    Args:
        config: a YAML file or several, merged in order; None is the built-in default.
        overrides: dotted keys and their values, ``{"train.passes": 10}``, or ``key=value`` texts.
        **given: objects in place of names in the configuration: see :class:`hvd_hetero.components.Given`.

    Returns:
        The content of ``summary.json`` on rank 0, None on the others.

    Raises:
        UserError: something given cannot be used; with more than one rank, rank 0 says so and the job ends with
            status 2 instead.
        Stopped: the run was asked to stop, and has saved; with more than one rank, the job ends with status 3 instead.
        BadNumbers: no rank's numbers are good any more; with more than one rank, the job ends with status 6 instead.
    """
    def prepare() -> tuple[Config, Components]:
        loaded = load(config, overrides, algorithms.method)
        return loaded, components.build(loaded, Given.of(given))

    return guarded(lambda: _run(prepare))


def _run(prepare: Callable[[], tuple[Config, Components]]) -> dict[str, Any] | None:
    env = job_env()

    found = None

    def prepare_folder_too() -> tuple[Config, Components]:
        nonlocal found
        config, parts = prepare()
        if env.rank == 0 and config.run.dir is not None:
            check_run_dir(config.run.dir, config.run.overwrite or config.run.resume is not None)
            check_writable("run.dir", Path(config.run.dir))
            if config.run.resume is not None:
                digest = config.digest(how_long=False)
                found = find(Path(config.run.dir), digest, env.size, reshape=config.run.resume == RESHAPE)
        return config, parts

    started = job.start(prepare_folder_too)
    trainer = Trainer(started, run_dir(started.config), found)
    try:
        trainer.prepare()
    except UserError:
        trainer.close()  # every rank is here: they judge by the same measurements
        raise
    try:
        summary = trainer.run()
    except Stopped:
        trainer.close()
        raise
    except UserError as error:
        # one rank's own trouble, a broken file for instance: the others are waiting somewhere else
        raise MidRunError(error) from error
    except BaseException:
        trainer.abandon()
        raise
    trainer.close()
    return summary


def run_dir(config: Config) -> Path:
    """Where the run is kept: as configured, else a new folder under ``runs/`` named after what is trained, and when."""
    if config.run.dir is not None:
        return Path(config.run.dir)
    what = ((part.target or part.name or "").rpartition(":")[2] for part in (config.data, config.model))
    name = config.run.name or "-".join(filter(None, (config.algorithm.name, *what)))
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def guarded(call: Callable[[], Any]) -> Any:
    """Ends a rank as a job should: bad input with one message and status 2, a fault with its rank and cause.

    A process that is the whole job gets the exception instead.
    """
    env = job_env()
    if env.size == 1:
        try:
            return call()
        except MidRunError as met:
            raise met.error from None
    try:
        return call()
    except UserError as error:
        if env.rank == 0:
            print(f"hvd-hetero: error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_INPUT)
    except MidRunError as met:
        _end(EXIT_BAD_INPUT, f"rank {env.rank} on {env.host} failed: {met.error}")
    except BadNumbers as error:
        if env.rank != error.ranks[0]:
            time.sleep(PEER_GONE_SEC)  # the rank that has the say ends first
            os._exit(EXIT_NUMBERS)
        _end(EXIT_NUMBERS, str(error))
    except Stopped as stopped:
        if env.rank == 0:
            print(f"hvd-hetero: {stopped}", file=sys.stderr, flush=True)
        sys.exit(EXIT_STOPPED)
    except PEER_LOST as error:
        time.sleep(PEER_GONE_SEC)
        _end(EXIT_LOST, f"rank {env.rank} on {env.host} stops: {error}")
    except Exception as error:
        time.sleep(KILLED_SEC)
        traceback.print_exc()
        _end(EXIT_FAULT, f"rank {env.rank} on {env.host} failed: {in_a_line(error)}")


def _end(status: int, message: str) -> NoReturn:
    """Leaves at once: Horovod's own shutdown would wait for ranks that are not coming."""
    print(f"hvd-hetero: error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)
