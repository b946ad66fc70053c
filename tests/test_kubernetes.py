"""The manifest for Kubernetes, as far as it can be checked without one: its parts fit together, and its ssh works."""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import socket
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from hvd_hetero.cluster import allocation
from hvd_hetero.cluster.hosts import remote_command
from hvd_hetero.config.load import device_classes, load

yaml = pytest.importorskip("yaml", reason="pyyaml reads the manifest: scripts/setup --extra dev")

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = yaml.safe_load((ROOT / "docker" / "kubernetes" / "job.yaml").read_text())
SSHD = "/usr/sbin/sshd"


def parts(kind: str) -> dict[str, dict[str, Any]]:
    """The objects of a kind, by name."""
    return {item["metadata"]["name"]: item for item in MANIFEST["items"] if item["kind"] == kind}


PODS = {**parts("StatefulSet"), **parts("Job")}
LAUNCHER = parts("Job")["hvd-hetero"]["spec"]["template"]["spec"]["containers"][0]


def settings() -> list[str]:
    """What the launcher's command gives to ``hvd-hetero launch``, as a shell passes it on."""
    env = {"REMOTE_SHELL": LAUNCHER["env"][0]["value"]}
    last = LAUNCHER["args"][0].partition("exec ")[2]
    command = ["bash", "-c", f"printf '%s\\n' {last}"]
    output = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    words = output.stdout.splitlines()
    assert words[:3] == ["hvd-hetero", "launch", "configs/default.yaml"]
    return words[3:]


def test_the_host_file_names_the_pods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As cluster.hosts=auto reads it where it is mounted."""
    (service,) = parts("Service")
    (config_map,) = parts("ConfigMap").values()
    (tmp_path / "hostfile").write_text(config_map["data"]["hostfile"])
    assert str(allocation.MPI_HOST_FILE) == "/etc/mpi/hostfile"
    monkeypatch.setattr(allocation, "MPI_HOST_FILE", tmp_path / "hostfile")
    given = allocation.find("auto", {})
    assert given is not None
    pods = [f"{name}-{number}.{service}" for name, each in parts("StatefulSet").items()
            for number in range(each["spec"]["replicas"])]
    assert [host for host, _ in given.hosts] == pods
    for each in parts("StatefulSet").values():
        assert each["spec"]["serviceName"] == service and parts("Service")[service]["spec"]["clusterIP"] == "None"


def test_classes_are_those_of_the_pods() -> None:
    config = load([ROOT / "configs" / "default.yaml"], settings())
    assert config.cluster.hosts == "auto" and config.run.resume == "auto"
    hosts = [line.split()[0] for line in next(iter(parts("ConfigMap").values()))["data"]["hostfile"].splitlines()]
    for name, chosen in device_classes(config.cluster.classes).items():
        limits = PODS[name]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert (limits.get("nvidia.com/gpu") == 1) == (chosen.device == "cuda")
        assert {host for host in hosts if fnmatch(host, str(chosen.hosts))} == {h for h in hosts if h.startswith(name)}


@pytest.mark.parametrize("name", PODS)
def test_pods_have_what_they_mount(name: str) -> None:
    pod = PODS[name]["spec"]["template"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    (container,) = pod["spec"]["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"ssh": "/ssh", "hosts": "/etc/mpi", "runs": "/app/runs", "shm": "/dev/shm"}
    assert set(mounts) == set(volumes)
    assert volumes["hosts"]["configMap"]["name"] in parts("ConfigMap")
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] in parts("PersistentVolumeClaim")
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]["gpu"]
    assert container["image"] == compose["image"]
    assert "openssh-server" in (ROOT / compose["build"]["dockerfile"]).read_text()
    if name in parts("StatefulSet"):
        labels = PODS[name]["spec"]["selector"]["matchLabels"]
        assert labels == pod["metadata"]["labels"] and labels.items() >= {"app": "hvd-hetero"}.items()


def test_its_ssh_works(tmp_path: Path) -> None:
    """The pods' sshd, and the launcher's ssh to it, with a key as the manifest says it is made."""
    if not os.access(SSHD, os.X_OK) or shutil.which("ssh-keygen") is None:
        pytest.skip("there is no sshd here: Debian's openssh-server")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "id"], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def here(words: list[str]) -> list[str]:
        return [word.replace("/ssh/", f"{tmp_path}/").replace("2222", port) for word in words]

    worker = parts("StatefulSet")["cpu"]["spec"]["template"]["spec"]["containers"][0]
    shell = dict(word.split("=", 1) for word in settings())["cluster.remote_shell"]
    home = ["-o", f"UserKnownHostsFile={tmp_path / 'known'}", "-l", getpass.getuser()]
    daemon = subprocess.Popen(here(worker["command"]), stderr=subprocess.PIPE, text=True)
    try:
        assert daemon.stderr is not None and "listening" in daemon.stderr.readline()
        words = here(remote_command(shlex.join([*shlex.split(shell), *home]), "127.0.0.1", "echo $((6 * 7))"))
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.stdout == "42\n", done.stderr
    finally:
        daemon.terminate()
        daemon.wait()
