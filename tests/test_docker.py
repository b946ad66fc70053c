"""The container files, as far as they can be checked without an engine."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="pyyaml reads the compose file: scripts/setup --extra dev")

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile in order, continued lines joined, comments dropped."""
    lines = [line for line in (ROOT / "docker" / name).read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(word.upper(), rest) for word, rest in pairs]


def steps(name: str, word: str) -> list[str]:
    """What follows each instruction of that kind."""
    return [rest for found, rest in instructions(name) if found == word]


def compose() -> dict[str, Any]:
    """The compose file."""
    parsed = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    assert isinstance(parsed, dict)
    return parsed


def ignored() -> list[str]:
    """The patterns of .dockerignore."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_environment_comes_from_setup_alone(name: str) -> None:
    """No second copy of its steps: nothing but scripts/setup installs Python packages or builds Horovod."""
    runs = steps(name, "RUN")
    assert sum("scripts/setup" in run for run in runs) == 2
    for run in runs:
        assert not re.search(r"\bpip3?\b|horovod|cmake \.|-m venv", run, re.IGNORECASE), run
        if "scripts/setup" in run:
            assert run.endswith("$EXTRAS") and "--mount=type=cache,target=/home/hvd/.cache,uid=2000" in run


@pytest.mark.parametrize("name", DOCKERFILES)
def test_slow_layers_do_not_depend_on_the_sources(name: str, tmp_path: Path) -> None:
    """What is copied before the first set-up is what that needs, and the sources come after it."""
    order = [f"{word} {rest}" for word, rest in instructions(name)]
    first = next(at for at, step in enumerate(order) if "scripts/setup --no-package" in step)
    everything = next(at for at, step in enumerate(order) if re.fullmatch(r"COPY --chown=\S+ \. \.", step))
    last = next(at for at, step in enumerate(order) if re.search(r"scripts/setup \$EXTRAS$", step))
    assert first < everything < last
    for step in order[:first]:
        if step.startswith("COPY "):
            *sources, target = [word for word in shlex.split(step)[1:] if not word.startswith("--")]
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, tmp_path / target)
                else:
                    (tmp_path / target).parent.mkdir(exist_ok=True)
                    shutil.copy(ROOT / source, tmp_path / target)
    command = [sys.executable, str(tmp_path / "scripts" / "setup"), "--no-package", "--print-plan"]
    env = {**os.environ, "HVD_HETERO_VENV": str(tmp_path / "venv"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "install requirements" in done.stdout and "--editable" not in done.stdout


@pytest.mark.parametrize("name", DOCKERFILES)
def test_runs_as_an_ordinary_user(name: str) -> None:
    order = instructions(name)
    users = [at for at, (word, _) in enumerate(order) if word == "USER"]
    assert len(users) == 1 and order[users[0]][1] not in ("root", "0")
    for word, rest in order[users[0] :]:
        assert word != "COPY" or rest.startswith("--chown=hvd:hvd ")
        assert not (word == "RUN" and "apt-get" in rest)
    assert any("useradd" in rest and "--uid 2000" in rest for _, rest in order[: users[0]])
    writable = " ".join(rest for _, rest in order[: users[0]])
    assert "/app/runs" in writable and "/opt/hvd-hetero" in writable, "the user must own what it writes to"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_base_image_and_package_lists(name: str) -> None:
    given = dict(argument.split("=", 1) for argument in steps(name, "ARG"))
    base = [given.get(image.removeprefix("$"), image) for image in steps(name, "FROM")]
    assert len(base) == 1 and re.search(r":[\w.-]*\d", base[0]) and not base[0].endswith(":latest")
    for run in steps(name, "RUN"):
        if "apt-get install" in run:
            assert "apt-get update" in run and "rm -rf /var/lib/apt/lists/*" in run
            assert {"build-essential", "cmake"} <= set(run.split())


@pytest.mark.parametrize("name", DOCKERFILES)
def test_variables_are_those_that_setup_knows(name: str) -> None:
    known = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "setup"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    for assignments in steps(name, "ENV"):
        for variable in (word.split("=")[0] for word in shlex.split(assignments)):
            assert variable in known or variable == "PATH", variable
    environment = " ".join(steps(name, "ENV"))
    venv = re.search(r"HVD_HETERO_VENV=(\S+)", environment)
    assert venv is not None and f"PATH={venv[1]}/bin:$PATH" in environment


def test_default_service_is_the_quickstart() -> None:
    services = compose()["services"]
    assert [name for name, service in services.items() if "profiles" not in service] == ["quickstart"]
    assert services["quickstart"]["command"][0] == "scripts/quickstart"
    assert services["test"]["command"] == ["scripts/test"]
    assert "--extra dev" in services["test"]["build"]["args"]["EXTRAS"]


def test_services_build_from_this_tree() -> None:
    for name, service in compose()["services"].items():
        build = service["build"]
        context = (ROOT / "docker" / build["context"]).resolve()
        assert context == ROOT and (context / build["dockerfile"]).is_file(), name
        declared = {rest.split("=")[0] for rest in steps(Path(build["dockerfile"]).name, "ARG")}
        assert set(build["args"]) <= declared, name
        program = service["command"][0]
        assert program == "hvd-hetero" or os.access(ROOT / program, os.X_OK), name
        for argument in service["command"]:
            assert not argument.endswith(".yaml") or (ROOT / argument).is_file(), argument
        for volume in service.get("volumes", []):
            source, target = volume.split(":")
            assert source in compose()["volumes"] and target == "/app/runs"
    images = [service["image"] for service in compose()["services"].values()]
    assert len(set(images)) == len(images), "services that are built differently have images of their own"


def test_every_compose_can_read_the_file_and_finds_the_volume_of_earlier_runs() -> None:
    """Docker Compose 1.29 refuses a project's name in the file, and would make a volume for each name."""
    assert set(compose()) == {"services", "volumes"}
    assert compose()["volumes"] == {"runs": {"name": "hvd-hetero_runs"}}


def test_the_check_with_an_engine_says_at_which_step_it_ends(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "docker_check"), "--log", str(tmp_path / "log")]
    done = subprocess.run(command, env={**os.environ, "PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(r"FAILED +engine +\d+\.\d s  there is no docker on the path\n", done.stdout)


def test_gpu_service_reserves_gpus() -> None:
    gpu = compose()["services"]["gpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"] and device["count"] == "all"
    assert gpu["build"]["dockerfile"].endswith("Dockerfile.cuda")
    assert not any(service.get("privileged") for service in compose()["services"].values())


def test_dockerignore_keeps_what_the_image_needs_and_drops_the_rest() -> None:
    needed = ["setup.cfg", "pyproject.toml", "scripts", "hvd_hetero", "configs", "tests", "docker", ".dockerignore"]
    for name in needed:
        assert not any(fnmatch(name, pattern) for pattern in ignored()), name
    assert {".git", ".venv", "runs"} <= set(ignored())
