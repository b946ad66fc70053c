"""The look of tables and pictures: that of a report, taken from its files alone.

The package hvd_hetero.analysis.report imports the methods, and with them torch, which planning has to do without.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPORT = Path(__file__).parent.parent / "report"
STYLE = runpy.run_path(str(REPORT / "style.py"))
table: Callable[[Sequence[Sequence[str]]], str] = runpy.run_path(str(REPORT / "tables.py"))["table"]
bar: Callable[[str], dict[str, Any]] = STYLE["bar"]
line: Callable[[int], dict[str, Any]] = STYLE["line"]
SETTINGS: Any = STYLE["SETTINGS"]
