"""Random trees of modules survive broadcast, average, checkpoint and restore, bit by bit where they must."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ranks_models.trees import FLOATING, KINDS, LAYOUTS, OTHERS

pytestmark = pytest.mark.horovod

SCRIPT = Path(__file__).parents[1] / "ranks_models" / "run_trees.py"
TREES = 60


def tensors() -> Any:
    shapes = st.lists(st.integers(0, 4), max_size=3)
    any_kind = st.fixed_dictionaries({
        "kind": st.sampled_from(KINDS[1:]), "dtype": st.sampled_from(FLOATING + OTHERS), "shape": shapes,
        "layout": st.sampled_from(LAYOUTS), "tied": st.integers(0, 3),
    })  # fmt: skip
    trained = st.fixed_dictionaries({
        "kind": st.just("trained"), "dtype": st.sampled_from(FLOATING), "shape": shapes,
        "layout": st.sampled_from(LAYOUTS), "tied": st.integers(0, 3),
    })  # fmt: skip
    return st.lists(st.one_of(any_kind, trained), max_size=5)


def trees() -> Any:
    leaf = st.fixed_dictionaries({"tensors": tensors(), "children": st.just([])})
    return st.recursive(
        leaf,
        lambda below: st.fixed_dictionaries({"tensors": tensors(), "children": st.lists(below, max_size=3)}),
        max_leaves=4,
    )


def forest() -> list[Any]:
    """Many trees, the same ones each time."""
    found: list[Any] = []

    @settings(max_examples=TREES, deadline=None, phases=[Phase.generate], derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(trees())
    def collect(tree: Any) -> None:
        found.append(tree)

    collect()
    return found


def count(tree: Any) -> int:
    return len(tree["tensors"]) + sum(map(count, tree["children"]))


def test_trees_survive(horovodrun: Callable[..., Any], tmp_path: Path) -> None:
    made = forest()
    assert sum(map(count, made)) > 3 * TREES, "else little is tried"
    (tmp_path / "trees.json").write_text(json.dumps(made))
    done = horovodrun(2, [sys.executable, SCRIPT, tmp_path], timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        wrong = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert not any(wrong), [(made[i], each) for i, each in enumerate(wrong) if each][0]
