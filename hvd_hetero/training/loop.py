"""Biased local SGD around a hand-written loop: the user steps, this deals the samples and averages the models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hvd_hetero import algorithms
from hvd_hetero.algorithms.local_sgd import LocalSGD
from hvd_hetero.comm.averaging import average, average_others
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.flat_params import FlatState
from hvd_hetero.comm.kv_store import job_env
from hvd_hetero.config.load import load
from hvd_hetero.config.schema import AggregationConfig, Config
from hvd_hetero.data import Batch, read
from hvd_hetero.describe import describe
from hvd_hetero.errors import ConfigError, Plain, RankError, UserError
from hvd_hetero.log import logged
from hvd_hetero.planning.sampling import Sampler
from hvd_hetero.planning.schedules import run_share
from hvd_hetero.planning.stop_criteria import RunProgress, check_limits, next_rounds
from hvd_hetero.random_state import seed_all
from hvd_hetero.telemetry.emulation import SlowdownEmulator, thread_cpu_clock
from hvd_hetero.telemetry.stopwatch import Stopwatch
from hvd_hetero.training import startup
from hvd_hetero.training.api import exit_on_error
from hvd_hetero.training.process import process_restored
from hvd_hetero.worker.components import Components, UserObjects, build
from hvd_hetero.worker.index_feed import Feed
from hvd_hetero.worker.losses import Numbers, concat, per_sample
from hvd_hetero.worker.memory import on_device


class Round:
    """One round of this rank: iterate over it for its local batches, and give back the losses of each.

    Attributes:
        excluded: this rank's numbers (NaN, Inf) have not gone into the average that the round begins with: the
            optimizer's state, which is yours, should be cleared, ``optimizer.state.clear()``.
    """

    def __init__(self, batches: Iterator[Batch], batch_size: int, excluded: bool = False) -> None:
        self._batches, self._batch_size, self.excluded = batches, batch_size, excluded
        self.taken: list[Numbers] = []

    def __iter__(self) -> Iterator[Batch]:
        return self._batches

    def losses(self, losses: Tensor, weights: Tensor | None = None) -> None:
        """Takes the per-sample losses ``[B]`` of the batch just trained on; the next epochs' sampling goes by them.

        Args:
            weights: ``[B]``, 0 for samples that do not count: they keep the losses that they had.

        Raises:
            RankError: they are not one number a sample; of several ranks, the job ends with status 2 instead.
        """
        try:
            values, weights = per_sample("round.losses", Plain(""), (losses, weights), {self._batch_size})
        except UserError:
            told = Plain(describe(losses))
            again = partial(per_sample, "round.losses", told, (losses, weights), {self._batch_size})
            exit_on_error(partial(_alone, again))
            raise
        self.taken.append((values.detach(), weights))


class Loop:
    """The rounds of a run, for a loop written by hand::

        with Loop(model, (inputs, targets), {"train.tau": {"fast": 32, "slow": 4}}) as loop:
            optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.1)
            for round in loop:
                for x, y in round:
                    optimizer.zero_grad()
                    losses = cross_entropy(loop.model(x), y, reduction="none")
                    losses.mean().backward()
                    optimizer.step()
                    round.losses(losses)
            if loop.rank == 0:
                torch.save(loop.model.state_dict(), "model.pt")

    When an inner loop has ended, the models of all ranks are averaged with their weights. Make the optimizer after the
    loop, from ``loop.model``: its parameters have moved into a flat vector on the rank's device.

    Args:
        model: the same on every rank up to its values; rank 0's are where all start.
        train_data: a map-style dataset, or (inputs, targets).
        overrides: as for :func:`hvd_hetero.train`. ``train.tau`` is given for every class: the time of a step that
            somebody else writes cannot be measured beforehand.
        config: YAML files, as for :func:`hvd_hetero.train`.

    Attributes:
        model: on this rank's device.
        rank: of this process.
        plan: what every class does in a round.
    """

    def __init__(
        self,
        model: nn.Module,
        train_data: Any,
        overrides: Mapping[str, Any] | Sequence[str] = (),
        config: Sequence[str | Path] = (),
    ) -> None:
        def prepare() -> tuple[Config, Components]:
            loaded = load(config, overrides, algorithms.method)
            if not isinstance(loaded.train.tau, Mapping):
                remedy = "set it for each class, train.tau={fast: 32, slow: 4}"
                raise ConfigError("train.tau", loaded.train.tau, "a hand-written step is not measured", remedy)
            if loaded.train.max_train_sec is not None:
                limit = loaded.train.max_train_sec
                raise ConfigError("train.max_train_sec", limit, "a hand-written step is not timed", "set train.epochs")
            check_supported_by_loop(loaded)
            return loaded, build(loaded, UserObjects(model, train_data, train_data))

        with ExitStack() as after:
            after.enter_context(process_restored())
            after.enter_context(logged(job_env().rank))
            exit_on_error(lambda: self._start(startup.start(prepare)))
            self._after = after.pop_all()

    def _start(self, started: startup.Job) -> None:
        config, cluster, self.rank = started.config, started.cluster, started.env.rank
        device = started.placement.device
        startup.set_precision(config.train.matmul_precision)
        self.model = started.components.model.to(device)
        self._state = FlatState(self.model, policies=config.aggregation.state)
        self._source = on_device(started.components.dataset.train, device, "training")
        self._generator = torch.Generator(device).manual_seed(config.run.seed * 1000003 + self.rank)
        clock = thread_cpu_clock(device, started.placement.threads)
        self._watch = Stopwatch(thread_cpu_clock=clock, heartbeat=started.watchdog.heartbeat)
        self._comm = Comm(cluster, self.rank, config.aggregation, self._watch)
        self._comm.broadcast_state(self._state)
        samples = len(self._source)
        self.plan = algorithms.policy(config, cluster, samples).make_plan(None)
        spec = config.sampling
        biased = self.plan.biased(spec.bias_to)
        sampler = Sampler.of(spec, samples, biased, config.run.seed) if self.rank == 0 else None
        self._feed = Feed(self._comm, samples, sampler)
        check_limits(config.train, self.plan)
        self._train = config.train
        self._pace = SlowdownEmulator(self._watch, cluster.class_of(self.rank).slowdown, self._synchronize)
        self._watchdog = started.watchdog
        seed_all(config.run.seed * 1000003 + self.rank)  # dropout differs from rank to rank

    def _synchronize(self) -> None:
        if self._generator.device.type == "cuda":
            torch.cuda.current_stream(self._generator.device).synchronize()

    def __iter__(self) -> Iterator[Round]:
        mine = self.plan.of_rank(self.rank)
        done, excluded, self._comm.excluded.round = RunProgress(), False, 1
        while rounds := next_rounds(self._train, self.plan, done):
            part = replace(self.plan, rounds=rounds)
            if self._feed.sampler is not None:
                self._feed.sampler.share = run_share(self._train, self.plan, done, 0.0)
            rows = exit_on_error(partial(self._feed.deal, part, self.plan))
            batches = read(self._source, rows, self._generator)
            taken: list[Numbers] = []
            for _ in range(rounds):
                current = Round(self._steps(batches, mine.tau), mine.batch_size, excluded)
                yield current
                if len(current.taken) != mine.tau:
                    problem = f"a round has {mine.tau} batches of {mine.batch_size}, got losses of {len(current.taken)}"
                    raise RuntimeError(f"{problem}: go through the whole round and call round.losses for each batch")
                taken += current.taken
                excluded = not exit_on_error(partial(average, self._comm, self._state, mine.weight))
                self._comm.excluded.round += 1
            exit_on_error(partial(average_others, self._comm, self._state, mine.weight, only_new=True))
            at = np.repeat(np.arange(rounds), mine.tau)
            shapes = [(rounds * c.tau, c.batch_size) for c in part.by_rank()]
            exit_on_error(partial(self._feed.collect, rows, at, concat(taken)[0], shapes))
            done = done.after(part)
            self._watch.take()  # nothing is told of the times of a loop

    def _steps(self, batches: Iterator[Batch], count: int) -> Iterator[Batch]:
        # What was between two rounds, an average and the user's own, is no part of a step that is to be stretched.
        self._watch.skip()
        steps = self._pace.steps(batches, count)
        while True:
            try:
                batch = next(steps, None)
            except Exception as error:  # what looks after that costs more than a small step
                exit_on_error(partial(_alone, partial(_raise, error)))
                raise
            if batch is None:
                return
            yield batch

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Leave the job together with all other ranks; a rank that fails leaves it alone, and ends the job so."""
        if error is None:
            self.close()
        else:
            self._leave()

    def close(self) -> None:
        """Leave the job together with all other ranks; call it when the model has been saved, or use ``with``.

        Cores, threads and warnings are as they were before the loop was made, and another one may be made.
        """
        self._comm.close()
        self._leave()

    def _leave(self) -> None:
        self._watchdog.stop()
        self._after.close()


def _raise(error: Exception) -> None:
    raise error


def _alone(call: Callable[[], Any]) -> Any:
    """Call what goes wrong on one rank alone, while others wait for it.

    Raises:
        RankError: it has.
    """
    try:
        return call()
    except UserError as error:
        raise RankError(str(error)) from error


def check_supported_by_loop(config: Config) -> None:
    """Refuses what only the trainer's own loop can do: it owns neither the steps nor the optimizer here.

    Raises:
        ConfigError: the method does more than local steps and their average.
    """
    if not issubclass(algorithms.get(config.algorithm.name), LocalSGD):
        problem = "takes its steps itself, which leaves nothing to a hand-written loop"
        raise ConfigError("algorithm.name", config.algorithm.name, problem, "choose a local-SGD method")
    if algorithms.get(config.algorithm.name).follows_rate:
        problem = "goes by the learning rate, which is yours in a hand-written loop"
        raise ConfigError("algorithm.name", config.algorithm.name, problem, "choose another local-SGD method")
    if config.delays.distribution is not None:
        problem = "steps that somebody else writes are not delayed"
        raise ConfigError("delays.distribution", config.delays.distribution, problem, "leave it null")
    if config.sampling.is_weighted:
        key, value = ("sampling.scheme", config.sampling.scheme) if config.sampling.sample_weights is None else (
            "sampling.sample_weights", config.sampling.sample_weights)  # fmt: skip
        raise ConfigError(key, value, "weighs samples in a loss, which is your own here", "leave it null")
    if config.aggregation.path == "measured":
        problem = "a hand-written loop measures nothing"
        raise ConfigError("aggregation.path", "measured", problem, "set it to auto, flat or hierarchical")
    if config.train.micro_batches != 1:
        problem = "a hand-written step cuts its batch itself"
        raise ConfigError("train.micro_batches", config.train.micro_batches, problem, "leave it at 1")
    plain = AggregationConfig()
    for key in ("optimizer_state", "outer_lr", "outer_momentum", "delayed", "mode", "wire"):
        value, neutral = getattr(config.aggregation, key), getattr(plain, key)
        if value != neutral:
            problem = "a hand-written loop takes the plain average"
            raise ConfigError(f"aggregation.{key}", value, problem, f"leave it at {neutral}, or use hvd_hetero.train")
