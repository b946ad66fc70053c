"""torch's compiler is not imported by a run that compiles nothing, and is all there for one that does."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

TRAINS = """
import hvd_hetero, torch
settings = {"cluster.classes": {"a": {"ranks": [0], "threads": 1}}, "train.tau": {"a": 2}, "train.batch_size": 4,
            "train.epochs": 1, "train.optimizer": "Adam", "train.scheduler": "StepLR", "train.optimizer_args": {},
            "train.scheduler_args": {"step_size": 1}, "run.trackers": []}
data = torch.randn(16, 3), torch.zeros(16, dtype=torch.long)
hvd_hetero.train(None, settings, model=torch.nn.Linear(3, 2), train_data=data, test_data=data)
"""
COMPILES = """
import json, sys
from importlib.util import find_spec
import torch
from hvd_hetero import compiler_help

compiler_help.install()
layer = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(layer.parameters(), 0.1)
found = ["torch._dynamo.eval_frame" in sys.modules, find_spec("torch._dynamo").name]
before = torch.optim.Optimizer.zero_grad
doubled = torch.compile(lambda x: 2 * x, backend="eager")
found += [doubled(torch.ones(1)).item(), sys.modules["torch._dynamo"] is torch._dynamo, torch._dynamo.__name__]
import torch._dynamo.config
from torch._dynamo import is_compiling
layer(torch.ones(1, 2)).sum().backward()
optimizer.step()
optimizer.zero_grad()

@torch.compile(backend="eager")
def step():
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()

step()
found += [is_compiling(), hasattr(torch._dynamo, "__file__"), layer.weight.grad is None]
compiler_help.install()
found.append(type(sys.modules["torch._dynamo"]).__name__)
disable = compiler_help.StandIn.disable  # as a decorator with arguments, and of a module
found += [disable()(lambda x: x + 1)(1), isinstance(disable(layer), torch.nn.Module)]
print(json.dumps(found))
"""

IMPORTS_A_PART_FIRST = """
import sys
import torch
from hvd_hetero import compiler_help

compiler_help.install()
from torch._dynamo.eval_frame import OptimizedModule
import torch._dynamo.config as config
import torch._dynamo.utils
compiled = torch.compile(torch.nn.Linear(2, 2), backend="eager")
print(isinstance(compiled, OptimizedModule), config is torch._dynamo.config, config is sys.modules[config.__name__],
      torch._dynamo.utils.config is config, type(config.__spec__.loader).__name__)
"""


def last_line(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.horovod
def test_a_run_that_compiles_nothing_does_without() -> None:
    assert last_line(f"{TRAINS}\nimport sys\nprint('torch._dynamo.eval_frame' in sys.modules)") == "False"


def test_who_asks_for_a_part_of_the_compiler_first_has_the_same_part() -> None:
    assert last_line(IMPORTS_A_PART_FIRST).split()[:4] == ["True"] * 4


def test_who_compiles_has_the_compiler_itself() -> None:
    """Also for what was decorated before it was there."""
    found = json.loads(last_line(COMPILES))
    assert found == [False, "torch._dynamo", 2.0, True, "torch._dynamo", False, True, True, "module", 2, True]
