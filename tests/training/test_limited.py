"""A limit in seconds ends a run within an epoch, by every way in which ranks go through one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.horovod

SCRIPT = Path(__file__).parents[1] / "ranks" / "limited.py"


def test_seconds_end_an_epoch(horovodrun: Callable[..., Any], tmp_path: Path) -> None:
    done = horovodrun(2, [sys.executable, SCRIPT, tmp_path], timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == {"in step", "claimed", "local", "local, solo", "nobody saves"}
    for name, one in found.items():
        assert one["epochs"] == one["rows"] == 1 and 0 < one["samples"] < 400_000, name
