"""A host that comes while a job runs: it is taken in, and nothing that was done is done again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_helpers import when

from hvd_hetero.cluster.allocation import find
from hvd_hetero.errors import ConfigError

RANKS = Path(__file__).parents[1] / "ranks"


def script(folder: Path, text: str) -> Path:
    path = folder / "hosts.sh"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_host_joins(hvd_hetero: Callable[..., Any], tmp_path: Path) -> None:
    """The job starts again within the epoch: the rank that stays has its momentum, and no sample is trained on twice.

    Without --max-restarts: it has not failed.
    """
    run, flag = tmp_path / "run", tmp_path / "flag"
    hosts = script(tmp_path, f"echo localhost:1; if [ -e {flag} ]; then echo 127.0.0.1:2; fi")
    when(lambda: '"round": 1' in (run / "status.json").read_text() if (run / "status.json").exists() else False,
         flag.touch)  # fmt: skip
    done = hvd_hetero(
        ["launch", f"cluster.hosts={hosts}", "launch.discovery_sec=0.2", f"run.dir={run}", "run.trace_rounds=0",
         "cluster.classes={one: {hosts: '*'}}", "train.tau=8", "train.epochs=2", "sampling.scheme=uniform",
         "train.optimizer=joining:Noted", "train.optimizer_args={momentum: 0.9}",
         "checkpoint.every_sec=1000", "train.scheduler=StepLR",
         "train.scheduler_args={step_size: 2}", "data.args={train_limit: 720}", "train.batch_size=1",
         "delays.distribution=lognormal", "delays.seed=0", "delays.sec=0.004"],
        cwd=RANKS, timeout=200)  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "hvd-hetero: saves, and restarts with new hosts: 127.0.0.1:2" in output
    stopped = re.search(r"continues with 3 ranks, from round (\d+)", output)
    resumed = r"resumed after epoch \d, round (\d+), in the next epoch (\d+) rounds later, reshaped: 1 of 3"
    place = re.search(resumed, output)
    assert stopped and place and int(stopped[1]) == int(place[1]) + int(place[2]), output
    assert [line for line in output.splitlines() if "LOADED" in line and "True" in line] == ["LOADED localhost 6 True"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    samples = rows[1]["samples_seen"] - rows[0]["samples_seen"]
    assert [row["epoch"] for row in rows] == [1, 2] and samples - 3 * 8 < rows[0]["samples_seen"] <= samples + 3 * 8


# ---- scripts that name hosts ----------------------------------------------------------------------------------------


def test_a_script_names_hosts_as_for_horovods_elastic_jobs(tmp_path: Path) -> None:
    found = find(str(script(tmp_path, "echo a:2; echo b")), {})
    assert found is not None and found.hosts == (("a", 2), ("b", 1))
    assert str(found).startswith("script (")


def test_a_host_file_that_may_be_run_is_read_all_the_same(tmp_path: Path) -> None:
    """File systems of other kinds know no rights."""
    path = tmp_path / "hosts"
    path.write_text("a slots=2\n")
    path.chmod(0o755)
    found = find(str(path), {})
    assert found is not None and (found.scheduler, found.hosts) == ("host file", (("a", 2),))


@pytest.mark.parametrize(("text", "problem"), [
    ("echo no host is up >&2; exit 3", "fails: no host is up"), ("exit 3", "fails: .*exit status 3"),
    ("true", "names no host"), ("echo a:b:c", "'a:b:c' is not host:slots"),
])  # fmt: skip
def test_a_script_that_is_of_no_use_is_told(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        find(str(script(tmp_path, text)), {})
