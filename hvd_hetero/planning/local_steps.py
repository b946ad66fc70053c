"""Derive local steps and batches of every device class from its step time.

Pure arithmetic (no torch, no Horovod).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from hvd_hetero.errors import ConfigError

ERROR, SHRINK, WAIT_AVOIDING, LEAVE_OUT = "error", "shrink_batch", "wait_avoiding", "leave_out"
LONGEST = 512
"""Local steps of the fastest class in the longest round that is chosen by :func:`shortest_round`."""


def derive_tau(
    tau_fastest: int, step_sec: Mapping[str, float], too_slow: str = ERROR, margin: float = 0.0
) -> dict[str, int]:
    """tau_g = max(1, round(tau_fastest * t_fastest / t_g)) (method: local steps).

    Args:
        tau_fastest: local steps of the fastest class.
        step_sec: seconds of one local step, by class.
        too_slow: what becomes of a class that cannot finish one step in a round: ``error``; ``leave_out``, tau 0; else
            tau 1.
        margin: t_g is that of :func:`planned_step_sec`; 0: as measured, which is the method's own rule.

    Raises:
        ConfigError: there is such a class, and that is an error.
    """
    late = too_slow_classes(tau_fastest, step_sec)
    for name, times in late.items():
        if too_slow == ERROR:
            problem = f"class {name} is {times:.1f} times slower and cannot finish one step in a round"
            least = math.ceil(times * (1 - 1e-9))
            remedy = f"set train.tau={least} or more, a smaller train.batch_size for {name}, or cluster.too_slow"
            raise ConfigError("train.tau", tau_fastest, problem, remedy)
    fastest = min(step_sec.values())
    planned = planned_step_sec(step_sec, margin)
    taus = {name: max(1, math.floor(tau_fastest * fastest / sec + 0.5)) for name, sec in planned.items()}
    return taus | dict.fromkeys(late if too_slow == LEAVE_OUT else (), 0)


def planned_step_sec(step_sec: Mapping[str, float], margin: float) -> dict[str, float]:
    """t_g / (1 - margin (1 - r_g)): what a slower class's step is planned to take, so that it is done a little early.

    Rounds vary, and each lasts as long as its latest rank: planned by average times, fast ranks would wait in every
    other one. At equal batches a slow rank that waits costs the cluster less than a fast one, in the measure in which
    it is slower; a class that is as fast as the fastest gets no margin. (r_g = t_fastest / t_g, as measured.)
    """
    fastest = min(step_sec.values())
    return {name: sec / (1 - margin * (1 - fastest / sec)) for name, sec in step_sec.items()}


def round_overhead(
    tau: Mapping[str, int], step_sec: Mapping[str, float], samples: Mapping[str, float], average_sec: float = 0.0,
    delayed: bool = False,
) -> float:  # fmt: skip
    """Return the share of the classes' capacity that a round spends on waiting and on the transfer of its average.

    1 - sum_g s_g tau_g / ((max_g tau_g t_g + average) sum_g s_g / t_g), which is waiting (1 - transfer) + transfer.

    Args:
        samples: s_g, of one step of all ranks of a class.
        average_sec: of one average that nobody is late for.
        delayed: it travels beside the next round, which waits for what is left of it.
    """
    round_sec = max(steps * step_sec[name] for name, steps in tau.items())
    spent = round_sec + (max(0.0, average_sec - round_sec) if delayed else average_sec)
    capacity = sum(samples[name] / step_sec[name] for name in tau)
    return 1 - sum(samples[name] * steps for name, steps in tau.items()) / (spent * capacity)


def shortest_round(
    step_sec: Mapping[str, float], samples: Mapping[str, float], average_sec: float, overhead: float, *,
    margin: float = 0.0, longest: int = LONGEST, delayed: bool = False,
) -> int:  # fmt: skip
    """Return tau of the fastest class for the shortest round that is affordable (``train.tau: auto``).

    Models that train apart for longer drift further apart, so a round is to be as short as waiting and transfer allow.

    Args:
        overhead: what :func:`round_overhead` may come to; if it is more in any round, the cheapest is taken.
        margin: of :func:`derive_tau`.
        longest: no round is longer, unless the slowest class needs it for one step.
    """
    least = math.ceil(max(step_sec.values()) / min(step_sec.values()) * (1 - 1e-9))
    costs = {}
    for tau in range(least, max(least, longest) + 1):
        steps = derive_tau(tau, step_sec, margin=margin)
        costs[tau] = round_overhead(steps, step_sec, samples, average_sec, delayed)
        if costs[tau] <= overhead:
            return tau
    return min(costs, key=costs.__getitem__)


def slower_share(step_sec: Mapping[str, float], samples: Mapping[str, float]) -> float:
    """Return the share of the cluster's samples a second that is not the fastest class's."""
    speeds = {name: samples[name] / sec for name, sec in step_sec.items()}
    return 1 - speeds[min(step_sec, key=step_sec.__getitem__)] / sum(speeds.values())


def too_slow_classes(tau_fastest: int, step_sec: Mapping[str, float]) -> dict[str, float]:
    """The classes that cannot finish one step while the fastest takes tau, and how many times slower they are."""
    ratios = {name: seconds / min(step_sec.values()) for name, seconds in step_sec.items()}
    # a ratio of 49 must not fail at tau 49 for a rounding error
    return {name: times for name, times in ratios.items() if tau_fastest < times * (1 - 1e-9)}


def shrink_batches(
    tau_fastest: int, step_sec: Mapping[str, float], batch_size: Mapping[str, int], margin: float = 0.0,
    min_batch: int = 1,
) -> dict[str, int]:  # fmt: skip
    """Batches with which classes that are too slow finish one step in a round, if a step's time goes with its batch.

    Args:
        margin: that of :func:`planned_step_sec`.
        min_batch: samples that the model needs in a step, though others wait for it then.

    Raises:
        ConfigError: one sample takes too long.
    """
    shrunk = dict(batch_size)
    for name, times in too_slow_classes(tau_fastest, step_sec).items():
        planned = planned_step_sec(step_sec, margin)[name] / min(step_sec.values())
        shrunk[name] = math.floor(batch_size[name] * tau_fastest / planned)
        if shrunk[name] < 1:
            problem = f"class {name} is {times:.1f} times slower: not even a batch of one fits into a round"
            raise ConfigError("cluster.too_slow", SHRINK, problem, "set a larger train.tau, or leave_out")
        shrunk[name] = max(shrunk[name], min(min_batch, batch_size[name]))
    return shrunk
