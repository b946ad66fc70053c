"""The comparisons and workloads that come with the project."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_helpers import REAL
from torch import nn

from hvd_hetero.algorithms import REGISTRY
from hvd_hetero.analysis.compare.check import check
from hvd_hetero.analysis.compare.spec import read
from hvd_hetero.data import DATASETS
from hvd_hetero.data.split import Split, Splits
from hvd_hetero.models import MODELS

CONFIGS = Path(__file__).parents[2] / "configs"
COMPARISONS = {path.stem: path for path in sorted((CONFIGS / "compare").glob("*.yaml"))}
SIZES = {"fashion_mnist": 60_000, "cifar10": 50_000, "cifar100": 50_000, "flowers102": 7169, "tiny_imagenet": 100_000,
         "ag_news": 120_000, "digits": 1437}
"""Of the training sets; Flowers102 as its workloads take it."""
GPUS = [SimpleNamespace(name="GPU", pci_domain_id=0, pci_bus_id=0, pci_device_id=number) for number in range(8)]


def stand_in(reader: Callable[..., Splits], samples: int) -> Callable[..., Splits]:
    """A reader with the arguments of a real one, whose dataset has as many samples, of three numbers each."""

    @wraps(reader)
    def read_none(**args: Any) -> Splits:
        return Splits(*(Split(torch.zeros(n, 3), torch.arange(n) % 2) for n in (samples, 20)))

    return read_none


def small(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A builder with the arguments of a real one, whose model fits such samples."""

    @wraps(builder)
    def build(num_classes: int = 10, **args: Any) -> nn.Module:
        return nn.Linear(3, num_classes)

    return build


@pytest.fixture
def papers_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight GPUs, the datasets by their sizes, and small models in place of those with weights of their own."""
    monkeypatch.setattr("hvd_hetero.cluster.hardware._gpus", lambda: (GPUS, ""))
    readers = {name: stand_in(DATASETS[name], samples) for name, samples in SIZES.items()}
    monkeypatch.setattr("hvd_hetero.data.DATASETS", {**DATASETS, **readers})
    monkeypatch.setattr("hvd_hetero.models.MODELS", {name: small(builder) for name, builder in MODELS.items()})


@pytest.mark.horovod
@pytest.mark.parametrize("name", [name for name in COMPARISONS if name.endswith("_small")])
def test_small_comparisons_can_run_here(name: str, without_gpus: None, request: pytest.FixtureRequest) -> None:
    if not REAL:
        request.getfixturevalue("papers_server")
    check(read(COMPARISONS[name], []))


@pytest.mark.horovod
@pytest.mark.parametrize("name", [name for name in COMPARISONS if not name.endswith("_small")])
def test_the_papers_comparisons_can_run_on_the_papers_server(name: str, papers_server: None) -> None:
    check(read(COMPARISONS[name], []))


def test_every_method_is_in_the_comparison_of_all() -> None:
    for name in ("related_small", "related_jitter_small"):
        rows = read(COMPARISONS[name], []).rows
        assert {row.overrides.get("algorithm.name") for row in rows} == set(REGISTRY)


def test_every_table_and_figure_has_both_scales() -> None:
    names = {f"{what}_{scale}" for what in ("table1", "table2", "table3", "table6", "table7", "figure1", "figure4")
             for scale in ("paper", "small")}
    assert names <= COMPARISONS.keys()


@pytest.mark.parametrize("path", sorted((CONFIGS / "workloads").glob("[!b]*.yaml")), ids=lambda path: path.stem)
def test_workloads_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 25
