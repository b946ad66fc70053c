"""Modes of modules and optimizers, and steps of unusual kind, on two ranks: see ``ranks/modes_and_steps.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from job_helpers import found_by_ranks
from ranks.modes_and_steps import CASES, data

pytestmark = pytest.mark.horovod

SCRIPT = Path(__file__).parents[1] / "ranks" / "modes_and_steps.py"
Found = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def found(horovodrun: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank found, by case."""
    folder = tmp_path_factory.mktemp("modes")
    return found_by_ranks(horovodrun, 2, SCRIPT, folder)


@pytest.mark.parametrize("name", CASES)
def test_it_trains_and_both_ranks_have_what_was_evaluated(found: Found, name: str) -> None:
    first, second = (of_rank[name]["model"] for of_rank in found)
    if "byteps" not in name:  # a server's model is of the epoch before
        assert all(torch.equal(first[key], second[key]) for key in first)
    torch.manual_seed(0)
    model = CASES[name][0]()
    begun = [value.clone() for value in model.state_dict().values()]
    model.load_state_dict(first)
    assert not all(map(torch.equal, begun, model.state_dict().values()))
    inputs, targets = data(1)
    with torch.no_grad():
        loss = float(torch.nn.functional.cross_entropy(model.eval()(inputs), targets))
    assert found[0][name]["summary"]["eval"]["final_loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("name", ["frozen", "frozen, synchronous"])
def test_submodules_stay_in_their_modes(found: Found, name: str) -> None:
    for of_rank in found:
        noted = of_rank[name]["noted"]
        assert set(noted) == {(True, False, True), (False, False, False)}, "training, and evaluation"
        assert of_rank[name]["model"]["backbone.1.num_batches_tracked"] == 0
        assert of_rank[name]["modes"] == [True, False, False, False, True, True]


def test_a_model_that_comes_in_evaluation_mode_is_trained_in_the_other(found: Found) -> None:
    assert all(all(of_rank["evaluation mode"]["modes"]) for of_rank in found)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("modes")])
def test_an_optimizer_trains_in_its_mode_and_ends_in_the_other(found: Found, name: str) -> None:
    for of_rank in found:
        modes = of_rank[name]["of_optimizer"]
        assert modes == ["train", "eval"] * (len(modes) // 2), "neither is called twice"
        assert modes or "byteps" in name, "only a server has no steps"
