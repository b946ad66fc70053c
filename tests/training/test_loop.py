"""``hvd_hetero.Loop`` beyond its example: it does what ``train`` does, with steps that a program takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hvd_hetero as package
from hvd_hetero.errors import UserError

pytestmark = pytest.mark.horovod

BUSY_SEC, STEP_SEC, SLOWDOWN = 64, 0.5, 1000
PROGRAM = f"""
import torch
import hvd_hetero
from hvd_hetero.telemetry import emulation, stopwatch

class Clock:
    now = slept = 0.0

    def thread_time(self):
        return self.now

    def perf_counter(self):
        return self.slept

    def sleep(self, seconds):
        self.slept += seconds

clock = emulation.time = stopwatch.time = Clock()
settings = {{"cluster.classes": {{"slow": {{"ranks": [0], "slowdown": {SLOWDOWN}, "threads": 1}}}},
             "train.tau": {{"slow": 2}}, "train.batch_size": 4, "train.epochs": 1}}
loop = hvd_hetero.Loop(torch.nn.Linear(3, 2), (torch.randn(16, 3), torch.zeros(16, dtype=torch.long)), settings)
steps = 0
for round in loop:
    clock.now += {BUSY_SEC}
    for inputs, targets in round:
        losses = torch.nn.functional.cross_entropy(loop.model(inputs), targets, reduction="none")
        losses.mean().backward()
        clock.now += {STEP_SEC}
        round.losses(losses)
        steps += 1
loop.close()
print(steps, clock.slept)
"""


def test_what_a_program_does_between_rounds_is_not_stretched(tmp_path: Path) -> None:
    """Only its steps are."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    steps, slept = done.stdout.split()[-2:]
    assert steps == "4"
    assert float(slept) == 4 * STEP_SEC * (SLOWDOWN - 1)


WEIGHTS = """
import torch
import hvd_hetero
from hvd_hetero.errors import UserError

inputs, targets = torch.randn(16, 3), torch.arange(16) % 2
settings = {"cluster.classes": {"only": {"ranks": [0], "threads": 1}}, "train.tau": {"only": 2}, "train.batch_size": 4,
            "train.epochs": 1}
loop = hvd_hetero.Loop(torch.nn.Linear(3, 2), (inputs, targets), settings)
for round in loop:
    for x, y in round:
        losses = torch.nn.functional.cross_entropy(loop.model(x), y, reduction="none")
        for wrong in (losses[:3], losses.mean(), None):
            try:
                round.losses(wrong)
            except UserError as error:
                print(error)
        round.losses(losses, y == 1)
print((loop._trainer.feed.sampler.losses == -float("inf")).tolist() == (targets == 0).tolist())
loop.close()
"""


def test_losses_that_are_not_one_a_sample_are_refused_and_some_do_not_count(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WEIGHTS], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    *refused, last = [line for line in done.stdout.splitlines() if line.startswith("round.losses") or line == "True"]
    assert last == "True"
    output = [line.partition("; ")[0] for line in refused[:3]]
    assert output == ["round.losses=[3] float32: is not per sample: a batch of 4 gives [3]",
                    "round.losses=[] float32: is not per sample: a batch of 4 gives []",
                    "round.losses=None: is not per sample: a batch of 4 gives NoneType"]  # fmt: skip


# ---- on two ranks: tests/ranks/loop_cases.py ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, horovodrun: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("loops")
    script = Path(__file__).parents[1] / "ranks" / "loop_cases.py"
    done = horovodrun(2, [sys.executable, script, folder], cwd=folder, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def output(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["plain", "rich", "delayed"])
def test_a_loop_trains_the_model_that_train_trains(name: str, folder: Path, output: list[dict[str, Any]]) -> None:
    """Bit by bit: with an outer optimizer, schedules and averaged states, or with delayed averages."""
    by_train, by_loop = (torch.load(folder / run / "checkpoint" / "model.pt", weights_only=True)
                         for run in (name, f"{name}-loop"))
    assert all(torch.equal(by_train[key], by_loop[key]) for key in by_train)
    assert output[0][name] == output[1][name]
    rows = [[json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
            for run in (name, f"{name}-loop")]
    same = ("epoch", "round", "samples_seen", "train_loss", "lr", "tau")
    assert [[row[key] for key in same] for row in rows[0]] == [[row[key] for key in same] for row in rows[1]]
    assert "eval_loss" in rows[0][0] and "eval_loss" not in rows[1][0]
    assert json.loads((folder / f"{name}-loop" / "summary.json").read_text())["rounds"] == 21


def test_tau_is_measured_on_the_programs_own_steps_which_are_put_back(output: list[dict[str, Any]]) -> None:
    for found in (each["measured"] for each in output):
        assert found["measured"] >= 3
        assert found["first"] == {"weights": found["before"], "state": 0, "number": 1, "counter": 0}
        assert found["taus"][0] == 9 and 1 <= found["taus"][1] < 9  # the slow rank is a fast one that sleeps


def test_tau_auto_is_chosen_by_the_programs_own_steps_and_an_average(output: list[dict[str, Any]]) -> None:
    """With any overhead allowed, the shortest round in which the slower rank takes a step; asked for too early, it says
    so.
    """
    for found in (each["chosen"] for each in output):
        assert len(found["said"]) >= 3 and set(found["said"]) == {
            "True: there is no plan yet: with train.tau=auto it goes by steps that are timed in the first rounds; ask "
            "in a round whose measures is False, or later"}  # fmt: skip
        assert not found["first"]["measures"] and found["first"]["weights"] == found["before"]
        assert min(found["first"]["taus"]) == 1  # whichever rank is the slower one where other work goes on
        assert found["average_sec"] > 0
    assert output[0]["chosen"]["first"]["taus"] == output[1]["chosen"]["first"]["taus"]


def test_a_loop_goes_on_from_states_that_the_program_has_kept(output: list[dict[str, Any]]) -> None:
    for found in (each["resumed"] for each in output):
        assert found["rounds"] == list(range(1, 22))
        assert found["numbers"] == list(range(13, 22))  # of round 12: the last due one below 15
        assert found["again"] == found["end"]
        assert found["last_due"]


def test_all_samples_of_a_stream_are_taken_once_each_by_the_rank_that_has_time(output: list[dict[str, Any]]) -> None:
    fast, slow = (each["streamed"]["seen"] for each in output)
    assert [len(part) for part in fast] == [12] * 12 and [len(part) for part in slow] == [4] * 12
    taken = [number for pair in zip(fast, slow, strict=True) for part in pair for number in part]
    assert sorted(taken[:100]) == list(range(100))  # 6 rounds and a quarter: then the stream begins anew
    assert taken[:100] != sorted(taken[:100]) and sorted(taken[100:]) != taken[100:192]
    assert [each["streamed"]["again"] for each in output] == [fast[8:], slow[8:]]


def test_batches_of_a_loader_with_an_order_of_its_own(output: list[dict[str, Any]]) -> None:
    fast, slow = (each["streamed"]["batches"] for each in output)
    order = [list(range(239 - 4 * k, 235 - 4 * k, -1)) for k in range(60)]
    assert fast == [batch for k, batch in enumerate(order) if k % 4 < 3]
    assert slow == [batch for k, batch in enumerate(order) if k % 4 == 3]
    assert output[0]["streamed"]["sizes"] == [8, 8]  # of a shuffling loader, whose samples are dealt


def test_a_loop_goes_on_with_other_ranks(output: list[dict[str, Any]]) -> None:
    """Nothing of the stream is passed over or comes twice; what the program keeps is the first rank's on a new one."""
    (fast, again), (slow, late) = (each["reshaped"] for each in output)
    before = fast["seen"] + slow["seen"]
    assert len(set(before)) == len(before) == 4 * 16  # to the newest checkpoint, of round 4
    first = [n for k in range(3) for n in again["seen"][12 * k : 12 * k + 12] + late["seen"][4 * k : 4 * k + 4]][:36]
    assert sorted(before + first) == list(range(100))
    assert again["kept"] == {"note": 12, "optimizer": [12]} and late["kept"] == {"note": 12, "optimizer": []}


def test_partial_averages_and_leaving_early(output: list[dict[str, Any]]) -> None:
    assert output[0]["solo"] == output[1]["solo"]
    assert output[0]["left"] == output[1]["left"]


# ---- what is refused ------------------------------------------------------------------------------------------------

ALONE = {"cluster.classes": {"a": {"ranks": [0]}}, "train.tau": {"a": 2}, "train.epochs": 1}
DATA = (torch.randn(16, 3), torch.zeros(16, dtype=torch.long))


class Endless(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield torch.zeros(3), 0


@pytest.mark.parametrize(("data", "settings", "message"), [
    (DATA, {"train.clip_norm": 1.0}, "train.clip_norm=1.0: is for the trainer's own steps"),
    (DATA, {"algorithm.name": "sync_sgd"}, "algorithm.name='sync_sgd': takes its steps itself"),
    (Endless(), {}, "samples=None: this Endless tells no length"),
    (torch.utils.data.DataLoader(Endless(), batch_size=8), {"train.batch_size": 3, "train.epochs": 2}, "samples=None"),
    (iter([1]), {}, "train_data=list_iterator: is an iterator"),
    (DATA, {"cluster.classes": {"a": {"ranks": [0]}, "b": {"ranks": [1], "role": "evaluate"}}, "train.tau": 2},
     "cluster.classes.b.role='evaluate': a hand-written loop steps on every rank"),
])  # fmt: skip
def test_what_a_loop_refuses(data: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        package.Loop(torch.nn.Linear(3, 2), data, {**ALONE, **settings})
    assert str(caught.value).startswith(message), caught.value


FAILING = """
import json, sys, torch
import hvd_hetero
from hvd_hetero.errors import UserError
from torch import nn

class Short(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([])

settings = {"cluster.classes": {"a": {"ranks": [0], "threads": 1}}, "train.tau": {"a": 2}, "train.batch_size": 4,
            "train.epochs": 1}
data = torch.randn(16, 3), torch.zeros(16, dtype=torch.long)

def run(data, each, **more):
    try:
        with hvd_hetero.Loop(nn.Linear(3, 2), data, settings, **more) as loop:
            for round in loop:
                each(round)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def raises(round):
    for x, y in round:
        raise KeyError("mine")

said = [run(data, lambda round: None), run(data, list), run(data, raises), run(Short(), list, samples=16)]
uniform = dict(settings)
settings["sampling.scheme"] = "uniform"
said.append(run(data, list))

class Two(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, number):
        return torch.zeros(3), [torch.tensor([0.0]), torch.tensor([1.0, 2.0])]

def boxes(items):
    return torch.stack([x for x, _ in items]), torch.cat([box for _, parts in items for box in parts])

def trains(round):
    for x, y in round:
        assert len(x) == 4 and len(y) == 12
        round.losses(torch.ones(4))

said.append(run(Two(), list))
said.append(run(torch.utils.data.DataLoader(Two(), 4, collate_fn=boxes), trains))
print("SAID", json.dumps(said))
"""


def test_what_a_program_does_wrong_in_a_round(tmp_path: Path) -> None:
    """It is raised where the program is, and another loop may follow."""
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    output = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("SAID"))[5:])
    assert output[:3] == [
        "RuntimeError: a round has 2 batches, of which 0 were taken: go through the whole round",
        "RuntimeError: a round has 2 batches, got losses of 0: call round.losses for each batch", "KeyError: 'mine'",
    ]  # fmt: skip
    assert output[3].startswith("ConfigError: train_data='Short': ends after 0 samples")  # seen when items are compared
    assert output[4] is None  # nothing is dealt by losses
    assert output[5:] == [None, None]  # two targets of all samples in a list, or more targets than samples
