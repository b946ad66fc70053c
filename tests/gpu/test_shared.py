"""Ranks that share one GPU: of different classes, one of them emulated to be slow, and of one class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_gpu.cases import ALL_ON_ONE, SHARED

from gpu.test_methods import assert_close, assert_same, expected, training

GROUPS = ("shared", "all on one")
Ran = Callable[..., Any]


@pytest.mark.parametrize("name", [*SHARED, *ALL_ON_ONE])
def test_ranks_on_one_gpu(ran: Ran, name: str) -> None:
    found, case = ran(*GROUPS).of(name), {**SHARED, **ALL_ON_ONE}[name]
    assert_same(found, training(found))
    if case.model == "digits":
        assert found[0]["summary"]["eval"]["final_accuracy"] > 0.8
        return
    wanted = expected(case, {rank: mine["dealt"] for rank, mine in enumerate(found)})
    for tensor, value in found[training(found)[0]]["model"].items():
        assert_close(value, wanted[tensor], name)


def test_the_slow_class_takes_fewer_steps(ran: Ran, device: str) -> None:
    """It is emulated to take four times as long, on the same GPU."""
    fast, slow, _ = ran(*GROUPS).of("two classes, digits")[0]["summary"]["classes"]
    assert slow["tau"] < fast["tau"]
    if device == "cuda":
        assert fast["peak_gpu_bytes"] > 0 and slow["peak_gpu_bytes"] > 0


def test_launch_shares_a_gpu_where_that_is_asked_for(
    hvd_hetero: Callable[..., Any], tmp_path: Path, device: str
) -> None:
    if device == "cpu":
        pytest.skip("there is no GPU to be shared")
    gpus = torch.cuda.device_count()
    classes = f"{{a: {{device: cuda, ranks: [0]}}, b: {{device: cuda, ranks: '1-{gpus}', slowdown: 4}}}}"
    words = [f"cluster.classes={classes}", "train.epochs=2", "train.tau=16", f"run.dir={tmp_path / 'run'}"]
    refused = hvd_hetero(["launch", *words], cwd=tmp_path)
    assert refused.returncode == 2 and "cluster.share_gpus=true" in refused.stderr
    done = hvd_hetero(["launch", *words, "cluster.share_gpus=true"], cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "GPU GB" in done.stdout


def test_out_of_memory_names_class_and_batch(hvd_hetero: Callable[..., Any], tmp_path: Path, device: str) -> None:
    if device == "cpu":
        pytest.skip("a CPU has no memory of its own")
    (tmp_path / "large.py").write_text(LARGE)
    words = ["model.target=large:model", "data.target=large:data", "cluster.classes={big: {device: cuda, ranks: [0]}}",
             "train.batch_size=1024", "train.tau=1", "train.loss_args={}", f"run.dir={tmp_path / 'run'}"]
    done = hvd_hetero(["launch", *words], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, timeout=200)
    assert done.returncode == 2, done.stderr
    assert "class big is out of GPU memory" in done.stderr and "would fit" in done.stderr


LARGE = """
import torch

class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(8, 2)
    def forward(self, x):
        wide = self.head(x).repeat(1, 1 << 26).exp()  # 0.5 GB a sample
        return wide[:, :2]

def model(): return Wide()
def data():
    x = torch.randn(2048, 8)
    return (x, (x[:, 0] > 0).long()), (x[:4], (x[:4, 0] > 0).long())
"""
