"""Real ranks get what was typed and what is set, to the last character, here and on another host."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from together import together

pytestmark = pytest.mark.horovod

MODULE = """
import json, os, sys, torch

def data(**args):
    if "HOROVOD_RANK" in os.environ:
        names = [name for name in os.environ if name.startswith(("MY_", "HF_")) or name == "PYTHONHASHSEED"]
        said = {"args": args, "cwd": os.getcwd(), "hash": hash("some text"),
                "environment": {name: os.environ[name] for name in names}}
        with open(f"rank{os.environ['HOROVOD_RANK']}.json", "w") as file:
            json.dump(said, file)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return (x, (x[:, 0] > 0).long()), (x[:9], (x[:9, 0] > 0).long())
"""
CONFIG = """
data: {target: "own_exact:data"}
model: {args: {in_features: 8, num_classes: 2}}
train: {epochs: 1, tau: {fast: 4, slow: 2}}
cluster: {classes: {fast: {ranks: [0]}, slow: {ranks: [1]}}}
"""
ODD = ["#5", "a #b", "007", "1:30", "a: b", "it's", 'say "x"', "数据", "$HOME `x` $(x) ; | & > <", "two\nlines\n", "*",
       "\\", "a,b={c} [d]", " x "]
SSH = """#!/bin/sh
# Another host as far as the shell goes: its own directory and environment, and a command that it parses anew.
while [ "${1#-}" != "$1" ]; do shift 2; done
shift
while [ "${1#-}" != "$1" ]; do shift 2; done
cd / && exec env -i PATH="$PATH" HOME="$HOME" sh -c "$*"
"""


def folder(tmp_path: Path, name: str) -> Path:
    made = tmp_path / name
    (made / "sweeps" / "lr=0.1").mkdir(parents=True)
    (made / "own_exact.py").write_text(MODULE)
    (made / "sweeps" / "lr=0.1" / "config #1.yaml").write_text(CONFIG)
    return made


def check(here: Path, args: dict[str, Any], variables: dict[str, str]) -> None:
    told = [json.loads((here / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1], "one seed of hashes for all"
    assert told[0]["args"] == args and told[0]["cwd"] == str(here)
    assert told[0]["environment"] == {**variables, "PYTHONHASHSEED": "7"}
    assert (here / "runs" / "a=b #c" / "summary.json").exists()


def test_words_and_variables_reach_ranks_unchanged(hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    """In folders whose names a shell takes apart, too."""
    args = {f"x{i}": text for i, text in enumerate(ODD)}
    words = ["launch", "sweeps/lr=0.1/config #1.yaml", *(f"data.args.{key}={text}" for key, text in args.items()),
             "run.dir=runs/a=b #c", "run.seed=7", "launch.environment=[MY_*]"]
    variables = {"MY_TEXT": "".join(ODD), "MY_EMPTY": "", "HF_HOME": "/some where/$x"}
    here, there = folder(tmp_path, "a b;c"), folder(tmp_path, "it's $HOME")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    other = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)}  # it keeps which hosts answer
    set_ = {**variables, "HF_TOKEN": "hunter2", "YOUR_TEXT": "x", "PYTHONHASHSEED": ""}
    done = together(
        lambda: hvd_hetero(words, cwd=here, env=set_),
        lambda: hvd_hetero([*words, "cluster.hosts=127.0.0.2:2"], cwd=there, env=set_ | other),
    )
    for each, place in zip(done, (here, there), strict=True):
        assert each.returncode == 0, each.stdout + each.stderr
        check(place, args, variables)
