"""Comparisons: equal budgets, a row that fails, going on where one stopped, what is refused before anything runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvd_hetero.analysis.compare import command
from hvd_hetero.analysis.compare.check import check
from hvd_hetero.analysis.compare.places import places
from hvd_hetero.analysis.compare.spec import read
from hvd_hetero.cli import main
from hvd_hetero.cluster.hardware import usable_cores
from hvd_hetero.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
KEYS = ["label", "method", "status", "seeds", "accuracy_mean", "accuracy_std", "wall_sec_mean", "samples_seen",
        "averages", "speedup_vs_sync", "blocked_fraction", "emulated"]


def comparison(folder: Path, text: str) -> Path:
    path = folder / "comparison.yaml"
    path.write_text(text)
    return path


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    content = json.loads((folder / "table.json").read_text())
    assert list(content) == ["rows"] and all(list(row) == KEYS for row in content["rows"])
    return {row["label"]: row for row in content["rows"]}


# ---- real runs ------------------------------------------------------------------------------------------------------

REAL = """
compare: {title: Two methods}
budget: {equal: fast_steps}
overrides:
  train: {epochs: 1, batch_size: 16, lr: 0.1, tau: {fast: 4, slow: 1}}
  data.args: {train_limit: 256}
rows:
- {label: Synchronous, method: sync_sgd}
- {label: Biased, method: biased_local_sgd, overrides: {model: {target: "breaking:build"}}}
"""
BREAKING = """import torch
class Breaking(torch.nn.Linear):
    def forward(self, x):
        if self.training and BROKEN:
            raise RuntimeError("broken on purpose")
        return super().forward(x.float().flatten(1))
def build():
    return Breaking(64, 10)
"""


@pytest.mark.parametrize("breaks", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_comparison_outlives_a_failing_row_and_goes_on_where_it_stopped(
    hvd_hetero: Callable[..., Any], tmp_path: Path, breaks: bool
) -> None:
    pytest.importorskip("matplotlib", reason="the extra [report] is not installed")
    path, model, out = comparison(tmp_path, REAL), tmp_path / "breaking.py", tmp_path / "out"
    first, summary_of_first = None, out / "runs" / "synchronous-seed-0" / "summary.json"
    if breaks:
        model.write_text(BREAKING.replace("BROKEN", "True"))
        done = hvd_hetero(["compare", path, f"compare.dir={out}"], cwd=tmp_path, timeout=200)
        assert done.returncode == 1, done.stderr
        sync, biased = rows_of(out).values()
        assert (sync["status"], sync["seeds"], biased["status"], biased["seeds"]) == ("done", [0], "failed", [])
        assert biased["accuracy_mean"] is biased["samples_seen"] is biased["speedup_vs_sync"] is None
        assert "broken on purpose" in done.stdout and "broken on purpose" in (out / "table.md").read_text()
        first = summary_of_first.read_text()

    model.write_text(BREAKING.replace("BROKEN", "False"))
    done = hvd_hetero(["compare", path, f"compare.dir={out}"], cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("was done before") == breaks
    assert first in (None, summary_of_first.read_text())

    sync, biased = rows_of(out).values()
    details = json.loads((out / "details.json").read_text())["rows"]
    assert [row["fast_steps"] for row in details] == [8, 8]  # one epoch of 256 samples in steps of 2 x 16
    assert (sync["averages"], biased["averages"]) == (8, 2)
    assert (sync["samples_seen"], biased["samples_seen"]) == (256, 2 * 16 * 5)
    assert sync["speedup_vs_sync"] == 1 and biased["speedup_vs_sync"] > 0
    summary = json.loads((out / "runs" / "biased-seed-0" / "summary.json").read_text())
    assert biased["accuracy_mean"] == summary["eval"]["final_accuracy"] and biased["accuracy_std"] is None
    assert biased["wall_sec_mean"] == summary["wall_sec"] and biased["status"] == "done" and biased["seeds"] == [0]
    assert biased["blocked_fraction"] == {c["name"]: c["blocked_fraction"] for c in summary["classes"]}
    assert biased["emulated"] is True and biased["method"] == "biased_local_sgd"
    for name in ("report.html", "accuracy.png", "breakdown.png", "timeline-synchronous.png", "trace-biased.json"):
        assert (out / name).stat().st_size > 1000
    assert (out / "table.md").read_text().count("| slow devices emulated |") == 2


# ---- order, budgets and failures, with a launcher that only pretends ------------------------------------------------

PRETENDED = """
import json, os, pathlib, sys, time, yaml
config = yaml.safe_load(open(sys.argv[1]))
run, train, seed = config["run"], config["train"], config["run"]["seed"]
rate = train["lr"]
if rate == 0.5 and seed == 1:
    sys.exit("hvd-hetero: error: this seed fails")
if rate == 0.25:
    time.sleep(60)
if rate in (0.75, 0.875):  # each waits for the other one to be under way
    pathlib.Path(f"under way {rate}").write_text(str(sorted(os.sched_getaffinity(0))))
    while len(list(pathlib.Path().glob("under way *"))) < 2:
        time.sleep(0.01)
folder = pathlib.Path(run["dir"])
folder.mkdir(parents=True)
with open("order.txt", "a") as order:
    order.write(f"{rate} {seed}\\n")
seconds, steps = train["max_train_sec"] or 2.0 + seed, train["max_fast_steps"] or 10
times = {"compute": seconds, "data": 0.0, "blocked": 0.0, "comm": 0.0}
one = {"name": "all", "ranks": [0, 1], "steps": 2 * steps, "time_sec": times, "blocked_fraction": 0.25}
(folder / "config.yaml").write_text(open(sys.argv[1]).read())
(folder / "plan.json").write_text(json.dumps({"rounds": 5}))
(folder / "metrics.jsonl").write_text(json.dumps({"train_sec": seconds, "samples_seen": 100, "eval_loss": 1.0}) + "\\n")
(folder / "summary.json").write_text(json.dumps({
    "seed": seed, "rounds": 10, "samples_seen": 100, "wall_sec": 2 * seconds, "train_sec": seconds, "emulated": False,
    "eval": {"final_accuracy": 0.5 + 0.25 * seed, "final_loss": 1.0}, "classes": [one]}))
"""
TWO_RANKS = "overrides: {train.tau: {fast: 2, slow: 1}, train.batch_size: 4, train.lr: 0.1}\n"


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Path]]:
    pytest.importorskip("matplotlib", reason="the extra [report] is not installed")
    (tmp_path / "launcher.py").write_text(PRETENDED)
    monkeypatch.setattr(command, "LAUNCH", (sys.executable, str(tmp_path / "launcher.py")))
    monkeypatch.chdir(tmp_path)

    def run(text: str, *overrides: str) -> tuple[int, Path]:
        out = tmp_path / "out"
        path = comparison(tmp_path, text)
        return main(["compare", str(path), f"compare.dir={out}", *overrides]), out

    return run


def test_seeds_come_one_after_another_and_the_first_row_sets_each_ones_budget(
    pretend: Callable[..., tuple[int, Path]], tmp_path: Path
) -> None:
    status, out = pretend(TWO_RANKS + """
seeds: [0, 1]
budget: {equal: wall_clock}
rows:
- {label: first, method: sync_sgd}
- {label: second, overrides: {train.lr: 0.2}, times: 3}
""")
    assert status == 0
    assert (tmp_path / "order.txt").read_text().split("\n")[:4] == ["0.1 0", "0.2 0", "0.1 1", "0.2 1"]
    second = [json.loads((out / "runs" / f"second-seed-{seed}" / "summary.json").read_text()) for seed in (0, 1)]
    assert [summary["train_sec"] for summary in second] == [6, 9]
    rows = rows_of(out)
    assert rows["second"]["seeds"] == [0, 1] and rows["second"]["accuracy_mean"] == 0.625
    assert rows["second"]["accuracy_std"] == pytest.approx(0.25 / 2**0.5)
    assert rows["second"]["speedup_vs_sync"] == pytest.approx(2.5 / 7.5)  # as many steps in three times the seconds


def test_when_the_row_that_sets_the_budget_fails_the_others_wait_for_their_next_seed(
    pretend: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = pretend(TWO_RANKS + """
seeds: [1, 0]
budget: {equal: samples}
rows:
- {label: first, overrides: {train.lr: 0.5}}
- {label: second}
""")
    assert status == 1
    rows = rows_of(out)
    assert [(row["status"], row["seeds"]) for row in rows.values()] == [("failed", [0]), ("failed", [0])]
    output = capsys.readouterr().out
    assert "this seed fails" in output and "the row that sets the budget failed" in output


def test_a_run_that_takes_too_long_is_ended(pretend: Callable[..., tuple[int, Path]]) -> None:
    status, out = pretend(TWO_RANKS + """
compare: {timeout_sec: 1}
rows:
- {label: slow, overrides: {train.lr: 0.25}}
- {label: other}
""", "budget.amount=4")
    assert status == 1
    assert [row["status"] for row in rows_of(out).values()] == ["failed", "done"]


AT_ONCE = """
overrides: {cluster.classes: {all: {ranks: [0]}}, train.tau: 2, train.batch_size: 4, profile.seconds: 0.1}
rows: [{label: a, overrides: {train.lr: 0.75}}, {label: b, overrides: {train.lr: 0.875}}]
"""


@pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")
def test_runs_at_once_have_cores_of_their_own(pretend: Callable[..., tuple[int, Path]], tmp_path: Path) -> None:
    """Each ends only when the other one has begun."""
    status, out = pretend(AT_ONCE, "budget.amount=4", "compare.jobs=2", "compare.timeout_sec=50")
    assert status == 0 and [row["status"] for row in rows_of(out).values()] == ["done", "done"]
    a, b = (set(json.loads(path.read_text())) for path in tmp_path.glob("under way *"))
    assert a and b and (not a & b or not places(read(tmp_path / "comparison.yaml", ["compare.jobs=2"]))[0])


def test_rows_that_wait_for_a_budget_may_all_be_at_once(pretend: Callable[..., tuple[int, Path]]) -> None:
    status, out = pretend(TWO_RANKS + """
seeds: [1, 0]
budget: {equal: wall_clock}
rows: [{label: first}, {label: second, overrides: {train.lr: 0.2}, times: 3}]
""", "compare.jobs=4", "compare.share_cores=true")
    assert status == 0 and rows_of(out)["second"]["seeds"] == [1, 0], "in the order of the file, whoever was first"
    assert [json.loads((out / "runs" / f"second-seed-{seed}" / "summary.json").read_text())["train_sec"]
            for seed in (0, 1)] == [6, 9]


@pytest.mark.parametrize(("classes", "jobs", "message"), [
    ("{fast: {ranks: [0]}, slow: {ranks: [1]}}", 1000, r"compare\.jobs=1000: runs of 2 ranks each take more than"),
    ("auto", 2, r"compare\.jobs=2: row 'a' is for GPUs"),
])  # fmt: skip
def test_more_runs_at_once_than_fit_are_refused_unless_it_is_meant(
    tmp_path: Path, without_gpus: None, classes: str, jobs: int, message: str
) -> None:
    text = f"overrides: {{cluster.classes: {classes}, cluster.hosts: 'localhost:2'}}\nrows: [{{label: a}}]"
    path = comparison(tmp_path, text)
    with pytest.raises(ConfigError, match=message):
        places(read(path, [f"compare.jobs={jobs}"]))
    assert len(places(read(path, [f"compare.jobs={jobs}", "compare.share_cores=true"]))) == jobs


def test_a_comparison_may_have_the_rows_of_another_one(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("overrides: {train.lr: 0.3}\nrows: [{label: a}, {label: b}]")
    found = read(comparison(tmp_path, "rows: other.yaml\noverrides: {train.lr: 0.7}"), [])
    assert [(row.label, row.overrides["train.lr"]) for row in found.rows] == [("a", 0.7), ("b", 0.7)], "rows alone"


def test_runs_whose_settings_changed_are_run_anew(pretend: Callable[..., tuple[int, Path]], tmp_path: Path) -> None:
    text = TWO_RANKS + "rows: [{label: a}, {label: b, overrides: {train.lr: 0.2}}]"
    assert pretend(text, "budget.amount=4")[0] == 0
    os.rename(tmp_path / "out" / "runs" / "a-seed-0", tmp_path / "out" / "runs" / "kept")
    assert pretend(text, "budget.amount=4")[0] == 0
    assert (tmp_path / "order.txt").read_text().split("\n")[:3] == ["0.1 0", "0.2 0", "0.1 0"]


def test_workloads_have_budgets_and_pictures_of_their_own(pretend: Callable[..., tuple[int, Path]]) -> None:
    status, out = pretend(TWO_RANKS + """
workloads:
  Small: {budget: {amount: 4}, overrides: {data.args: {train_limit: 100}}}
  Large: {budget: {amount: 8}}
rows: [{label: a, method: sync_sgd}, {label: b}]
""")
    assert status == 0
    assert list(rows_of(out)) == ["Small: a", "Small: b", "Large: a", "Large: b"]
    steps = [row["fast_steps"] for row in json.loads((out / "details.json").read_text())["rows"]]
    assert steps == [4, 4, 8, 8]
    assert (out / "small-breakdown.png").exists() and (out / "large-breakdown.png").exists()
    assert "## Small" in (out / "table.md").read_text()


# ---- what is refused before anything runs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: [{label: a, method: nonsense}]", r"row 'a': algorithm\.name='nonsense': is not a known method"),
        ("rows: [{label: a, method: byteps, overrides: {cluster.classes: {fast: {ranks: [0, 1]}}}}]", r"row 'a': "),
        ("rows: [{label: a, method: dlb, overrides: {algorithm.global_batch: 1}}]", r"algorithm\.global_batch=1"),
        ("budget: {amount: 7}\nrows: [{label: a}]", r"budget\.amount=7.*every 2 fast steps.*a multiple of 2"),
        ("budget: {amount: 1}\nrows: [{label: a}]", r"row 'a': train\.max_fast_steps=1: one round takes 2"),
        ("budget: {equal: samples, amount: 5}\nrows: [{label: a}]", r"train\.max_samples=5: one round takes 12"),
        ("rows: [{label: a}, {label: b, overrides: {train.batch_size: 8}}]", r"equal steps are not equal work"),
        ("rows: [{label: a}, {label: b, overrides: {data.args: {train_limit: 99}}}]", r"workloads of their own"),
        ("rows: [{label: a}, {label: b, overrides: {eval.metrics: {}}}]", r"row 'b': eval\.metrics"),
        ("rows: [{label: a}, {label: b, overrides: {train.epochs: 2}}]", r"the budget ends this row"),
        ("budget: {amount: 4}\noverrides: {train.epochs: 2}\nrows: [{label: a}]", r"budget\.amount ends the runs"),
        ("rows: [{label: a}, {label: a}]", r"rows\[1\]\.label='a'"),
        ("rows: [{label: a b}, {label: A-B}]", r"would share a folder"),
        ("rows: [{label: a, times: 2}]", r"rows\[0\]\.times=2.*sets the budget"),
        ("rows: [{label: a, speed: 2}]", r"rows\[0\]\.speed=2: is not a known key"),
        ("rows: [{overrides: {}}]", r"has no label"),
        ("rows: []", r"is not a list of rows"),
        ("seeds: []\nrows: [{label: a}]", r"seeds=\[\]"),
        ("seeds: [1, 1]\nrows: [{label: a}]", r"names one twice"),
        ("budget: {equal: energy}\nrows: [{label: a}]", r"budget\.equal='energy': is not one of the choices"),
        ("compare: {baseline: b}\nrows: [{label: a}]", r"compare\.baseline='b': is no row"),
        ("row: [{label: a}]", r"row=.*did you mean 'rows'"),
    ],
)
def test_impossible_comparisons_end_with_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    pytest.importorskip("matplotlib", reason="the extra [report] is not installed")
    if "overrides: {train.epochs" not in text or "budget" not in text:
        text = TWO_RANKS + text
    path = comparison(tmp_path, text)
    assert main(["compare", str(path), f"compare.dir={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    with pytest.raises(ConfigError, match=message):
        check(read(path, []))
    assert not (tmp_path / "out").exists()


def test_command_line_settings_reach_all_rows_but_the_rows_win(tmp_path: Path) -> None:
    path = comparison(tmp_path, "rows: [{label: a, overrides: {train.lr: 0.3}}, {label: b}]")
    found = read(path, ["train.lr=0.7", "seeds=[4]", "budget.amount=64", "compare.title=T"])
    assert (found.title, found.seeds) == ("T", (4,))
    configs = [row.config(4, tmp_path, None) for row in found.rows]
    assert [c.train.lr for c in configs] == [0.3, 0.7]
    assert [(c.train.epochs, c.train.max_fast_steps, c.run.seed) for c in configs] == [(None, 64, 4)] * 2
    with pytest.raises(ConfigError, match=r"rows=.*cannot be set here"):
        read(path, ["rows=[]"])


def test_a_longer_row_has_its_schedule_stretched(tmp_path: Path) -> None:
    path = comparison(tmp_path, """
budget: {amount: 64}
overrides: {train: {scheduler: MultiStepLR, scheduler_args: {milestones: [6, 8], gamma: 0.1}}}
rows: [{label: a}, {label: b, times: 1.5}]
""")
    configs = [row.config(0, tmp_path, None) for row in read(path, []).rows]
    assert [c.train.scheduler_args["milestones"] for c in configs] == [[6, 8], [9, 12]]
    assert [c.train.max_fast_steps for c in configs] == [64, 96]
