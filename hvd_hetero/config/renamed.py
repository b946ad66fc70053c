"""Accept keys by their former names, and former values, for one release."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from hvd_hetero.errors import ConfigError

KEYS = {
    "train.passes": "train.epochs",
    "train.epoch": "train.epoch_length",
    "eval.every_passes": "eval.every_epochs",
    "algorithm.least": "algorithm.min_local_batch",
    "eval.metric": "eval.metrics",
}
VALUES: dict[str, Callable[[Any], Any]] = {
    "train.epoch": lambda value: "dataset" if value == "pass" else value,
    "eval.metric": lambda value: {} if value in (None, "none") else (
        {"accuracy" if value == "accuracy" else "metric": value}),
    "train.autocast": lambda value: None if str(value).lower() == "false" else value,
}
"""Today's values, of former ones, by the key that they were given for."""


class RenamedKeyWarning(FutureWarning):
    """Configuration keys were given by their former names."""


def pairs_renamed(pairs: Iterable[tuple[str, Any]], found: set[str]) -> list[tuple[str, Any]]:
    """Return dotted keys and values as they are today; what was said otherwise is added to ``found``."""
    renamed = []
    for key, former in pairs:
        value = VALUES[key](former) if key in VALUES else former
        if key in KEYS:
            found.add(f"{key} is now {KEYS[key]}")
        elif value is not former:
            found.add(f"{key}={former} is now {key}={'null' if value is None else value}")
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
    """Warn, once in a process, of what was said by former names and values."""
    if found:
        _warn(", ".join(sorted(found)))


@cache  # Python's own "once" starts anew with each block that changes filters
def _warn(text: str) -> None:
    warnings.warn(f"{text}: the former one is accepted for one release", RenamedKeyWarning, stacklevel=3)
