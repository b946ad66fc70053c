"""Weights of samples that come with the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hvd_hetero.data import TensorSource, as_source
from hvd_hetero.data.weights import sample_weights
from hvd_hetero.errors import ConfigError


class Own:
    """A user's dataset."""

    weights = [1, 3, 0, 4]
    few = np.ones(3)
    negative = torch.tensor([1.0, -1.0, 1.0, 1.0])
    infinite = [1.0, 1.0, 1.0, np.inf]
    zeros = np.zeros(4)
    texts = ["a", "b", "c", "d"]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(2), index


def by_target(dataset: Any) -> torch.Tensor:
    return 1.0 + dataset.targets


def broken(dataset: Any) -> Any:
    raise RuntimeError("no weights today")


def test_an_attribute_and_a_function() -> None:
    found = sample_weights("weights", as_source("data", Own()))
    assert found.dtype == np.float32 and found.tolist() == [0.5, 1.5, 0, 2]
    tensors = TensorSource(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert sample_weights(f"{__name__}:by_target", tensors) == pytest.approx([2 / 3, 4 / 3])


@pytest.mark.parametrize(("spec", "output"), [
    ("few", r"has the shape \[3\].*4 samples"), ("negative", "is -1.0 for sample 1"), ("infinite", "sample 3"),
    ("zeros", "are all 0"), ("texts", "gives no weights"), ("nothing", "gives no weights.*nothing"),
    (f"{__name__}:broken", "no weights today"), (f"{__name__}:missing", "missing"),
])  # fmt: skip
def test_what_is_wrong_is_said(spec: str, output: str) -> None:
    with pytest.raises(ConfigError, match=output) as caught:
        sample_weights(spec, as_source("data", Own()))
    assert caught.value.key == "sampling.sample_weights" and caught.value.remedy
