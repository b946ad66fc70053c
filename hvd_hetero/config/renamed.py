"""Accept keys by their former names, for one release."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from hvd_hetero.errors import ConfigError

KEYS = {
    "train.passes": "train.epochs",
    "train.epoch": "train.epoch_length",
    "eval.every_passes": "eval.every_epochs",
    "algorithm.least": "algorithm.min_local_batch",
}
VALUES = {"train.epoch": {"pass": "dataset"}}
"""Former values, by former key."""


class RenamedKeyWarning(FutureWarning):
    """Configuration keys were given by their former names."""


def pairs_renamed(pairs: Iterable[tuple[str, Any]], found: set[str]) -> list[tuple[str, Any]]:
    """Return dotted keys and values under today's names; the former names that were used are added to ``found``."""
    renamed = []
    for key, value in pairs:
        if key in KEYS:
            found.add(key)
            value = VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value
        renamed.append((KEYS.get(key, key), value))
    return renamed


def layer_renamed(layer: Mapping[str, Any], found: set[str]) -> dict[str, Any]:
    """Return a file's sections under today's names; as :func:`pairs_renamed`.

    Raises:
        ConfigError: a file has a key by both of its names.
    """
    result = dict(layer)
    for section, content in layer.items():
        if not isinstance(content, Mapping):
            continue
        pairs = [(f"{section}.{name}", value) for name, value in content.items()]
        renamed = pairs_renamed(pairs, found)
        for (former, value), (key, _) in zip(pairs, renamed, strict=True):
            if former != key and key.rpartition(".")[2] in content:
                raise ConfigError(former, value, f"is {key} by its former name, which the file has too", "remove it")
        result[section] = {key.partition(".")[2]: value for key, value in renamed}
    return result


def warn_of(found: set[str]) -> None:
    """Warn, once in a process, of the former names that were used."""
    if found:
        _warn(", ".join(f"{key} is now {KEYS[key]}" for key in sorted(found)))


@cache  # Python's own "once" starts anew with each block that changes filters
def _warn(said: str) -> None:
    warnings.warn(f"{said}: the former name is accepted for one release", RenamedKeyWarning, stacklevel=3)
