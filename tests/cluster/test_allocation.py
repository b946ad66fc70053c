"""What schedulers give, by their variables and files as each of them writes them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from hvd_hetero.cluster import allocation
from hvd_hetero.cluster.allocation import Allocation, check_one_task, find, restarts
from hvd_hetero.cluster.hosts import remote_command
from hvd_hetero.errors import ConfigError

SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[08-10],gpu1", "SLURM_TASKS_PER_NODE": "2(x3),1",
         "SLURM_JOB_CPUS_PER_NODE": "8(x3),4"}
HET = {"SLURM_JOB_ID": "7", "SLURM_HET_SIZE": "2",
       "SLURM_JOB_NODELIST_HET_GROUP_0": "gpu1", "SLURM_TASKS_PER_NODE_HET_GROUP_0": "2",
       "SLURM_JOB_NODELIST_HET_GROUP_1": "n[1-2]", "SLURM_TASKS_PER_NODE_HET_GROUP_1": "4,1"}


def files(folder: Path, **contents: str) -> dict[str, str]:
    """Writes files; returns the variables that name them."""
    for name, content in contents.items():
        (folder / name).write_text(content)
    return {name: str(folder / name) for name in contents}


def found(env: dict[str, str]) -> Allocation:
    given = find("auto", env)
    assert given is not None
    return given


# ---- Slurm ----------------------------------------------------------------------------------------------------------


def test_slurm() -> None:
    given = found(SLURM)
    assert given.hosts == (("n08", 2), ("n09", 2), ("n10", 2), ("gpu1", 1)) and given.components == ()
    assert str(given) == "Slurm (SLURM_TASKS_PER_NODE), 7 slots on 4 hosts: n08:2,n09:2,n10:2,gpu1:1"
    assert given.shell is not None
    words = remote_command(given.shell, "n09", "cd x; y")
    assert {"srun", "--jobid=7", "--overlap", "--nodelist=n09", "cd x; y"} <= set(words)


@pytest.mark.parametrize(("variables", "slots"), [
    ({"SLURM_STEP_ID": "3", "SLURM_TASKS_PER_NODE": "1"}, [8, 8, 8, 4]),  # of a step that runs the launcher
    ({"SLURM_STEP_ID": "3", "SLURM_TASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "4"}, [2, 2, 2, 1]),
    ({"SLURM_STEP_ID": "4294967290"}, [2, 2, 2, 1]),  # of a salloc that has its shell on the first node
])
def test_slurm_within_a_step(variables: dict[str, str], slots: list[int]) -> None:
    assert [number for _, number in found(SLURM | variables).hosts] == slots


def test_components_of_a_heterogeneous_job_have_ranks_of_their_own() -> None:
    given = found(HET)
    assert given.hosts == (("gpu1", 2), ("n1", 4), ("n2", 1))
    assert given.components == ((0, 1), (2, 3, 4, 5, 6))
    assert "SLURM_TASKS_PER_NODE_HET_GROUP_*" in str(given) and "7 slots on 3 hosts in 2 components" in str(given)


def test_components_that_share_a_host() -> None:
    """The host is named once, the first component's ranks come first on it."""
    given = found(HET | {"SLURM_JOB_NODELIST_HET_GROUP_1": "n1,gpu1"})
    assert given.hosts == (("gpu1", 3), ("n1", 4))
    assert given.components == ((0, 1), (3, 4, 5, 6, 2))


def test_each_host_of_a_heterogeneous_job_is_reached_through_its_component(tmp_path: Path) -> None:
    """By a real shell, with a stand-in for srun that says what it is given and runs it."""
    (tmp_path / "srun").write_text("#!/bin/sh\nwhile [ \"${1#-}\" != \"$1\" ]; do echo $1; shift; done\nexec \"$@\"\n")
    (tmp_path / "srun").chmod(0o755)
    shell = found(HET).shell
    for host, component in (("gpu1", 0), ("n1", 1), ("n2", 1)):
        words = remote_command(str(shell), host, "echo \"it's\" here$SLURM_PROCID; kill -USR1 $$; echo alive")
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_PROCID": "0"}
        done = subprocess.run(words, env=env, capture_output=True, text=True)
        output = done.stdout.splitlines()
        assert {"--jobid=7", "--overlap", f"--nodelist={host}", f"--het-group={component}"} <= set(output), done
        assert output[-2:] == ["it's here", "alive"], "the signal before a time limit does not end the shell"


@pytest.mark.parametrize(("variables", "key", "problem"), [
    ({"SLURM_JOB_NODELIST": "n[1"}, "SLURM_JOB_NODELIST", "names no host"),
    ({"SLURM_TASKS_PER_NODE": "2(x"}, "SLURM_TASKS_PER_NODE", "'2(x' is no count"),
    ({"SLURM_TASKS_PER_NODE": "2", "SLURM_JOB_CPUS_PER_NODE": "8"}, "SLURM_JOB_NODELIST", "is 4 nodes, not 1"),
])
def test_slurm_variables_that_make_no_sense(variables: dict[str, str], key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find("auto", SLURM | variables)
    assert caught.value.key == key and problem in caught.value.problem


def test_a_launcher_for_each_task_is_refused() -> None:
    check_one_task(SLURM | {"SLURM_STEP_NUM_TASKS": "1"})
    with pytest.raises(ConfigError, match="SLURM_STEP_NUM_TASKS='7': srun runs this launcher in 7 tasks, .*--overlap"):
        check_one_task(SLURM | {"SLURM_STEP_NUM_TASKS": "7"})


def test_restarts() -> None:
    assert [restarts({}), restarts({"SLURM_RESTART_COUNT": "2"})] == [0, 2]


# ---- the others -----------------------------------------------------------------------------------------------------


def test_lsf(tmp_path: Path) -> None:
    env = {"LSB_JOBID": "3", "LSF_SERVERDIR": "/lsf/x y"}
    listed = env | {"LSB_MCPU_HOSTS": "h1 16 h2 4 ", "LSB_HOSTS": "h1 h2"}
    per_slot = env | files(tmp_path, LSB_DJOB_HOSTFILE="h1\nh1\nh2\n")
    assert found(listed).hosts == (("h1", 16), ("h2", 4)) and found(listed).source == "LSB_MCPU_HOSTS"
    assert found(per_slot).hosts == (("h1", 2), ("h2", 1)) and found(per_slot).source == "LSB_DJOB_HOSTFILE"
    assert found(env | {"LSB_HOSTS": "h1 h2 h1"}).hosts == (("h1", 2), ("h2", 1))
    assert found(listed | {"CSM_ALLOCATION_ID": "5"}).hosts == (("h2", 4),), "jsrun starts elsewhere"
    words = remote_command(str(found(listed).shell), "h2", "cd x; y")
    assert words[0] == "env" and "LSF_SERVERDIR=/lsf/x y" in words and words[-3:] == ["blaunch", "h2", "cd x; y"]
    named = found(listed | {"LSB_JOBNAME": "hvd-hetero launch run.dir=${HOME}/a"})
    assert "${" not in str(named.shell), "it becomes a setting, which would be resolved"


@pytest.mark.parametrize(("scheduler", "variable"), [("PBS", "PBS_NODEFILE"), ("OAR", "OAR_NODEFILE")])
def test_a_line_for_each_slot(scheduler: str, variable: str, tmp_path: Path) -> None:
    given = found(files(tmp_path, **{variable: "n1.site\nn1.site\nn2.site\n\n"}))
    assert (given.scheduler, given.source) == (scheduler, variable)
    assert given.hosts == (("n1.site", 2), ("n2.site", 1))
    assert (given.shell is None) == (scheduler == "PBS")


def test_grid_engine(tmp_path: Path) -> None:
    given = found(files(tmp_path, PE_HOSTFILE="n1.site 4 all.q@n1.site UNDEFINED\nn2.site 2 all.q@n2.site <NULL>\n"))
    assert (given.scheduler, given.hosts) == ("Grid Engine", (("n1.site", 4), ("n2.site", 2)))


@pytest.mark.parametrize("content", ["a-worker-0.a.ns.svc slots=2\na-worker-1.a.ns.svc slots=2\n",
                                     "a-worker-0.a.ns.svc:2\na-worker-1.a.ns.svc:2\n"])
@pytest.mark.parametrize("variable", [*allocation.MPI_VARIABLES, None])
def test_mpi_operator(content: str, variable: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of Open MPI and that of MPICH, named by a variable or in its usual place."""
    named = files(tmp_path, hostfile=content)["hostfile"]
    monkeypatch.setattr(allocation, "MPI_HOST_FILE", tmp_path / "none" if variable else Path(named))
    given = found({variable: named} if variable else {"K_MPI_JOB_ROLE": "launcher"})
    assert given.hosts == (("a-worker-0.a.ns.svc", 2), ("a-worker-1.a.ns.svc", 2))
    assert given.source == named and given.shell is None


def test_kubexec_of_former_mpi_operators(tmp_path: Path) -> None:
    named = files(tmp_path, hostfile="w0 slots=1\n")["hostfile"]
    env = {"OMPI_MCA_orte_default_hostfile": named, "OMPI_MCA_plm_rsh_agent": "/etc/mpi/kubexec.sh"}
    assert remote_command(str(found(env).shell), "w0", "cd x; y") == ["/etc/mpi/kubexec.sh", "w0", "cd x; y"]


def test_skypilot() -> None:
    env = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n", "SKYPILOT_NUM_GPUS_PER_NODE": "4"}
    assert found(env).hosts == (("10.0.0.1", 4), ("10.0.0.2", 4))
    assert found(env | {"SKYPILOT_NUM_GPUS_PER_NODE": "0"}).hosts == (("10.0.0.1", 1), ("10.0.0.2", 1))


# ---- which of them --------------------------------------------------------------------------------------------------


def test_the_order_of_sources(tmp_path: Path) -> None:
    env = files(tmp_path, HVD_HETERO_HOSTFILE="a\n", LSB_DJOB_HOSTFILE="c\n", PBS_NODEFILE="d\n",
                PE_HOSTFILE="e 1 q x\n", OAR_NODEFILE="f\n", HYDRA_HOST_FILE="g\n")
    env |= {**SLURM, "LSB_JOBID": "1", "SKYPILOT_NODE_IPS": "h"}
    order = []
    for left_out in ("HVD_HETERO_HOSTFILE", "SLURM_JOB_NODELIST", "LSB_JOBID", "PBS_NODEFILE", "PE_HOSTFILE",
                     "OAR_NODEFILE", "HYDRA_HOST_FILE", "SKYPILOT_NODE_IPS"):
        order.append(found(env).scheduler)
        assert find("h1:2", env) is find(None, env) is None, "what is configured needs no scheduler"
        del env[left_out]
    assert order == ["host file", "Slurm", "LSF", "PBS", "Grid Engine", "OAR", "MPI Operator", "SkyPilot"]
    assert find("auto", env) is None


def test_a_host_file_that_is_configured(tmp_path: Path) -> None:
    path = files(tmp_path, hosts="a slots=2\n")["hosts"]
    assert find(path, SLURM) == Allocation("host file", path, (("a", 2),))


@pytest.mark.parametrize(("env", "key", "problem"), [
    ({"PBS_NODEFILE": "/nowhere"}, "PBS_NODEFILE", "No such file"),
    ({"HVD_HETERO_HOSTFILE": "/nowhere"}, "HVD_HETERO_HOSTFILE", "No such file"),
    ({"LSB_JOBID": "1", "LSB_MCPU_HOSTS": "h1 2 h2"}, "LSB_MCPU_HOSTS", "cannot be read"),
    ({"SKYPILOT_NODE_IPS": " "}, "SKYPILOT_NODE_IPS", "names no host"),
])
def test_what_cannot_be_read(env: dict[str, Any], key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find("auto", env)
    assert caught.value.key == key and problem in caught.value.problem and caught.value.remedy
