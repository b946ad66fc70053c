"""A process that takes steps and compiles nothing does without torch's compiler; for others it is as ever."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEPS = """
import inspect
import sys
import torch
from hvd_hetero.worker.worker import Worker

loss = lambda outputs, targets: (outputs - targets).square().mean(1)
worker = Worker(torch.nn.Linear(3, 1), loss, lambda params: torch.optim.Adam(params, lr=0.1), None)

def step():
    before = worker.model.weight.detach().clone()
    worker.gradient(torch.ones(2, 3), torch.zeros(2, 1))
    worker.apply()
    worker.optimizer.zero_grad()
    worker.optimizer.load_state_dict(worker.optimizer.state_dict())
    assert not torch.equal(before, worker.model.weight)

step()
inspect.getmodule(step)
loaded = [name for name in sys.modules if name.startswith("torch._dynamo.")]
assert not loaded, loaded
"""
AFTER = """
import types
assert type(torch._dynamo) is types.ModuleType and torch._dynamo is sys.modules["torch._dynamo"]
step()
step()
for method in (torch.optim.Optimizer.zero_grad, torch.optim.Optimizer.state_dict):
    assert getattr(method.__wrapped__, "__dynamo_disable")._torchdynamo_disable, method
assert torch.compile(lambda x: 2 * x, backend="eager", fullgraph=True)(torch.ones(1)).item() == 2
"""


@pytest.mark.parametrize("asks", [
    "torch.compile(torch.nn.Linear(2, 2), backend='eager')(torch.ones(1, 2))",
    "import torch._dynamo.config",
    "from torch._dynamo import reset",
    "torch._dynamo.disable(recursive=False)",
    "torch._dynamo.reset()",
])
def test_the_compiler_is_imported_by_those_who_ask_for_it(asks: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"{STEPS}\n{asks}\n{AFTER}"], capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
