"""Style of pictures: colours that colour-blind people tell apart, hatches and line styles that survive grey print."""

from __future__ import annotations

import textwrap
from typing import Any

from hvd_hetero.errors import ConfigError

COLOURS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, without yellow, which a white page swallows."""

LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = "os^DvPX<>*"

KINDS = {
    "compute": {"facecolor": "#0072B2", "hatch": ""},
    "data": {"facecolor": "#8FD3BF", "hatch": "...."},
    "blocked": {"facecolor": "#FFFFFF", "hatch": "////"},
    "comm": {"facecolor": "#E69F00", "hatch": "xxxx"},
}
"""Light to dark in grey as in colour: waiting is white."""

CONTRIBUTIONS = {
    "fresh": {"facecolor": "#0072B2", "hatch": ""},
    "late": {"facecolor": "#56B4E9", "hatch": "...."},
    "empty": {"facecolor": "#FFFFFF", "hatch": ""},
}
"""What a rank sent in a round: the less of it, the lighter."""

EDGE = "#303030"
FONT_SIZE = 9

SETTINGS: Any = {
    "font.size": FONT_SIZE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "hatch.color": EDGE,
    "legend.frameon": False,
}


def line(index: int) -> dict[str, Any]:
    """How the line of a series is drawn; the first 35 differ in colour or style, and neighbours in both."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.5,
    }


def bar(kind: str) -> dict[str, Any]:
    """How time, or a contribution, of a kind is filled."""
    return {**(KINDS | CONTRIBUTIONS)[kind], "edgecolor": EDGE}


def fit(text: str, width: int) -> str:
    """Wrap a text to at most two lines of ``width`` characters: names of series may be long."""
    return textwrap.fill(text, width, max_lines=2, placeholder=" …", break_on_hyphens=False)


def check_matplotlib() -> None:
    """Makes sure that pictures can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("matplotlib", None, "is not installed, and pictures need it",
                          "pip install 'hvd-hetero[report]'") from error
