"""The rounds of a run for a loop written by hand: the program steps, the trainer does all the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from hvd_hetero import algorithms
from hvd_hetero.algorithms.local_sgd import LocalSGD
from hvd_hetero.comm.kv_store import job_env
from hvd_hetero.config.load import device_classes, load
from hvd_hetero.config.schema import AUTO, TRAIN, Config, TrainConfig
from hvd_hetero.data import Source
from hvd_hetero.data.alike import check_alike, facts_of_stream
from hvd_hetero.data.stream import Preview, StreamSource, dealt_or_stream
from hvd_hetero.errors import ConfigError
from hvd_hetero.log import logged
from hvd_hetero.planning.plan import Plan
from hvd_hetero.planning.sampling import Sampler
from hvd_hetero.telemetry.callbacks import Callback
from hvd_hetero.training.api import begin, carry_out, exit_on_error
from hvd_hetero.training.checkpointer import LoopSaver, SyncPoints
from hvd_hetero.training.loop_worker import LoopChannel, LoopExited, LoopWorker, Round
from hvd_hetero.training.process import process_restored
from hvd_hetero.training.restore import STREAM
from hvd_hetero.training.resume import Found
from hvd_hetero.training.startup import Job, make_worker
from hvd_hetero.training.trainer import Trainer
from hvd_hetero.worker.components import Components, MakeScheduler, UserObjects, build, log_adaptations
from hvd_hetero.worker.index_feed import Feed, StreamFeed
from hvd_hetero.worker.losses import PerSample
from hvd_hetero.worker.parameter_groups import MakeOptimizer

UNIFORM = "uniform"


class Stateful(Protocol):
    """What can be saved with a run: an optimizer, a scaler, anything with these two methods."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


class Loop:
    """The rounds of a run, for a loop written by hand::

        with Loop(model, (inputs, targets), {"train.tau": 32}, optimizer=lambda p: torch.optim.SGD(p, 0.1)) as loop:
            for round in loop:
                for x, y in round:
                    loop.optimizer.zero_grad()
                    losses = cross_entropy(loop.model(x), y, reduction="none")
                    losses.mean().backward()
                    loop.optimizer.step()
                    round.losses(losses)
            if loop.rank == 0:
                torch.save(loop.model.state_dict(), "model.pt")

    When an inner loop has ended, the models of all ranks are averaged, as :func:`hvd_hetero.train` does it, and all
    that it has goes with it: local steps derived from measured speeds, outer optimizers, delayed and partial averages,
    schedules, and with ``run.dir`` rows of figures, checkpoints and ``run.resume``. An optimizer of your own is made
    after the loop, from ``loop.model``, and given to :meth:`keep`.

    Args:
        model: the same on every rank up to its values; rank 0's are where all start.
        train_data: as for :func:`hvd_hetero.train`; or a ``DataLoader``, whose dataset is dealt by number if it is
            map-style, read in order or shuffled; or an ``IterableDataset`` (or a loader of one): a stream, which
            all ranks read, each training on a share by its speed. What a stream has is handed out as it is.
        overrides, config: as for :func:`hvd_hetero.train`. Unless ``train.tau`` names every class, the first rounds
            are measured, see :attr:`Round.measures`, and put back; with ``auto``, so is an average, and both choose the
            length of rounds as for :func:`hvd_hetero.train`.
        samples: of a stream, what counts as an epoch, where it does not tell its length.
        sharded: the stream gives this rank samples that no other rank has, all of which it takes.
        test_data, loss, metrics, optimizer, scheduler, callbacks: as for :func:`hvd_hetero.train`; without test data
            nothing is evaluated here.

    Attributes:
        model: on this rank's device.
        optimizer: of the argument or of ``train.optimizer``; its rate follows ``train.scheduler`` and warm-up.
        rank: of this process.

    Raises:
        UserError: as for :func:`hvd_hetero.train`, or a setting is for the trainer's own steps.
    """

    def __init__(
        self,
        model: nn.Module,
        train_data: Any,
        overrides: Mapping[str, Any] | Sequence[str] = (),
        config: Sequence[str | Path] = (),
        *,
        samples: int | None = None,
        sharded: bool = False,
        test_data: Any = None,
        loss: PerSample | None = None,
        metrics: Mapping[str, Any] | None = None,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        def prepare() -> tuple[Config, Components]:
            loaded = load(config, overrides, algorithms.method, user_objects=True)
            check_supported_by_loop(loaded)
            seed, train = None if sharded else loaded.run.seed, loaded.train
            source, size = dealt_or_stream(
                "train_data", train_data, loaded.data.workers, samples, train.batch_size, seed
            )
            if size is not None and train.batch_size == TrainConfig().batch_size:
                loaded = replace(loaded, train=replace(train, batch_size=size))
            if isinstance(source, StreamSource):
                loaded = of_stream(loaded, size)
            if loaded.profile.file is None:  # what is kept of a model's steps is not of a program's own
                loaded = replace(loaded, profile=replace(loaded.profile, reuse=False))
            test = source if test_data is None else test_data
            if loaded.run.dir is None:
                loaded = replace(loaded, run=replace(loaded.run, trackers=[]))  # they have no place to write to
            objects = UserObjects(model, source, test, loss, optimizer, scheduler, metrics, callbacks)
            parts = build(loaded, objects)
            if test_data is not None:
                log_adaptations(parts, loaded, objects)
            return loaded, parts

        def make(job: Job, found: Found | None) -> LoopTrainer:
            return LoopTrainer(job, job.config.run.dir, found, sharded, evaluates=test_data is not None)

        self._channel, self._is_begun = LoopChannel(), False
        with ExitStack() as after:
            after.enter_context(process_restored())
            after.enter_context(logged(job_env().rank))
            self._trainer: LoopTrainer = exit_on_error(lambda: begin(prepare, make))
            self._after = after.pop_all()
        trainer = self._trainer
        self.rank, self.model = trainer.comm.rank, trainer.worker.model

    @property
    def optimizer(self) -> Any:
        return self._trainer.worker.optimizer

    @property
    def plan(self) -> Plan:
        """What every class does in a round; there is one once the first round that is not measured has begun.

        Raises:
            RuntimeError: it has not.
        """
        if not hasattr(self._trainer, "plan"):
            tau, why = self._trainer.config.train.tau, "it is made when the first round begins"
            if not isinstance(tau, Mapping):
                why = f"with train.tau={tau} it goes by steps that are timed in the first rounds"
            raise RuntimeError(f"there is no plan yet: {why}; ask in a round whose measures is False, or later")
        return self._trainer.plan

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return self._trainer.accounts.epochs

    def __iter__(self) -> Iterator[Round]:
        if self._is_begun:
            raise RuntimeError("a Loop is gone through once: make another one")
        self._is_begun, trainer = True, self._trainer
        trainer.connect(self._channel)
        self._channel.begin(partial(carry_out, trainer), trainer.job.placement.device)
        with ExitStack() as hearing:
            is_heard = False
            while (round := exit_on_error(self._channel.swap)) is not None:
                if not round.measures and not is_heard and trainer.saver is not None and trainer.saver.active:
                    hearing.enter_context(trainer.saver.stopping)  # only a program's main thread hears signals
                    is_heard = True
                yield round

    # ---- saving ------------------------------------------------------------------------------------------------------

    def keep(self, **objects: Stateful) -> None:
        """Let objects of the program go with its model: put back after measured rounds, saved and resumed.

        With ``run.resume=reshape``, a rank that was not there before takes those of the first rank.

        Args:
            objects: with ``state_dict`` and ``load_state_dict``, the same names on all ranks; not ``stream``.
        """
        if self._is_begun:
            raise RuntimeError("keep objects before the first round")
        if STREAM in objects:
            raise ValueError(f"{STREAM} is the name of the place in train_data, which is kept anyway: choose another")
        self._trainer.kept |= objects

    def save_due(self) -> bool:
        """Whether all ranks are to save now, by ``checkpoint.every_sec`` or ``every_rounds``; ask before each round's
        steps, and once after the last round. With ``run.dir`` it never is: checkpoints are written there.
        """
        saver = self._trainer.saver
        if not isinstance(saver, LoopSaver):
            return False
        saver.is_asked = True
        return saver.state is not None

    def state_dict(self) -> dict[str, Any]:
        """This rank's state at the last moment that was due: model, optimizer, what is kept, and how far the run is.

        ``torch.save`` takes it, and ``torch.load(weights_only=True)`` gives it back.

        Raises:
            RuntimeError: :meth:`save_due` does not say that it is.
        """
        saver = self._trainer.saver
        if not isinstance(saver, LoopSaver) or saver.state is None:
            raise RuntimeError("there is nothing to save now: ask loop.save_due() first")
        state, saver.state = saver.state, None
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from this rank's state, with the same settings and ranks; comes before the first round."""
        if self._is_begun:
            raise RuntimeError("load a state before the first round")
        self._trainer.loaded_state = state

    # ---- the end ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Leave the job together with all other ranks; a rank that fails leaves it alone, and ends the job so."""
        if error is None:
            self.close()
        else:
            self._stop_trainer()
            self._leave()

    def close(self) -> None:
        """Leave the job together with all other ranks; call it when the model has been saved, or use ``with``.

        Cores, threads and warnings are as they were before the loop was made, and another one may be made.
        """
        self._stop_trainer()
        self._trainer.close()
        self._leave()

    def _stop_trainer(self) -> None:
        if self._channel.is_out:
            try:
                self._channel.swap(LoopExited("the program has left its loop"))
            except LoopExited:
                pass

    def _leave(self) -> None:
        self._trainer.job.watchdog.stop()
        self._after.close()


class LoopTrainer(Trainer):
    """A trainer whose local steps are a program's.

    Args:
        sharded: each rank has a stream of its own.
        evaluates: there are test data.

    Attributes:
        loaded_state: a state to go on from, which the program has kept.
    """

    worker: LoopWorker

    def __init__(self, job: Job, run_dir: str | None, found: Found | None, sharded: bool, evaluates: bool) -> None:
        super().__init__(job, run_dir, found)
        self._sharded, self.evaluates = sharded, evaluates
        self.loaded_state: Mapping[str, Any] | None = None

    def prepare(self) -> None:
        self.comm.broadcast_state(self.worker.state)  # the program has had it, and may have loaded something
        super().prepare()

    def connect(self, channel: LoopChannel) -> None:
        """Hand rounds out there."""
        is_stream = isinstance(self.source, StreamSource)
        needs_losses = not is_stream and self.config.sampling.scheme != UNIFORM
        self.worker.connect(channel, self.comm.excluded, self.kept, is_stream, needs_losses,
                            lambda: self.algorithm.class_plan.batch_size)  # fmt: skip

    def make_worker(self) -> LoopWorker:
        return make_worker(self.job, self.watch, LoopWorker)

    def make_saver(self) -> SyncPoints | None:
        if self.run_dir is not None:
            return super().make_saver()
        return LoopSaver(self.config, self.comm, self.algorithm.policy.needs_quiesce, self.loaded_state)

    def make_feed(self) -> Feed:
        if not isinstance(self.source, StreamSource):
            return super().make_feed()
        if not self._sharded:
            texts = self.comm.gather_text(json.dumps(facts_of_stream(self.source)), "stream.facts")
            check_alike([{"training": json.loads(text)} for text in texts], [f.host for f in self.job.cluster.facts])
        nothing = Sampler(0, UNIFORM, 0.0, "", self.config.run.seed) if self.comm.rank == 0 else None
        feed = StreamFeed(self.comm, nothing, not self._sharded)
        self.kept[STREAM] = feed
        return feed

    @property
    def measured_source(self) -> Source:
        return Preview(self.source) if isinstance(self.source, StreamSource) else self.source


def check_supported_by_loop(config: Config) -> None:
    """Refuses what is for the trainer's own steps: here the program takes them.

    Raises:
        ConfigError: naming the key.
    """
    if not issubclass(algorithms.get(config.algorithm.name), LocalSGD):
        problem = "takes its steps itself, which leaves nothing to a hand-written loop"
        raise ConfigError("algorithm.name", config.algorithm.name, problem, "choose a local-SGD method")
    if algorithms.get(config.algorithm.name).follows_rate:
        problem = "goes by the learning rate, which is yours in a hand-written loop"
        raise ConfigError("algorithm.name", config.algorithm.name, problem, "choose another local-SGD method")
    if config.sampling.is_weighted:
        key, value = ("sampling.scheme", config.sampling.scheme) if config.sampling.sample_weights is None else (
            "sampling.sample_weights", config.sampling.sample_weights)  # fmt: skip
        raise ConfigError(key, value, "weighs samples in a loss, which is your own here", "leave it null")
    classes = {} if config.cluster.classes == AUTO else device_classes(config.cluster.classes)
    for name, item in classes.items():
        if item.role != TRAIN:
            problem = "a hand-written loop steps on every rank, and helpers take no steps"
            raise ConfigError(f"cluster.classes.{name}.role", item.role, problem, f"leave it at {TRAIN}")
    for key in ("clip_norm", "autocast", "compile", "micro_batches"):
        value, neutral = getattr(config.train, key), getattr(TrainConfig(), key)
        if value != neutral:
            problem = "is for the trainer's own steps, and these are your program's"
            raise ConfigError(f"train.{key}", value, problem, f"do it there, and leave it at {neutral}")


def of_stream(config: Config, batch_size: int | None) -> Config:
    """Return the configuration for a stream: no losses are known, and batches may be of one size only.

    Raises:
        ConfigError: batches differ in size, and the stream's do not.
    """
    size: Any = config.train.batch_size
    sizes = set(size.values()) if isinstance(size, Mapping) else {size}
    if batch_size is not None and sizes != {batch_size}:
        problem = f"the batches of the loader are of {batch_size} samples"
        raise ConfigError("train.batch_size", size, problem, "leave it out, or give a dataset of samples")
    return replace(config, sampling=replace(config.sampling, scheme=UNIFORM))
