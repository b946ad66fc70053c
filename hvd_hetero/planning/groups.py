"""Groups of ranks that meet among themselves: partitions of all ranks, one a phase. Pure: no torch, no Horovod."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hvd_hetero.errors import ConfigError

Group = tuple[int, ...]
Partition = tuple[Group, ...]
"""Groups of which each rank is in one."""
MOST_SETS = 100
"""Groups that are registered as Horovod's process sets; docs/performance.md has what they cost."""


def by_bits(size: int, group_size: int) -> tuple[Partition, ...]:
    """Return partitions by phase: a group is the ranks that differ in a window of bits of their numbers only.

    The window of the next phase begins where the last one ends, and wraps around. Where log2 of the group size divides
    log2 of the number of ranks, each phase brings new neighbours only, and after all of them each rank's value has
    reached every rank. Groups of two are the one-peer exponential graph. What fits: :func:`check_by_bits`.
    """
    if group_size == size:
        return ((tuple(range(size)),),)
    bits, window = size.bit_length() - 1, group_size.bit_length() - 1
    phases = []
    for phase in range(bits // math.gcd(bits, window)):
        mask = sum(1 << (phase * window + i) % bits for i in range(window))
        phases.append(_alike([rank & ~mask for rank in range(size)]))
    return tuple(phases)


def check_by_bits(key: str, group_size: int, size: int) -> None:
    """Check that ranks can be grouped by bits of their numbers: into one group, or powers of two.

    Raises:
        ConfigError: they cannot.
    """
    check_divides(key, group_size, size)
    if size & (size - 1) and group_size != size:
        problem = f"groups by bits of the ranks' numbers take a power of two of ranks, and there are {size}"
        low = 1 << (size.bit_length() - 1)
        raise ConfigError(key, group_size, problem, f"start {low} or {2 * low} ranks, or set {key}={size}")


def check_divides(key: str, group_size: int, size: int) -> None:
    """Check that groups of one size can be made of all ranks.

    Raises:
        ConfigError: the size does not divide the number of ranks.
    """
    if size % group_size:
        fits = [str(n) for n in range(1, size + 1) if size % n == 0]
        problem = f"does not divide the {size} ranks into groups of one size"
        raise ConfigError(key, group_size, problem, f"set one of {', '.join(fits)}")


def consecutive(size: int, group_size: int) -> Partition:
    """Return the groups of ranks that follow one another, as those of a host do."""
    return _alike([rank // group_size for rank in range(size)])


def across(size: int, group_size: int) -> Partition:
    """Return the groups of the ranks that have the same place in each of :func:`consecutive`."""
    return _alike([rank % group_size for rank in range(size)])


def _alike(names: Sequence[int]) -> Partition:
    """Return the ranks of each name, in the order of their first rank."""
    return tuple(tuple(r for r, other in enumerate(names) if other == name) for name in dict.fromkeys(names))


def group_of(partition: Partition, rank: int) -> Group:
    """Return the group of a rank."""
    return next(group for group in partition if rank in group)


def sets_of(partitions: Sequence[Partition], size: int) -> tuple[Group, ...]:
    """Return the groups of all partitions that need a process set: of several ranks, but not of all; each once."""
    groups = (group for partition in partitions for group in partition)
    return tuple(dict.fromkeys(group for group in groups if 1 < len(group) < size))


def check_number(key: str, value: object, sets: Sequence[Group]) -> None:
    """Check how many groups are to be registered.

    Raises:
        ConfigError: more than :data:`MOST_SETS`.
    """
    if len(sets) > MOST_SETS:
        problem = f"makes {len(sets)} groups, each a process set of Horovod's, and {MOST_SETS} are the most"
        raise ConfigError(key, value, problem, "make them larger, or start fewer ranks")
