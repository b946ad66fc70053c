"""Checks that the builders share."""

from __future__ import annotations

from hvd_hetero.errors import ConfigError


def positive(**sizes: int) -> None:
    """Check that sizes are at least 1.

    Raises:
        ConfigError: one is not; it is named as an argument of the model.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"model.args.{name}", size, "must be at least 1", "give a positive number")
