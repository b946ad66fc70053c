"""Tests that need a GPU. HVD_HETERO_GPU_TESTS=cpu tries them out without one, on a part of their cases."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
TRIED_OUT = os.environ.get("HVD_HETERO_GPU_TESTS") == "cpu"
TIMEOUT_SEC = float(os.environ.get("HVD_HETERO_GPU_TESTS_SEC", 300))
"""Of one job. What it has come to until then counts."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not TRIED_OUT and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="there is no GPU here"))


@dataclass(frozen=True)
class Found:
    """What the ranks of a job have found, by rank and case, and how the job ended."""

    by_rank: list[dict[str, dict[str, Any]]]
    end: str

    def of(self, name: str) -> list[dict[str, Any]]:
        """One case, by rank; the test is skipped where only a part of the cases is tried out."""
        if TRIED_OUT and all(name not in mine for mine in self.by_rank) and self.end == "status 0":
            pytest.skip("not among the cases that are tried out without a GPU")
        for rank, mine in enumerate(self.by_rank):
            assert name in mine, f"rank {rank} did not come to it: {self.end}"
            assert "error" not in mine[name], f"rank {rank}: {mine[name]['error']}"
        return [mine[name] for mine in self.by_rank]


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if TRIED_OUT else "cuda"


@pytest.fixture(scope="session")
def ran(horovodrun: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, device: str) -> Callable[..., Found]:
    """``ran(group, ...)``: one job goes through the cases of these groups, once for all tests."""

    @cache
    def run(*groups: str) -> Found:
        folder = tmp_path_factory.mktemp("gpu")
        command = [sys.executable, TESTS / "ranks_gpu" / "run_gpu.py", folder, device, *groups]
        env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # for the same bits each time
        try:
            done = horovodrun(3, command, timeout=TIMEOUT_SEC, env=env)
            end = f"status {done.returncode}"
            if done.returncode:
                end += f"\n{done.stdout[-2000:]}{done.stderr[-5000:]}"
        except pytest.fail.Exception as failed:
            end = str(failed)
        files = [folder / f"rank{rank}.pt" for rank in range(3)]
        return Found([torch.load(f, weights_only=False) if f.exists() else {} for f in files], end)

    return run
