"""The model that a run has left: evaluate it again, or write it for other programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvd_hetero import algorithms, models
from hvd_hetero.checkpoint import Checkpoint, Store
from hvd_hetero.checkpoint.export import AVERAGED, FOLDER, MODEL, SAFETENSORS, weights_of, write_weights
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.flat_params import FlatState
from hvd_hetero.comm.kv_store import job_env
from hvd_hetero.config.load import load
from hvd_hetero.config.schema import AUTO, AggregationConfig, AlgorithmConfig, Config, SamplingConfig
from hvd_hetero.errors import ConfigError
from hvd_hetero.files import check_writable
from hvd_hetero.log import LOGGER
from hvd_hetero.planning.plan import lockstep_plan
from hvd_hetero.telemetry.row_file import read_rows
from hvd_hetero.telemetry.run_folder import EVALUATIONS, METRICS
from hvd_hetero.telemetry.stopwatch import Stopwatch
from hvd_hetero.training import startup
from hvd_hetero.training.best import BestEvaluation
from hvd_hetero.training.evaluation import EVAL, evaluate
from hvd_hetero.training.process import process_restored
from hvd_hetero.training.resume import load_leads
from hvd_hetero.worker.components import Components, as_user_error, build
from hvd_hetero.worker.extra_state import load_extra_state
from hvd_hetero.worker.metrics import LOSS
from hvd_hetero.worker.worker import Worker

LAST, BEST, AVERAGE = "last", "best", "averaged"
FILES = (".pt", ".pth", SAFETENSORS)
PROGRAMS = """a model that a program had made is in no configuration: name a function that makes it, \
model.target=package.module:function, or load the file itself (README)"""


def evaluate_run(run: str, checkpoint: str, overrides: Sequence[str]) -> dict[str, float]:
    """Evaluate a finished or interrupted run's model on its test set, as the run itself does, on this rank's device.

    Args:
        run: the run's folder.
        checkpoint: see :func:`load_weights`.
        overrides: ``key=value``, over the run's own configuration; ``data.*`` for another test set.

    Returns:
        The figures of an evaluation, ``eval_loss`` and others.

    Raises:
        UserError: there is no such model, or it does not fit.
    """
    config = _config(run, overrides)

    def prepare() -> tuple[Config, Components]:
        components = build(config)
        load_weights(Path(run), checkpoint, components.model, config)
        if checkpoint == BEST and job_env().rank == 0:
            warning = better_unsaved(Path(run), BestEvaluation(config.eval.best, components.metrics))
            if warning is not None:
                LOGGER.warning("%s", warning)
        return _of_one_class(config), components

    with process_restored():
        job = startup.start(prepare)
        try:
            worker = startup.make_worker(job, Stopwatch(heartbeat=job.watchdog.heartbeat), Worker)
            test = job.components.dataset.test.to(job.placement.device)
            comm = Comm(job.cluster, job.env.rank)
            plan = lockstep_plan(job.cluster, job.env.size, dict.fromkeys(range(job.env.size), 1))
            figures = evaluate(comm, worker, test, plan, job.config.eval)
            comm.close()
            return figures
        finally:
            job.watchdog.stop()


def export(run: str, checkpoint: str, to: str) -> Path:
    """Write a run's weights to a file, or where the model has ``save_pretrained``, to a folder.

    Args:
        run, checkpoint: as for :func:`evaluate_run`.
        to: a file ``.safetensors``, ``.pt`` or ``.pth``: a state dict; a name without a suffix: a folder.

    Raises:
        UserError: there is no such model, or it cannot be written so.
    """
    path, config = Path(to), _config(run, ())
    if path.suffix and path.suffix not in FILES:
        raise ConfigError("--to", to, "is of no known kind", f"end it in {', '.join(FILES)}, or in nothing: a folder")
    check_writable("--to", path.parent)
    file = _file(Path(run), checkpoint)
    if file is not None and path.suffix:
        weights = torch.load(file, weights_only=True)
    else:
        model = models.build(config.model.name, config.model.target, config.model.args)
        load_weights(Path(run), checkpoint, model, config)
        if not path.suffix:
            _save_pretrained(model, path)
            return path
        weights = weights_of(model, to)
    try:
        write_weights(path, weights)
    except OSError as error:
        raise ConfigError("--to", to, f"cannot be written: {error.strerror}", "choose another place") from error
    return path


def load_weights(run: Path, checkpoint: str, model: nn.Module, config: Config) -> None:
    """Load what a run has left into a model.

    Args:
        checkpoint: ``last``, the model at the run's end, or if it has not ended its newest checkpoint; ``best``, the
            checkpoint of the best evaluation; ``averaged``, see ``eval.average``; or the number of a round.

    Raises:
        UserError: there is none, it is damaged, or of another model.
    """
    file = _file(run, checkpoint)
    if file is not None:
        fill: Callable[[], Any] = partial(model.load_state_dict, torch.load(file, weights_only=True))
    else:
        found = _checkpoint(run, checkpoint)
        fill = partial(_fill, model, load_leads(found)["worker"], config)
    name = config.model.target or config.model.name
    with as_user_error("model", name, f"is not the model of {run}", PROGRAMS):
        fill()


def better_unsaved(run: Path, best: BestEvaluation) -> str | None:
    """Tell of an evaluation that was better than that of the checkpoint which is called the best, if there was one."""
    store = Store(run)
    found, value = store.best(), store.best_value(best.by)
    rows = [row for name in (METRICS, EVALUATIONS) if (run / name).exists() for row in read_rows(run / name)]
    scored = [(score, row) for row in rows if (score := best.score(row)) is not None]
    if found is None or value is None or not scored:
        return None
    score, row = max(scored, key=lambda item: item[0])
    saved = best.score({EVAL + LOSS: 0.0, EVAL + best.metric: value})
    if saved is None or score <= saved:
        return None
    better = f"{best.metric} {row[EVAL + best.metric]:.4g} after epoch {row['epoch']}"
    evaluated = f"{value:.4g} after epoch {found.meta.epochs}"
    return f"the best evaluation, {better}, has no checkpoint; this is the best of those that have one: {evaluated}"


def _fill(model: nn.Module, state: Any, config: Config) -> None:
    flat = FlatState(model, config.train.channels_last, config.aggregation.state)
    if state["model"]["layout"] != flat.layout():
        raise ValueError("its parameters have other names or shapes")
    flat.load_state_dict(state["model"])
    load_extra_state(model, state["extra"])


def _file(run: Path, checkpoint: str) -> Path | None:
    """Return the file of weights that a finished run has written, where that is what is asked for."""
    path = run / FOLDER / (AVERAGED if checkpoint == AVERAGE else MODEL)
    if checkpoint == AVERAGE and not path.exists():
        raise ConfigError("--checkpoint", checkpoint, f"{path} does not exist", "train with eval.average=ema or lawa")
    return path if checkpoint in (LAST, AVERAGE) and path.exists() else None


def _checkpoint(run: Path, name: str) -> Checkpoint:
    store = Store(run)
    if name in (LAST, BEST):
        found = store.latest() if name == LAST else store.best()
    elif name.isdecimal():
        return store.at(int(name))
    else:
        raise ConfigError("--checkpoint", name, "is none", f"give {LAST}, {BEST}, {AVERAGE} or the number of a round")
    if found is None:
        rounds = ", ".join(str(c.round) for c in store.candidates() if c.checkpoint is not None) or "none"
        raise ConfigError("--checkpoint", name, f"{run} has no such checkpoint", f"there are those of rounds: {rounds}")
    return found


def _config(run: str, overrides: Sequence[str]) -> Config:
    file = Path(run) / "config.yaml"
    if not file.is_file():
        raise ConfigError("RUN", run, "is not the folder of a run", "give the run.dir of one")
    config = load([file], overrides, algorithms.method)
    return replace(config, run=replace(config.run, callbacks=[], trackers=[]))  # which are of the training


def _of_one_class(config: Config) -> Config:
    """Return the configuration with nothing of the training, which is over: every device is as good as any."""
    return replace(
        config, cluster=replace(config.cluster, classes=AUTO), algorithm=AlgorithmConfig(),
        aggregation=AggregationConfig(weights="steps", state=config.aggregation.state),
        sampling=SamplingConfig(scheme="uniform"), train=replace(config.train, tau=1, batch_size=1, micro_batches=1),
    )  # fmt: skip


def _save_pretrained(model: nn.Module, folder: Path) -> None:
    save = getattr(model, "save_pretrained", None)
    if save is None:
        problem = f"{type(model).__name__} has no save_pretrained, which writes folders"
        raise ConfigError("--to", str(folder), problem, f"name a file that ends in {', '.join(FILES)}")
    with as_user_error("--to", str(folder), "save_pretrained fails", "choose another folder"):
        save(folder)
