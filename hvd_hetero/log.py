"""Log lines, through Python's logging: what a job tells comes from rank 0, warnings from the rank that has them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = logging.getLogger("hvd_hetero")
"""All of the package's; a program configures it, or the root logger, as any other."""


class RankFilter(logging.Filter):
    """Drops what is no warning on all ranks but the first; records get an attribute ``rank``."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = self.rank
        return self.rank == 0 or record.levelno >= logging.WARNING


@contextmanager
def logged(rank: int) -> Iterator[None]:
    """Show log lines as long as a block lasts, where the program has not set up logging itself.

    Lines go to standard output, warnings to standard error.
    """
    handlers: list[logging.Handler] = []
    if not LOGGER.hasHandlers():
        out, err = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
        out.addFilter(lambda record: record.levelno < logging.WARNING)
        err.setLevel(logging.WARNING)
        handlers = [out, err]
    level, ranks = LOGGER.level, RankFilter(rank)
    LOGGER.addFilter(ranks)
    for handler in handlers:
        LOGGER.addHandler(handler)
    if level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
        LOGGER.removeFilter(ranks)
        for handler in handlers:
            LOGGER.removeHandler(handler)
