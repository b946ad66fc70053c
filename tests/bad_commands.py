"""Command lines, comparisons and runs that are refused, and objects that ``hvd_hetero.train`` refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bad_files import ALONE, Case, text
from torch import nn
from torch.utils.data import Dataset

COMPARED = ["compare", "{tmp}/c.yaml"]
PLAN = ["plan", "--samples", "1000", "--params", "10"]
BOTH = ["--step-ms", "fast=1,slow=2"]


def compared(content: str, begins: str, remedy: str, *words: str) -> Case:
    return Case(f"compare {begins}", text("c.yaml", content), [*COMPARED, *words], begins, remedy)


def run(**files: str) -> Callable[[Path], None]:
    """A run's folder in which every file can be read but those that are given."""

    def make(tmp: Path) -> None:
        sound = {"config": "algorithm: {name: x}", "metrics": '{"epoch": 1}', "plan": '{"classes": []}'}
        endings = {"config": "yaml", "metrics": "jsonl"}
        for name, content in (sound | files).items():
            (tmp / f"{name}.{endings.get(name, 'json')}").write_text(content)

    return make


REPORT = ["report", "{tmp}", "--out", "{tmp}/out"]

COMMANDS = [
    Case("no command", None, [], "the following arguments are required", "COMMAND"),
    Case("another command", None, ["trian"], "argument COMMAND", "'train'"),
    Case("launch option", None, ["launch", "--prnt"], "unrecognized", "--prnt"),
    Case("train option", None, ["train", "--print"], "unrecognized", "--print"),
    Case("train ranks", None, ["train"], "cluster.classes.slow.ranks=[1]", "start 2 ranks"),
    Case("train folder", None, ["train", *ALONE, "run.dir=/dev/null"], "run.dir=", "another"),
    Case("run nothing", None, ["run", "-np", "2"], "PROGRAM=''", "give a command"),
    Case("run nowhere", None, ["run", "python", "x.py"], "-np=None", "give -np"),
    Case("run nobody", None, ["run", "-np", "0", "python", "x.py"], "-np=0", "number of ranks"),
    Case("run too many", None, ["run", "-np", "3", "-H", "a:1,b:1", "python", "x.py"], "-np=3", "1 to 2"),
    Case("run hosts", None, ["run", "-H", "a:x", "python"], "-H='a:x'", "write for example"),
    Case("profile key", None, ["profile", "profile.secs=3"], "profile.secs=3", "profile.seconds"),
    Case("profile file", None, ["profile", "none.yaml"], "config file='none.yaml'", "path"),
    Case("doctor key", None, ["doctor", "train.epohs=3"], "train.epohs=3", "train.epochs"),
    Case("doctor option", None, ["doctor", "--all"], "unrecognized", "--all"),
    Case("plan nothing", None, ["plan"], "--step-ms=None", "fast=MILLISECONDS"),
    Case("plan class", None, [*PLAN, "--step-ms", "fast=1"], "--step-ms='fast=1'", "slow=MILLISECONDS"),
    Case("plan number", None, [*PLAN, "--step-ms", "fast=1,slow=x"], "--step-ms='fast=1,slow=x'", "slow=NUMBER"),
    Case("plan twice", None, [*PLAN, "--step-ms", "fast=1,fast=2"], "--step-ms=", "once"),
    Case("plan nan", None, [*PLAN, "--step-ms", "fast=nan,slow=2"], "--step-ms fast=nan", "above 0"),
    Case("plan samples", None, [*PLAN, *BOTH, "--samples", "x"], "argument --samples", "'x'"),
    Case("plan params", None, [*PLAN, *BOTH, "--params", "-1"], "--params=-1", "above 0"),
    Case("plan bandwidth", None, [*PLAN, *BOTH, "--bandwidth-mbit", "0"], "--bandwidth-mbit=0", "above 0"),
    Case("plan jitter", None, [*PLAN, *BOTH, "--jitter", "fast=3"], "--jitter=3.0", "standard deviation"),
    Case("plan out", None, [*PLAN, *BOTH, "--out", "/dev/null/x"], "--out='/dev/null/x'", "another folder"),
    Case("compare nothing", None, ["compare"], "CONFIG=''", "give one"),
    Case("compare two", None, ["compare", "a", "b"], "CONFIG='a b'", "give one"),
    compared("rows: 3", "rows=3", "label"),
    compared("rows: [3]", "rows[0]=3", "keys"),
    compared("rows: [{method: none}]", "row 'none': algorithm.name=", "sync_sgd"),
    compared("rows: [{method: sync_sgd, overrides: 3}]", "rows[0].overrides=3", "keys"),
    compared("rows: [{method: sync_sgd, times: 0}]", "rows[0].times=0", "above 0"),
    compared("rows: [{label: ///}, {label: ...}]", "rows='///'", "labels"),
    compared("rows: [{method: dlb}]\nseeds: [-1]", "seeds=[-1]", "0 or more"),
    compared("rows: [{method: dlb}]\nbudget: {equal: steps}", "budget.equal='steps'", "fast_steps"),
    compared("rows: [{method: dlb}]\nbase: none.yaml", "row 'dlb': config file=", "path"),
    compared("rows: [{method: dlb}]\nworkloads: {a: {bse: x}}", "workloads.a.bse=", "'base'"),
    compared("rows: [{method: dlb}]\ncompare: {timeout_sec: 0}", "compare.timeout_sec=0", "above 0"),
    compared("rows: [{method: dlb}]\ncompare: {dir: /dev/null/x}", "compare.dir=", "another folder"),
    compared("rows: [{method: dlb, overrides: {run.dir: /tmp}}]", "row 'dlb': run.dir=", "compare.dir"),
    compared("rows: [{method: dlb}]", "row 'dlb': run.name=", "compare.dir", "run.name=../x"),
    compared("rows: [{method: dlb}]", "rows=3: cannot be set", "in the file", "rows=3"),
    Case("report nothing", None, ["report"], "the following arguments", "RUN"),
    Case("report none", None, ["report", "/none"], "RUN='/none'", "run.dir"),
    Case("report yaml", run(config="{"), REPORT, "RUN=", "anew"),
    Case("report number", run(config="3"), REPORT, "RUN=", "anew"),
    Case("report foreign", run(config="a: 1"), REPORT, "RUN=", "leave the run out"),
    Case("report cut", run(metrics='{"a": '), REPORT, "RUN=", "anew"),
    Case("report rows", run(metrics="3"), REPORT, "RUN=", "anew"),
    Case("report plan", run(plan="[]"), REPORT, "RUN=", "anew"),
    Case("report summary", run(summary='{"eval": 3}'), REPORT, "RUN=", "anew"),
    Case("report out", run(), ["report", "{tmp}", "--out", "/dev/null/x"], "--out='/dev/null/x'", "another folder"),
]


# ---- objects --------------------------------------------------------------------------------------------------------


X, Y = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
GOOD: dict[str, Any] = {"model": lambda: nn.Linear(4, 3), "train_data": (X, Y), "test_data": (X, Y)}


class Items(Dataset[Any]):
    """A map-style dataset of what a function makes of an index."""

    def __init__(self, item: Callable[[int], Any]) -> None:
        self.item = item

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


def raises(*args: Any) -> Any:
    raise OSError("no such thing")


OBJECTS: list[tuple[str, dict[str, Any], str, str]] = [
    ("model number", {"model": 3}, "model='int'", "torch.nn.Module"),
    ("model class", {"model": nn.Linear}, "model='Linear'", "without arguments"),
    ("model function", {"model": lambda: 3}, "model=", "torch.nn.Module"),
    ("model raises", {"model": raises}, "model='raises'", "without arguments"),
    ("model frozen", {"model": nn.Linear(4, 3).requires_grad_(False)}, "model='Linear'", "some to train"),
    ("model nothing", {"model": nn.Identity()}, "model='Identity'", "some to train"),
    ("model double", {"model": nn.Linear(4, 3).double()}, "model='Linear'", "fit together"),
    ("model half", {"model": nn.Linear(4, 3).half(), "overrides": {"train.autocast": "fp16"}}, "train.autocast='fp16'",
     "in float32"),
    ("model meta", {"model": nn.Linear(4, 3, device="meta")}, "model='weight': this parameter", "load or initialize"),
    ("model tuple", {"model": nn.LSTM(4, 3)}, "train.loss=", "fit together"),
    ("data number", {"train_data": 3}, "train_data=3", "map-style"),
    ("data text", {"train_data": "images"}, "train_data='images'", "map-style"),
    ("data without test", {"test_data": None}, "test_data=None", "give both"),
    ("data without train", {"train_data": None}, "train_data=None", "give both"),
    ("data uneven", {"train_data": (X, Y[:3])}, "train_data=[64, 4] float32", "one target for each"),
    ("data empty", {"train_data": (X[:0], Y[:0])}, "train_data='tuple'", "one sample"),
    ("data scalar", {"train_data": (X, torch.tensor(3))}, "train_data=[] int64", "tensors [N, ...]"),
    ("data raises", {"train_data": Items(raises)}, "train_data='Items'", "correct the dataset"),
    ("data alone", {"train_data": Items(lambda i: X[i])}, "data item=[4] float32", "MapSource(dataset, collate=...)"),
    ("data texts", {"train_data": Items(lambda i: (X[i], "cat"))},
     "train.loss='cross_entropy'", "make model, data, loss"),
    ("data dict", {"train_data": Items(lambda i: {"x": X[i]})}, "data={x: [2, 4] float32}", "'labels'"),
    ("data ragged", {"train_data": Items(lambda i: (X[i][: 1 + i], 1))},
     "data item[0]=[2] float32", "make the items alike"),
    ("labels late", {"train_data": (X, torch.cat([Y[1:], Y[:1] + 7]))}, "model=", "number of classes"),
    ("labels of the test", {"test_data": (X, Y + 1)}, "model=", "number of classes"),
    ("labels float", {"train_data": (X, Y.float())}, "train.loss=", "fit together"),
    ("inputs nan", {"train_data": (X * float("nan"), Y)}, "train.loss=", "look at the data"),
    ("inputs integer", {"train_data": (X.long(), Y)}, "model=", "fit together"),
    ("loss number", {"loss": 3}, "loss='int'", "fit together"),
    ("loss mean", {"loss": nn.functional.cross_entropy}, "loss='cross_entropy'", "reduction='none'"),
    ("loss sum", {"loss": nn.CrossEntropyLoss(reduction="sum")}, "loss='CrossEntropyLoss'", "reduction='none'"),
    ("loss none", {"loss": lambda out, y: None}, "loss=", "return a tensor"),
    ("loss detached", {"loss": lambda out, y: out.detach().sum(1)}, "loss=", "functions of torch"),
    ("optimizer text", {"optimizer": "SGD"}, "optimizer='str'", "function of the parameters"),
    ("optimizer made", {"optimizer": torch.optim.SGD([nn.Parameter(X)], lr=1)}, "optimizer='SGD'", "function of the"),
    ("optimizer none", {"optimizer": lambda params: None}, "optimizer=", "torch.optim.Optimizer"),
    ("optimizer else", {"optimizer": lambda params: torch.optim.SGD([nn.Parameter(X)], lr=1)}, "optimizer=", "called"),
    ("optimizer closure", {"optimizer": torch.optim.LBFGS}, "optimizer='LBFGS'", "along a gradient"),
    ("scheduler number", {"scheduler": 3}, "scheduler='int'", "arguments"),
    ("scheduler metric", {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, "scheduler='Reduce", "arguments"),
    ("metrics number", {"metrics": 3}, "metrics=3", "{accuracy: accuracy}"),
    ("metric number", {"metrics": {"m": 3}}, "metrics.m=3", "a function of outputs and targets"),
    ("metric mean", {"metrics": {"m": lambda out, y: 1.0}}, "metrics.m=", "reduction='none'"),
    ("metric of the set", {"metrics": {"m": {"target": lambda out, y: y, "over": "dataset"}}}, "metrics.m=",
     "return one number"),
    ("config number", {"config": 3}, "config=3", "YAML file"),
    ("config dict", {"config": {"train": 3}}, "config={'train': 3}", "YAML file"),
    ("config none", {"config": "none.yaml"}, "config file='none.yaml'", "path"),
    ("overrides number", {"overrides": 3}, "overrides=3", "key=value"),
    ("overrides text", {"overrides": "train.epochs=3"}, "overrides='train.epochs=3'", "key=value"),
    ("overrides keys", {"overrides": {3: 4}}, "overrides={3: 4}", "key=value"),
    ("overrides object", {"overrides": {"train.lr": torch.tensor(0.1)}}, "train.lr=tensor", "float"),
    ("overrides function", {"overrides": {"model.args": {"f": print}}}, "model.args=", "dict"),
    ("overrides set", {"overrides": {"train.batch_size": {1, 2}}}, "train.batch_size={1, 2}", "plain YAML"),
]
