"""The comparisons and workloads that come with the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvd_hetero.analysis.compare.check import check
from hvd_hetero.analysis.compare.spec import read

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_comparisons_are_sound(path: Path) -> None:
    found = read(path, [])
    first = found.rows[0].config(0, found.folder, None)
    for row in found.rows:
        row.config(0, found.folder, None)
    if first.data.name == "digits" and path.stem.endswith("_small"):
        pytest.importorskip("matplotlib", reason="the extra [report] is not installed")
        if all(row.config(0, found.folder, None).data.name == "digits" for row in found.rows):
            check(found)


def test_every_table_and_figure_has_both_scales() -> None:
    names = {f"{what}_{scale}" for what in ("table1", "table2", "table3", "table6", "table7", "figure1", "figure4")
             for scale in ("paper", "small")}
    assert names <= {path.stem for path in (CONFIGS / "compare").glob("*.yaml")}


@pytest.mark.parametrize("path", sorted((CONFIGS / "workloads").glob("[!b]*.yaml")), ids=lambda path: path.stem)
def test_workloads_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 25
