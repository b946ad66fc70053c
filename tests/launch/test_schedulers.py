"""Jobs on the hosts that a scheduler gives: what is started there, and what is refused beforehand."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_helpers import rank_pids, when

from hvd_hetero.errors import EXIT_STOPPED
from hvd_hetero.launch.launcher import placed

pytestmark = pytest.mark.horovod

Launched = Callable[..., tuple[int, str, str]]
HET = {"SLURM_JOB_ID": "7", "SLURM_HET_SIZE": "2",
       "SLURM_JOB_NODELIST_HET_GROUP_0": "gpu1", "SLURM_TASKS_PER_NODE_HET_GROUP_0": "1",
       "SLURM_JOB_NODELIST_HET_GROUP_1": "n[1-2]", "SLURM_TASKS_PER_NODE_HET_GROUP_1": "1(x2)"}
PLAIN = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "1(x2)"}
BY_COMPONENT = "cluster.classes={fast: {device: cpu}, slow: {device: cpu}}"
TAU = "train.tau={fast: 8, slow: 4}"
SRUN = """#!/bin/sh
# Slurm as far as a rank sees it: variables of its step beside those of its job, which are Slurm's to pass on.
while [ "${1#-}" != "$1" ]; do shift; done
exec env SLURM_PROCID=0 "$@"
"""


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Sets variables of a scheduler, and no others of Slurm."""

    def put(variables: dict[str, str]) -> None:
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def line_of(out: str) -> tuple[str, dict[str, str]]:
    """The hosts of a horovodrun line, and the settings of its ranks."""
    words = shlex.split(out)
    return words[words.index("-H") + 1], dict(word.split("=", 1) for word in words if "=" in word)


# ---- what is started ------------------------------------------------------------------------------------------------


def test_a_component_is_a_class(launched: Launched, inside: Callable[..., None]) -> None:
    inside(HET)
    status, out, err = launched("--print", "cluster.hosts=auto", BY_COMPONENT, TAU)
    hosts, settings = line_of(out)
    assert status == 0 and hosts == settings["cluster.hosts"] == "gpu1:1,n1:1,n2:1"
    assert json.loads(settings["cluster.classes"]) == {"fast": {"device": "cpu", "ranks": "0"},
                                                       "slow": {"device": "cpu", "ranks": "1-2"}}
    assert err == ("hvd-hetero: hosts from Slurm (SLURM_TASKS_PER_NODE_HET_GROUP_*), 3 slots on 3 hosts in 2 "
                   "components: gpu1:1,n1:1,n2:1\n")


def test_classes_that_say_where_they_are_keep_it(launched: Launched, inside: Callable[..., None]) -> None:
    inside(HET)
    classes = {"fast": {"hosts": "n2"}, "slow": {"ranks": [0, 1]}}
    _, out, _ = launched("--print", "cluster.hosts=auto", f"cluster.classes={json.dumps(classes)}", TAU)
    assert json.loads(line_of(out)[1]["cluster.classes"]) == classes
    _, out, _ = launched("--print", "cluster.hosts=auto", "cluster.classes=auto")
    assert line_of(out)[1]["cluster.classes"] == "auto"


def test_a_job_without_a_scheduler_runs_here(launched: Launched, inside: Callable[..., None]) -> None:
    inside({})
    status, out, err = launched("--print", "cluster.hosts=auto")
    assert status == 0 and line_of(out)[0] == "localhost:2" and err == "hvd-hetero: hosts from this machine\n"


def test_hosts_that_are_configured_win(launched: Launched, inside: Callable[..., None], tmp_path: Path) -> None:
    inside(PLAIN)
    (tmp_path / "hosts").write_text("m1 slots=2\n")
    assert line_of(launched("--print", "cluster.hosts=k1,k2")[1])[0] == "k1:1,k2:1"
    assert line_of(launched("--print", "cluster.hosts=./hosts")[1])[0] == "m1:2"
    status, out, _ = launched("--print", "cluster.hosts=auto", "cluster.remote_shell=oarsh")
    assert status == 0 and line_of(out)[1]["cluster.remote_shell"] == "oarsh"


def test_a_job_that_slurm_has_requeued_resumes(launched: Launched, inside: Callable[..., None]) -> None:
    inside({**PLAIN, "SLURM_RESTART_COUNT": "1"})
    status, out, err = launched("--print")
    assert status == 0 and "hvd-hetero: run.resume=auto, since SLURM_RESTART_COUNT=1" in err
    assert line_of(out)[1]["run.resume"] == "auto"
    _, out, err = launched("--print", "run.resume=reshape")
    assert line_of(out)[1]["run.resume"] == "reshape" and err == ""
    status, _, err = launched("--print", "run.dir=null")
    assert status == 2 and "run.resume='auto': names no run to go on from; set run.dir" in err
    config, _ = placed([], ["run.dir=null"], trains=False)
    assert config.run.resume is None, "what does not train has nothing to go on from"


@pytest.mark.slow
def test_a_heterogeneous_job_stops_before_its_time_limit_and_resumes_on_other_hosts(
    hvd_hetero: Callable[..., Any], tmp_path: Path
) -> None:
    """Slurm's signal reaches a rank that srun has started, not the launcher, and stops the job all the same."""
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    env = {**HET, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path),  # it keeps which hosts answer
           "SLURM_JOB_NODELIST_HET_GROUP_0": "127.0.0.2", "SLURM_TASKS_PER_NODE_HET_GROUP_1": "1",
           "SLURM_JOB_NODELIST_HET_GROUP_1": "127.0.0.3"}
    folder = tmp_path / "run"
    words = ["launch", "cluster.hosts=auto", BY_COMPONENT.replace("cpu}", "cpu, threads: 1}"), TAU, "train.epochs=6",
             "run.trace_rounds=0", "checkpoint.every_rounds=29", f"run.dir={folder}"]

    def near_the_limit() -> None:
        for pid in rank_pids(folder, 1):
            os.kill(pid, signal.SIGUSR1)

    when(lambda: any(folder.glob("checkpoints/*/manifest.json")), near_the_limit)
    stopped = hvd_hetero(words, env=env, timeout=300)
    assert stopped.returncode == EXIT_STOPPED, stopped.stdout + stopped.stderr
    elsewhere = {"SLURM_RESTART_COUNT": "1", "SLURM_JOB_NODELIST_HET_GROUP_0": "127.0.0.4"}
    resumed = hvd_hetero(words, env=env | elsewhere, timeout=300)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "127.0.0.4:1,127.0.0.3:1" in resumed.stderr and "6 epochs, 174 rounds" in resumed.stdout


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variables", "words", "output"), [
    (PLAIN, ["cluster.classes={fast: {ranks: 0}, slow: {ranks: 1-3}}"],
     "SLURM_TASKS_PER_NODE='1(x2)': gives the job 2 slots, and class slow has rank 3; ask for 4 slots (tasks), or"),
    (HET, [BY_COMPONENT.replace("}}", "}, other: {device: cpu}}")],
     "cluster.classes=['fast', 'slow', 'other']: are 3 classes, and the job has 2 components (SLURM_HET_SIZE); give a"),
    (PLAIN, [BY_COMPONENT], "cluster.classes.fast={'ranks': None, 'hosts': None, 'slots': None}: needs either ranks,"),
    ({**PLAIN, "SLURM_STEP_NUM_TASKS": "2"}, [], "SLURM_STEP_NUM_TASKS='2': srun runs this launcher in 2 tasks"),
    ({"HVD_HETERO_HOSTFILE": "hosts"}, [], "hosts line 2='n1 cores=2': 'n1 cores=2' is not host:slots; write for"),
    ({}, ["cluster.hosts=./hosts"], "hosts line 2='n1 cores=2': 'n1 cores=2' is not host:slots; write for"),
    ({}, ["cluster.remote_shell='"], 'cluster.remote_shell="\'": is no command: No closing quotation; close the quote'),
    ({}, ["cluster.remote_shell=sh -c 'rsh {host} {command}'"],
     "cluster.remote_shell=\"sh -c 'rsh {host} {command}'\": has {command} within a word; let it stand alone"),
    ({}, ["cluster.remote_shell= "], "cluster.remote_shell=' ': is no command; give one, or null for ssh"),
])
def test_what_does_not_fit(
    variables: dict[str, str], words: list[str], output: str, launched: Launched, inside: Callable[..., None],
    tmp_path: Path,
) -> None:
    (tmp_path / "hosts").write_text("n1:2\nn1 cores=2\n")
    inside(variables)
    status, out, err = launched("cluster.hosts=auto", TAU, *words)
    error = err.splitlines()[-1]
    assert status == 2 and error.startswith(f"hvd-hetero: error: {output}"), err
