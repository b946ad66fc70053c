"""``train.micro_batches=auto``: as few as memory allows, told, kept in the checkpoint, and the same model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.horovod

PROGRAM = """
import sys
import torch
import hvd_hetero

most = 3

class Net(torch.nn.Linear):
    def forward(self, x):
        if self.training and len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)

def net():
    torch.manual_seed(1)
    return Net(3, 2).double()

data = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(64) % 2

def run(folder, parts, epochs):
    made = net()
    settings = {"cluster.classes": {"only": {"ranks": [0]}}, "train.tau": 2, "train.batch_size": 8, "train.lr": 0.1,
                "train.micro_batches": parts, "train.epochs": epochs, "run.dir": f"{sys.argv[1]}/{folder}",
                "run.resume": "auto"}
    summary = hvd_hetero.train(None, settings, model=made, train_data=data, test_data=data)
    return [p.detach() for p in made.parameters()], summary["classes"][0]["micro_batches"]

_, first = run("a", "auto", 1)
most = 64
found, second = run("a", "auto", 2)
expected, _ = run("b", 1, 2)
print(first, second)
torch.testing.assert_close(found, expected)
"""


def test_micro_batches_are_chosen_by_memory_told_and_kept(tmp_path: Path) -> None:
    """A resumed run goes on with what was chosen, though more would fit; the model is that of whole batches."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "4 4"
    assert done.stdout.count("class only: train.micro_batches=4, of 2 samples") == 1
