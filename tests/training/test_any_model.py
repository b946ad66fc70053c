"""Models, batches and settings of unusual kinds on two unequal ranks: they train, agree, and resume bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from job_helpers import found_by_ranks
from ranks_models.models import CASES, NOT_REPEATABLE, Case

pytestmark = pytest.mark.horovod

SCRIPT = Path(__file__).parents[1] / "ranks_models" / "run_models.py"
Found = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def found(horovodrun: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("models")
    return found_by_ranks(horovodrun, 2, SCRIPT, folder, timeout=400)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit, so that a NaN is equal to itself."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return one.contiguous().numpy(force=True).tobytes() == other.contiguous().numpy(force=True).tobytes() if (
        one.dtype not in BYTES) else torch.equal(*(t.contiguous().view(torch.uint8) for t in (one, other)))  # fmt: skip


BYTES = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Types that numpy has no word for."""


@pytest.mark.parametrize("name", CASES)
def test_it_trains_and_the_ranks_agree(found: Found, name: str) -> None:
    case: Case = CASES[name]
    for rank in range(2):
        assert "error" not in found[rank][name], found[rank][name]["error"]
    fast, slow = (found[rank][name]["whole"]["state"] for rank in range(2))
    assert fast.keys() == slow.keys()
    differ = [tensor for tensor in fast if tensor not in case.local and not same(fast[tensor], slow[tensor])]
    assert not differ
    torch.manual_seed(0)
    start = dict(case.model().named_parameters())
    moved = [tensor for tensor, value in start.items() if not same(value.detach(), fast[tensor])]
    assert moved, "training did nothing"
    assert not [tensor for tensor in moved if tensor.startswith("spare.")], "nothing uses it"


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_REPEATABLE])
def test_resumed_it_comes_to_the_same(found: Found, name: str) -> None:
    for rank in range(2):
        whole, pieces = (found[rank][name][kind] for kind in ("whole", "pieces"))
        assert whole["state"].keys() == pieces["state"].keys()
        differ = [tensor for tensor, value in whole["state"].items() if not same(value, pieces["state"][tensor])]
        assert not differ
        assert whole["extra"] == pieces["extra"] and whole["loss"] == pieces["loss"]
