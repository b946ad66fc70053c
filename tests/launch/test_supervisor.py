"""Jobs that are started again when they fail, and when they are not; what is left of a cluster without some hosts."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from job_helpers import rank_pids, when
from together import together

from hvd_hetero.config.load import load
from hvd_hetero.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAULT,
    EXIT_LOST,
    EXIT_NON_FINITE,
    EXIT_STOPPED,
    ConfigError,
    UserError,
)
from hvd_hetero.launch.horovodrun import End
from hvd_hetero.launch.supervisor import Restarts, Supervisor, check_options, classes_on, elsewhere

RANKS = Path(__file__).parents[1] / "ranks"
SETTINGS = ["train.tau={fast: 8, slow: 4}", "cluster.classes.slow.slowdown=1", "run.trace_rounds=0"]


def rows(folder: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["epoch"], row["round"], row["samples_seen"], row["train_loss"]) for row in lines]


# ---- real jobs ------------------------------------------------------------------------------------------------------


def test_a_killed_rank_costs_no_more_than_the_work_since_the_checkpoint(
    hvd_hetero: Callable[..., Any], tmp_path: Path
) -> None:
    """The job is restarted once, ends well, and has the rows of one that nothing happened to, to the last bit."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = [*SETTINGS, "train.epochs=6", "checkpoint.every_rounds=29"]

    def kill() -> None:
        for pid in rank_pids(killed, 1):
            os.kill(pid, signal.SIGKILL)

    when(lambda: len(list(killed.glob("checkpoints/*/manifest.json"))) > 0, kill)
    undisturbed, done = together(
        partial(hvd_hetero, ["launch", *settings, f"run.dir={whole}"], timeout=300),
        partial(hvd_hetero, ["launch", "--max-restarts", "2", *settings, f"run.dir={killed}"], timeout=300),
    )
    assert undisturbed.returncode == done.returncode == 0, undisturbed.stderr + done.stdout + done.stderr
    told = re.findall(r"^hvd-hetero: restart (\d) of 2, from round (\d+): (.*)$", done.stderr, re.M)
    assert len(told) == 1 and int(told[0][1]) >= 29, done.stderr
    assert re.match("rank 1 on localhost ended first, killed by SIGKILL|rank 0 on localhost stops", told[0][2]), told
    assert rows(whole) == rows(killed)


@pytest.mark.slow
def test_no_progress_between_two_failures_gives_up(hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    """With the status of the cause, naming it, after one restart of the three; that it began anew is no complaint."""
    done = hvd_hetero(["launch", "--max-restarts", "3", *SETTINGS, f"run.dir={tmp_path / 'run'}", "train.epochs=1000",
                       "checkpoint.every_sec=null", "train.loss=own_parts:fails_on_rank_1"], cwd=RANKS)
    assert done.returncode == EXIT_FAULT, done.stdout + done.stderr
    output = [line for line in done.stderr.splitlines() if line.startswith("hvd-hetero: restart ")]
    assert output == ["hvd-hetero: restart 1 of 3, from the start: rank 1 on localhost failed: RuntimeError: "
                    "the disk of rank 1 is on fire"]
    assert ("hvd-hetero: gives up: it has made no new checkpoint since its last failure, and failed in the "
            "same way: rank 1 on localhost failed: RuntimeError: the disk of rank 1 is on fire") in done.stderr


# ---- when not to start again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_NON_FINITE])
def test_what_would_end_the_same_way_is_not_started_again(status: int) -> None:
    assert Restarts(5).why_not(End(status), 10) is not None


def test_what_was_told_to_end_is_not_started_again() -> None:
    assert Restarts(5).why_not(End(EXIT_LOST, asked=True), 10) is not None


def test_failures_are_counted_and_waited_for_longer_and_longer() -> None:
    restarts = Restarts(8)
    waits = []
    for newest in (None, *range(1, 8)):
        assert restarts.why_not(End(EXIT_LOST), newest) is None
        waits.append(restarts.backoff_sec)
    assert waits == [0, 1, 2, 4, 8, 16, 32, 60]
    assert restarts.why_not(End(EXIT_LOST), 100) == "it was restarted 8 times"


def test_two_failures_with_nothing_saved_between_them_are_enough() -> None:
    for newest in (None, 7):
        restarts = Restarts(5)
        assert restarts.why_not(End(EXIT_LOST), newest) is None
        assert restarts.why_not(End(EXIT_LOST), newest) is not None
    assert restarts.why_not(End(EXIT_LOST), 8) is None, "it has come further"


def test_the_same_failure_twice_is_told_as_such() -> None:
    """Whichever rank was the first to meet it."""
    for other, same in (("rank 0 on h1 failed: KeyError: 'x'", True), ("rank 1 on h2 failed: KeyError: 'y'", False)):
        restarts = Restarts(1)
        assert restarts.why_not(End(EXIT_FAULT, error="rank 1 on h2 failed: KeyError: 'x'"), 7) is None
        reason = restarts.why_not(End(EXIT_FAULT, error=other), 7)
        assert reason is not None and reason.endswith(f"and failed in the same way: {other}") == same


@pytest.mark.parametrize(("most", "least"), [(-1, None), (3, 0), (3, 5), (0, 2)])
def test_options_that_cannot_be_meant(most: int, least: int | None) -> None:
    with pytest.raises(UserError, match="^--m"):
        check_options(most, least, ranks=4)


def test_a_host_that_answers_again_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the next restart; from then on the job goes on from what fewer ranks have saved."""
    silent = iter([["b"], ["b"], [], [], [], []])  # in each call; the third restart finds that it answers
    asked: list[list[str]] = []

    def reap(job: str, hosts: Sequence[str], shell: str) -> list[str]:
        asked.extend([list(hosts)] if hosts else [])
        return [host for host in next(silent) if host in hosts] if hosts else []

    monkeypatch.setattr("hvd_hetero.launch.supervisor.reap", reap)
    monkeypatch.setattr("time.sleep", lambda sec: None)
    rounds = itertools.count(1)
    monkeypatch.setattr(Supervisor, "_newest_checkpoint", lambda self: (next(rounds), ""))
    told: list[list[str]] = []

    def start(settings: Sequence[str]) -> End:
        told.append(list(settings))
        return End(EXIT_LOST if len(told) < 5 else 0, "job")

    assert supervisor(start, [("a", 1), ("b", 1)], tmp_path).run() == 0
    fewer, all_ = ["cluster.hosts=a:1", "run.resume=reshape"], ["run.resume=reshape"]
    assert told == [[], fewer, fewer, all_, all_]
    assert asked == [["a", "b"], ["b"], ["a"], ["b"], ["a", "b"], ["a", "b"]]
    output = capsys.readouterr().err
    assert "continues without b, with 1 rank\n" in output and "uses b again, with 2 ranks" in output


@pytest.mark.parametrize("refused", [False, True])
def test_a_host_that_comes_is_taken_in_while_the_job_runs(
    refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job is asked to save and to stop; where it could not be started with the host, it is left alone."""
    monkeypatch.setattr("hvd_hetero.launch.supervisor.reap", lambda job, hosts, shell: [])
    monkeypatch.setattr(Supervisor, "_newest_checkpoint", lambda self: (7, ""))
    there, told, asked = [("a", 1)], list[list[str]](), threading.Event()

    def check(settings: Sequence[str]) -> None:
        asked.set()
        if refused:
            raise ConfigError("cluster.classes", "x", "has no place for b", "name it")

    def start(settings: Sequence[str]) -> End:
        told.append(list(settings))
        there[1:] = [("b", 2)]
        assert asked.wait(20)
        stop = tmp_path / "stop"
        while not refused and len(told) == 1 and not stop.exists():
            time.sleep(0.01)
        if len(told) > 1 or refused:
            return End(0)
        stop.unlink()
        return End(EXIT_STOPPED, "job")

    words = ["launch.discovery_sec=0.01"]
    assert supervisor(start, [("a", 1)], tmp_path, *words, look=lambda: list(there), check=check).run() == 0
    output = capsys.readouterr().err
    if refused:
        assert told == [[]] and output.count("cannot add hosts: cluster.classes='x': has no place for b") == 1
        assert not (tmp_path / "stop").exists()
    else:
        assert told == [[], ["cluster.hosts=a:1,b:2", "run.resume=reshape"]]
        assert "saves, and restarts with new hosts: b:2" in output and "continues with 3 ranks, from round 7" in output


def supervisor(start: Any, hosts: Any, folder: Path, *words: str, look: Any = None, check: Any = None) -> Supervisor:
    given = ["cluster.hosts=" + ",".join(host for host, _ in hosts), "cluster.classes={x: {hosts: '*'}}",
             "run.resume=auto", f"run.dir={folder}", *words]  # fmt: skip
    return Supervisor(start, load(None, given), hosts, folder, 5, 1, look or (lambda: hosts), check or (lambda s: None))


# ---- on other hosts ---------------------------------------------------------------------------------------------

HOSTS = [("a", 2), ("b", 1), ("c", 2)]


def test_the_ranks_that_remain_are_numbered_anew() -> None:
    classes = {"gpu": {"device": "cuda", "ranks": [0, 3]}, "cpu": {"ranks": "1-2,4", "slowdown": 2.0}}
    assert classes_on(classes, HOSTS, HOSTS[1:]) == {
        "gpu": {"device": "cuda", "ranks": [1]}, "cpu": {"ranks": [0, 2], "slowdown": 2.0}
    }
    assert classes_on(classes, HOSTS, [HOSTS[2], HOSTS[0]]) == {
        "gpu": {"device": "cuda", "ranks": [2, 0]}, "cpu": {"ranks": [3, 1], "slowdown": 2.0}
    }
    assert classes_on(classes, HOSTS, [HOSTS[0], HOSTS[2]]) == {
        "gpu": {"device": "cuda", "ranks": [0, 2]}, "cpu": {"ranks": [1, 3], "slowdown": 2.0}
    }
    assert classes_on(classes, HOSTS, [*HOSTS, ("d", 3)]) == {
        "gpu": {"device": "cuda", "ranks": [0, 3]}, "cpu": {"ranks": [1, 2, 4], "slowdown": 2.0}
    }


def test_classes_without_ranks_are_dropped_and_what_is_said_of_them() -> None:
    """The settings are read again as a user's would be."""
    given = ["cluster.hosts=a:2,b:1,c:2", "train.tau={one: 8, two: 4, three: 2}", "train.batch_size=4",
             "cluster.classes={one: {ranks: [0, 1]}, two: {ranks: [2]}, three: {hosts: c}}"]
    config = load([], given)
    smaller = load([], [*given, *elsewhere(config, HOSTS, [HOSTS[0], HOSTS[2]])])
    assert smaller.cluster.hosts == "a:2,c:2"
    assert smaller.cluster.classes == {"one": {"ranks": [0, 1]}, "three": {"hosts": "c"}}
    assert smaller.train.tau == {"one": 8, "three": 2}
    assert smaller.train.batch_size == 4
    smallest = load([], [*given, *elsewhere(config, HOSTS, HOSTS[:1])])
    assert smallest.cluster.classes == {"one": {"ranks": [0, 1]}} and smallest.train.tau == {"one": 8}


def test_classes_that_are_chosen_by_the_hosts_stay_as_they_are() -> None:
    for classes in ("auto", "{one: {hosts: '*', slots: [0]}, two: {hosts: '*', slots: [1]}}"):
        given = ["cluster.hosts=a:2,c:2", f"cluster.classes={classes}"]
        config = load([], given)
        assert elsewhere(config, [("a", 2), ("c", 2)], [("a", 2)]) == ["cluster.hosts=a:2"]
