"""Every method in pieces: stopped after every third round, saved, and taken up by a new trainer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from job_helpers import found_by_ranks
from ranks_methods.cases import RESUMED, RESUMED_SLOW
from ranks_methods.problem import BY_THE_CLOCK, SIZE

from hvd_hetero.algorithms import REGISTRY

pytestmark = pytest.mark.horovod

SCRIPT = Path(__file__).parents[1] / "ranks_methods" / "resume_cases.py"


@pytest.fixture(scope="module")
def names(request: pytest.FixtureRequest) -> list[str]:
    """Of the cases to run."""
    return [name for name in RESUMED if name not in RESUMED_SLOW or request.config.getoption("--slow")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resumed")


@pytest.fixture(scope="module")
def found(horovodrun: Callable[..., Any], folder: Path, names: list[str]) -> list[dict[str, Any]]:
    return found_by_ranks(horovodrun, SIZE, SCRIPT, folder, *names, timeout=300)


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow) if name in RESUMED_SLOW else name for name in RESUMED]
)
def test_in_pieces_it_comes_to_the_same_bit_by_bit(
    found: list[dict[str, Any]], folder: Path, names: list[str], case: str
) -> None:
    for rank in range(SIZE):
        both = found[rank][case]
        assert both["stops"] >= 1, "else nothing is said"
        for name, value in both["whole"]["model"].items():
            assert torch.equal(value, both["pieces"]["model"][name]), (rank, name)
    losses = [found[0][case][run]["losses"] for run in ("whole", "pieces")]
    assert torch.equal(*losses)
    number = names.index(case)
    rows = [[json.loads(line) for line in (folder / f"{run}{number}" / "metrics.jsonl").read_text().splitlines()]
            for run in ("whole", "pieces")]
    keys = ("epoch", "round", "samples_seen", "train_loss", "lr", "averaged_loss")
    kept = [[[row.get(key) for key in keys] for row in some]
            for some in rows]
    assert kept[0] == kept[1] and kept[0], "no row is lost or doubled"


def test_no_method_is_left_out() -> None:
    usual = [case for name, case in RESUMED.items() if name not in RESUMED_SLOW]
    assert len(usual) == len(RESUMED) - len(RESUMED_SLOW)
    assert {case.method for case in usual} | set(BY_THE_CLOCK) == set(REGISTRY)
