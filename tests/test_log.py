"""Log lines: what reaches a program that has set up logging, and one that has not."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from hvd_hetero.log import LOGGER, logged

SAYS = """
from hvd_hetero.log import LOGGER, logged
import logging
{before}
with logged({rank}):
    LOGGER.info("told")
    LOGGER.warning("warned")
LOGGER.warning("after")
"""


def output(rank: int, before: str = "") -> tuple[list[str], list[str]]:
    code = SAYS.format(rank=rank, before=before)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.split(), done.stderr.split()


def test_without_a_programs_own_logging() -> None:
    """``after`` is shown by Python itself, which has a handler of last resort for warnings."""
    assert output(0) == (["told"], ["warned", "after"])
    assert output(1) == ([], ["warned", "after"])


def test_a_programs_own_logging_is_left_alone() -> None:
    setup = "logging.basicConfig(format='[%(message)s]', level=logging.INFO)"
    assert output(0, setup) == ([], ["[told]", "[warned]", "[after]"])


def test_records_know_their_rank_and_settings_are_put_back(caplog: pytest.LogCaptureFixture) -> None:
    before = LOGGER.level, LOGGER.filters[:], LOGGER.handlers[:]
    with logged(3):
        LOGGER.info("of rank 0 only")
        LOGGER.warning("of any rank")
    assert [(r.getMessage(), vars(r)["rank"]) for r in caplog.records] == [("of any rank", 3)]
    assert (LOGGER.level, LOGGER.filters[:], LOGGER.handlers[:]) == before
    assert logging.getLogger("hvd_hetero") is LOGGER
