"""Whole runs under real horovodrun: what they leave behind, the same twice, and how they end when a rank fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from socket import AF_INET
from typing import Any

import psutil
import pytest
import torch
from together import together

from hvd_hetero import algorithms, data, models
from hvd_hetero.config.load import load
from hvd_hetero.launch import launcher

ROOT = Path(__file__).parents[2]
RANKS = Path(__file__).parents[1] / "ranks"
DEFAULT = ROOT / "configs" / "default.yaml"
CLASS_KEYS = {
    "excluded", "overflows", "dropped", "sent_bytes",
    "name", "device", "ranks", "tau", "batch_size", "weight", "slowdown", "step_sec", "steps", "samples", "time_sec",
    "blocked_fraction", "peak_gpu_bytes", "micro_batches",
}
SUMMARY_KEYS = {
    "algorithm", "world_size", "seed", "emulated", "emulation", "rounds", "epochs", "samples_seen", "wall_sec",
    "train_sec", "path", "round_way", "eval", "classes",
}
EVAL_KEYS = {"final_accuracy", "best_accuracy", "final_loss"}
TIME_KEYS = {"compute", "data", "blocked", "comm"}

Run = tuple[Path, "subprocess.CompletedProcess[str]"]


def summary_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    content: dict[str, torch.Tensor] = torch.load(folder / "checkpoint" / "model.pt", weights_only=True)
    return content


def assert_adds_up(folder: Path) -> dict[str, Any]:
    """What holds of every summary, whatever was run; returns it."""
    summary = summary_of(folder)
    classes = summary["classes"]
    assert sum(c["weight"] * len(c["ranks"]) for c in classes) == pytest.approx(1, rel=1e-12)
    assert sorted(rank for c in classes for rank in c["ranks"]) == list(range(summary["world_size"]))
    assert summary["samples_seen"] == sum(c["samples"] for c in classes)
    for c in classes:
        assert c["steps"] == summary["rounds"] * c["tau"] * len(c["ranks"])
        assert c["samples"] == c["steps"] * c["batch_size"]
        total = sum(c["time_sec"].values())
        assert all(seconds >= -1e-9 for seconds in c["time_sec"].values())
        assert c["blocked_fraction"] == pytest.approx(c["time_sec"]["blocked"] / total)
        assert c["step_sec"] == pytest.approx(
            (c["time_sec"]["compute"] + c["time_sec"]["data"]) * len(c["ranks"]) / c["steps"])
        if c["ranks"] == [0]:
            assert total == pytest.approx(summary["train_sec"]), "no second of rank 0 is unaccounted for"
    return summary


# ---- the default run, through the launcher --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default_run(hvd_hetero: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three epochs of the default run with tau from measured speeds."""
    folder = tmp_path_factory.mktemp("default") / "run"
    settings = ["train.epochs=3", "train.tau=128", "train.adapt_tau=false", "profile.seconds=0.5"]
    done = hvd_hetero(["launch", DEFAULT, f"run.dir={folder}", *settings])
    assert done.returncode == 0, done.stderr
    return folder, done


def test_summary_has_the_documented_keys(default_run: Run) -> None:
    summary = summary_of(default_run[0])
    assert set(summary) == SUMMARY_KEYS
    assert set(summary["eval"]) == EVAL_KEYS
    for c in summary["classes"]:
        assert set(c) == CLASS_KEYS
        assert set(c["time_sec"]) == TIME_KEYS
    documented = (ROOT / "docs" / "results.md").read_text()
    for key in SUMMARY_KEYS | EVAL_KEYS | CLASS_KEYS | TIME_KEYS:
        assert key in documented, f"{key} is not documented"


def test_summary_adds_up(default_run: Run) -> None:
    summary = assert_adds_up(default_run[0])
    assert (summary["algorithm"], summary["world_size"], summary["seed"]) == ("biased_local_sgd", 2, 0)
    assert summary["emulated"] is True and summary["epochs"] == 3
    fast, slow = summary["classes"]
    assert (fast["name"], fast["device"], fast["ranks"], fast["slowdown"]) == ("fast", "cpu", [0], 1.0)
    assert (slow["name"], slow["device"], slow["ranks"], slow["slowdown"]) == ("slow", "cpu", [1], 8.0)
    assert fast["tau"] == 128 and 1 <= slow["tau"] < 128, "the slow class's tau is derived from its measured speed"
    assert fast["weight"] == pytest.approx(128 / (128 + slow["tau"]))


def test_a_row_an_epoch(default_run: Run) -> None:
    rows, summary = rows_of(default_run[0]), summary_of(default_run[0])
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    for row, before in zip(rows[1:], rows, strict=False):
        for key in ("round", "samples_seen", "wall_sec", "train_sec"):
            assert row[key] > before[key]
    last = rows[-1]
    assert (last["round"], last["samples_seen"]) == (summary["rounds"], summary["samples_seen"])
    assert last["eval_accuracy"] == summary["eval"]["final_accuracy"]
    assert last["eval_loss"] == summary["eval"]["final_loss"]
    assert summary["eval"]["best_accuracy"] == max(row["eval_accuracy"] for row in rows)
    assert set(last["blocked_fraction"]) == set(last["memory_bytes"]) == {"fast", "slow"}
    assert all(10**8 < size < 10**11 for size in last["memory_bytes"].values()), "of a process that has torch in it"
    assert rows[0]["left_sec"] > 0 and last["left_sec"] == 0
    assert last["overflows"] == {"fast": 0, "slow": 0}
    assert re.search(r"^epoch 3/3  0 s left .*  GB fast [0-9.]+ slow [0-9.]+$", default_run[1].stderr, re.MULTILINE)


def test_it_learns(default_run: Run) -> None:
    """Three epochs take a network that guesses (10 %) most of the way."""
    rows = rows_of(default_run[0])
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert summary_of(default_run[0])["eval"]["best_accuracy"] > 0.7


def test_the_folder_of_a_run(default_run: Run) -> None:
    folder = default_run[0]
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoint", "tensorboard", "environment.json"} <= names
    assert not [name for name in names if name.endswith(".part")]
    config = load([folder / "config.yaml"], (), algorithms.method)
    assert config.train.epochs == 3 and config.profile.seconds == 0.5 and config.run.dir == str(folder)
    assert config.sampling.scheme == "separate", "what the method decided is written down"
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["versions"]["horovod"]["version"] == "0.28.1"
    assert [fact["rank"] for fact in environment["ranks"]] == [0, 1]
    assert f"run.dir={folder}" in environment["command"]


def test_tensorboard_has_the_numbers_of_the_rows(default_run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(default_run[0] / "tensorboard"))
    events.Reload()
    rows = rows_of(default_run[0])
    shown = events.Scalars("eval_accuracy")
    assert [e.step for e in shown] == [row["samples_seen"] for row in rows]
    assert [e.value for e in shown] == pytest.approx([row["eval_accuracy"] for row in rows])
    assert len(events.Scalars("blocked_fraction/fast")) == 3


def test_the_checkpoint_has_the_reported_accuracy(default_run: Run) -> None:
    """Loaded as plain tensors into a fresh model, by a program that knows nothing of the run."""
    model = models.build("mlp", None, {})
    model.load_state_dict(weights_of(default_run[0]))
    model.eval()
    test = data.load("digits", None, None, {}).test
    with torch.no_grad():
        outputs = model(test.inputs)  # type: ignore[attr-defined]
    correct = int((outputs.argmax(1) == test.targets).sum())  # type: ignore[attr-defined]
    targets = test.targets  # type: ignore[attr-defined]
    loss = float(torch.nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1))
    result = summary_of(default_run[0])["eval"]
    assert correct == round(result["final_accuracy"] * len(test))
    assert loss == pytest.approx(result["final_loss"], rel=1e-5)


def test_what_a_person_sees(default_run: Run) -> None:
    """The closing table on stdout, stamped as emulated; progress on stderr; no other rank's lines, no horovodrun's."""
    done = default_run[1]
    table = done.stdout[done.stdout.index("class  ") :]
    for part in ("fast", "slow (x8 emulated)", "compute s", "blocked s", "EMULATED", "accuracy", "; test loss "):
        assert part in table
    assert table.splitlines()[-1] == f"saved: {default_run[0] / 'checkpoint' / 'model.pt'}"
    assert "class slow (x8 emulated): ranks [1], tau" in done.stdout
    last = next(line for line in done.stderr.splitlines() if "epoch 3/3" in line)
    assert f"train loss {rows_of(default_run[0])[-1]['train_loss']:.4g}" in last
    assert f"fast blocked {rows_of(default_run[0])[-1]['blocked_fraction']['fast']:.2%}" in last
    for noise in ("rank 1:", "<std", "Traceback", "Process 0", "error"):
        assert noise not in done.stdout + done.stderr


# ---- the plain line -------------------------------------------------------------------------------------------------


def test_plain_horovodrun_line(horovodrun: Callable[..., Any], tmp_path: Path) -> None:
    """horovodrun -np 2 -H localhost:2 hvd-hetero train configs/default.yaml key=value ..., with classes found by
    horovodrun's ranks themselves: auto, one class of all CPU ranks."""
    program = Path(sys.executable).with_name("hvd-hetero")
    done = horovodrun(2, [program, "train", DEFAULT, f"run.dir={tmp_path / 'run'}", "train.epochs=1",
                          "cluster.classes=auto", "train.tau=8", "eval.metrics={}"], hosts="localhost:2")
    assert done.returncode == 0, done.stderr
    summary = assert_adds_up(tmp_path / "run")
    assert summary["eval"].keys() == {"final_loss", "best_loss"} and summary["eval"]["final_loss"] > 0
    if not torch.cuda.is_available():
        assert [(c["name"], c["ranks"], c["weight"], c["tau"]) for c in summary["classes"]] == [("cpu", [0, 1], 0.5, 8)]
    assert summary["emulated"] is False and "EMULATED" not in done.stdout


@pytest.mark.parametrize(("hosts", "wanted"), [
    ([("127.0.0.9", 2)], "lo"),  # another address, by the same interface
    ([("127.0.0.9", 1), ("127.0.0.8", 1)], None), ([("no such host", 2)], None),
    ([("127.0.0.1", 2)], None), ([("localhost", 2)], None), ([("OWN", 2)], None),
])
def test_a_job_on_one_remote_host_is_told_the_way_to_it(hosts: list[tuple[str, int]], wanted: str | None) -> None:
    """Horovod would take any interface, and where it takes the loopback the ranks do not find the launcher."""
    known = [(name, a.address) for name, all_ in psutil.net_if_addrs().items() for a in all_ if a.family == AF_INET]
    if wanted is not None and (wanted, "127.0.0.1") not in known:
        pytest.skip("the loopback has another name here")
    own = next((address for _, address in known if not address.startswith("127.")), "localhost")
    hosts = [(own if host == "OWN" else host, slots) for host, slots in hosts]
    line = launcher.horovodrun_line(load([], [], algorithms.method), hosts, ["train"])
    assert (line[line.index("--network-interfaces") + 1] if "--network-interfaces" in line else None) == wanted


def test_a_single_rank_needs_no_horovodrun(hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    alone = ["cluster.classes={only: {ranks: 0, threads: 1}}", "train.epochs=1", "profile.seconds=0.2"]
    done = hvd_hetero(["train", f"run.dir={tmp_path / 'run'}", *alone])
    assert done.returncode == 0, done.stderr
    summary = assert_adds_up(tmp_path / "run")
    (only,) = summary["classes"]
    assert (only["name"], only["ranks"], only["weight"]) == ("only", [0], 1.0)
    assert f"train.tau=auto: local steps of a round: only {only['tau']};" in done.stdout + done.stderr
    assert only["tau"] > 1, "nobody to drift apart from"
    assert only["time_sec"]["blocked"] == 0


# ---- the same twice -------------------------------------------------------------------------------------------------

SEEDED = [
    "train.tau={quick: 8, mid: 3, slow: 1}", "train.batch_size={quick: 16, mid: 16, slow: 8}", "train.epochs=3",
    "model.target=own_parts:norm_net", "run.seed=7",
]
EVEN = [
    "cluster.hosts=localhost:2,127.0.0.1:2",
    "cluster.classes={quick: {hosts: localhost, threads: 1}, mid: {hosts: '127*', slots: 0, threads: 1}, "
    "slow: {hosts: '127*', slots: [1], threads: 1}}",
]
UNEVEN = [
    "cluster.hosts=localhost:3,127.0.0.1:1",
    "cluster.classes={quick: {hosts: local*, slots: 0-1, threads: 1}, absent: {device: cuda, hosts: 'gpu*'}, "
    "mid: {hosts: local*, slots: 2, threads: 1}, slow: {hosts: '127*', slots: 0, threads: 1}}",
]
"""One thread each: with more, and so with more cores for a rank, a sum is taken in another order."""


@pytest.fixture(scope="module")
def twice(
    horovodrun: Callable[..., Any], hvd_hetero: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Four ranks in three classes chosen by host: once with even slots from a program of the user's own, under plain
    horovodrun, once with uneven slots through the launcher. The same ranks are in the same classes."""
    folder = tmp_path_factory.mktemp("twice")
    line = [sys.executable, RANKS / "seeded.py", folder, f"run.dir={folder / 'one'}", *SEEDED, *EVEN]
    for done in together(
        partial(horovodrun, 4, line, hosts="localhost:2,127.0.0.1:2", cwd=RANKS),
        partial(hvd_hetero, ["launch", f"run.dir={folder / 'two'}", *SEEDED, *UNEVEN], cwd=RANKS),
    ):
        assert done.returncode == 0, done.stderr
    return folder / "one", folder / "two"


@pytest.mark.slow
def test_a_seed_gives_the_same_weights_twice(twice: tuple[Path, Path]) -> None:
    one, two = (weights_of(folder) for folder in twice)
    assert list(one) == list(two)
    for name in one:
        assert torch.equal(one[name], two[name]), name
    for row, other in zip(*(rows_of(folder) for folder in twice), strict=True):
        for key in ("samples_seen", "train_loss", "eval_loss", "eval_accuracy"):
            assert row[key] == other[key], key


def test_all_ranks_hold_the_same_bits_after_every_round(twice: tuple[Path, Path]) -> None:
    """Parameters, BatchNorm's statistics and counters, although each rank saw other samples and other dropout."""
    by_rank = [json.loads((twice[0].parent / f"rank{rank}.json").read_text()) for rank in range(4)]
    rounds = summary_of(twice[0])["rounds"]
    assert [len(digests) for digests in by_rank] == [rounds] * 4
    assert all(digests == by_rank[0] for digests in by_rank)
    assert len(set(by_rank[0])) == rounds, "and it moves from round to round"


@pytest.mark.parametrize("which", [0, 1])
def test_classes_by_host(twice: tuple[Path, Path], which: int) -> None:
    """Also with uneven slots, and a class that matches no rank."""
    summary = assert_adds_up(twice[which])
    assert [(c["name"], c["ranks"], c["tau"], c["batch_size"]) for c in summary["classes"]] == [
        ("quick", [0, 1], 8, 16), ("mid", [2], 3, 16), ("slow", [3], 1, 8),
    ]
    assert [c["weight"] for c in summary["classes"]] == pytest.approx([8 / 20, 3 / 20, 1 / 20])
    rounds_per_epoch = 1437 // (2 * 8 * 16 + 3 * 16 + 8)
    assert (summary["rounds"], summary["epochs"]) == (3 * rounds_per_epoch, 3)
    ranks = json.loads((twice[which] / "environment.json").read_text())["ranks"]
    hosts = ["localhost"] * (2 if which == 0 else 3)
    assert [fact["host"] for fact in ranks] == hosts + ["127.0.0.1"] * (4 - len(hosts))


def test_the_counters_of_batchnorm_are_the_largest(twice: tuple[Path, Path]) -> None:
    """Each round the counter becomes that of the rank with the most steps."""
    assert int(weights_of(twice[0])["2.num_batches_tracked"]) == summary_of(twice[0])["rounds"] * 8
