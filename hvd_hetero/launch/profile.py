"""``hvd-hetero profile``: measures all device classes, tells what would be done with their speeds, and keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hvd_hetero import algorithms
from hvd_hetero.comm.kv_store import job_env
from hvd_hetero.config.load import load, per_class, without_roles
from hvd_hetero.config.schema import Config
from hvd_hetero.errors import ConfigError
from hvd_hetero.launch.launcher import run_job
from hvd_hetero.log import LOGGER
from hvd_hetero.planning.plan import Plan
from hvd_hetero.planning.speed_profile import ClassSpeed, Profile, kept_at, key_of
from hvd_hetero.training import dry_run, startup
from hvd_hetero.training.api import exit_on_error
from hvd_hetero.training.initial_plan import choose_micro_batches, choose_path
from hvd_hetero.training.initial_plan import measurement as measurement_of
from hvd_hetero.training.trainer import Trainer
from hvd_hetero.worker.components import Components

FACTORS = (0.5, 2.0)
"""Other batch sizes that are measured, as multiples of the configured ones."""


def profile(files: Sequence[str], overrides: Sequence[str]) -> int:
    """Under horovodrun one rank of the measurement, else the job that consists of it; returns the exit status."""
    if job_env().store is None:
        return run_job("profile", files, overrides)
    exit_on_error(lambda: _measure(files, overrides))
    return 0


def _measure(files: Sequence[str], overrides: Sequence[str]) -> None:
    def prepare() -> tuple[Config, Components]:
        config = without_roles(load(files, overrides, algorithms.method))  # what they are worth goes by their speeds
        return config, dry_run.build(config)

    started = startup.start(prepare)
    config, cluster = started.config, started.cluster
    trainer = Trainer(started, None)
    choose_micro_batches(started, trainer.algorithm.policy, trainer.worker, trainer.source, trainer.comm)
    measurement = measurement_of(started, trainer.worker, trainer.source, trainer.comm)
    names = [c.name for c in cluster.classes]
    batch = per_class("train.batch_size", config.train.batch_size, names)
    most, least = len(trainer.source), started.components.min_batch
    sizes = [{name: max(least, min(most, int(size * factor))) for name, size in batch.items()} for factor in FACTORS]
    if started.env.rank == 0:
        LOGGER.info("measuring how fast each class is, with %s batch sizes, together and alone, for %g s each "
                    "(profile.seconds)", 1 + len(sizes), measurement.seconds)  # fmt: skip
    together = measurement.classes(batch)
    others = [measurement.classes(size) for size in sizes]
    alone, others_alone = measurement.alone(batch), [measurement.alone(size) for size in sizes]
    policy = trainer.algorithm.policy
    choose_path(policy, measurement)
    policy.average_sec = average_sec = measurement.average_sec()
    if started.env.rank == 0:
        classes = [
            ClassSpeed(
                c.name,
                c.device,
                len(c.ranks),
                batch[c.name],
                together[c.name].step_sec,
                alone[c.name],
                {str(size[c.name]): found[c.name].step_sec for size, found in zip(sizes, others, strict=True)}
                | {str(batch[c.name]): together[c.name].step_sec},
                together[c.name].jitter,
                {str(size[c.name]): found[c.name] for size, found in zip(sizes, others_alone, strict=True)}
                | {str(batch[c.name]): alone[c.name]},
            )
            for c in cluster.classes
        ]
        step_sec = {c.name: c.step_sec for c in classes}
        try:
            plan = policy.make_plan(step_sec if policy.needs_speeds else None)
            problem = ""
        except ConfigError as error:
            plan, problem = Plan((), 0), str(error)
        params = [p for p in trainer.worker.model.parameters() if p.requires_grad]
        kept = Profile(
            key_of(config, cluster),
            most,
            sum(p.numel() for p in params),
            sum(p.numel() * p.element_size() for p in params),
            classes,
            average_sec,
            {c.name: c.tau for c in plan.classes},
            predicted_blocked(plan, step_sec, average_sec) if policy.is_blocking(step_sec) else {},
        )
        path = kept_at(kept.key) if config.profile.file is None else Path(config.profile.file)
        kept.save(path)
        print(_table(kept), flush=True)
        print(f"no plan with these speeds: {problem}" if problem else f"kept in {path}", flush=True)
    trainer.close()


def predicted_blocked(plan: Plan, step_sec: Mapping[str, float], average_sec: float) -> dict[str, float]:
    """Each training class's share of a round in which it waits for the slowest one, if no step jitters.

    Args:
        step_sec: where the plan does not say how long a step of its own batches takes.
    """
    work = {c.name: c.tau * (c.step_sec or step_sec[c.name]) for c in plan.training}
    longest = max(work.values(), default=0.0)
    return {name: (longest - sec) / (longest + average_sec) for name, sec in work.items()}


def _table(kept: Profile) -> str:
    fastest = min(c.step_sec for c in kept.classes)
    lines = ["class | device | ranks | batch | step ms | alone | jitter | r | tau | blocked, predicted | other batches"]
    for c in kept.classes:
        ratio = fastest / c.step_sec
        sizes = {size: sec for size, sec in c.by_batch.items() if size != str(c.batch_size)}
        others = ", ".join(
            f"{size}: {1e3 * sec:.3g} ms (alone {1e3 * c.by_batch_alone[size]:.3g})" for size, sec in sizes.items()
        )
        blocked = f"{100 * kept.predicted_blocked[c.name]:.1f} %" if c.name in kept.predicted_blocked else "-"
        lines.append(
            f"{c.name} | {kept.key['device'][c.name]} | {c.ranks} | {c.batch_size} | {1e3 * c.step_sec:.3g} | "
            f"{1e3 * c.step_sec_alone:.3g} | {100 * c.jitter:.0f} % | {ratio:.3f} | {kept.tau.get(c.name, '-')} | "
            f"{blocked} | {others}"
        )
    lines.append(f"an average of {kept.parameters} parameters takes {1e3 * kept.average_sec:.3g} ms")
    return "\n".join(lines)
