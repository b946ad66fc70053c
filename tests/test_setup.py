"""scripts/setup: what it decides, what it remembers, and what it says when a step fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from installer import main, torches, wheel  # noqa: E402
from installer.steps import StepFailed, Steps, remedy_for  # noqa: E402

CUDA_TORCH = torches.Torch("2.13.0+cu130", "13.0")


def program(path: Path, text: str) -> Path:
    """Writes a small shell script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def setup_in(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs scripts/setup with its environment and its cache below `folder`."""
    ours = ("PIP_", "HVD_HETERO_", "CXX")
    base = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    places = {"HVD_HETERO_VENV": str(folder / "venv"), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, str(ROOT / "scripts" / "setup"), *arguments]
    return subprocess.run(command, env={**base, **places, **env}, capture_output=True, text=True, timeout=300)


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like CUDA 13.0 with NCCL."""
    home = tmp_path / "cuda"
    program(home / "bin" / "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    for name in ("include/cuda_runtime.h", "include/nccl.h", "lib/libnccl.so.2"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).touch()
    monkeypatch.setenv("CUDA_HOME", str(home))
    return home


# --- failures: the step, the end of its log, what to do ---


def test_too_old_a_python_is_a_message() -> None:
    code = "import sys; sys.version_info = (3, 6, 15); exec(open('scripts/setup').read())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "check Python" in done.stderr and "3.10 or newer" in done.stderr and "PYTHON=" in done.stderr


def test_no_compiler(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = setup_in(tmp_path, PATH=str(tmp_path / "bin"))
    assert done.returncode == 1
    assert "'check C++ compiler' failed" in done.stderr and "apt-get install g++" in done.stderr
    assert not (tmp_path / "venv").exists(), "found out before anything is made"


def test_a_compiler_that_cannot_do_it(tmp_path: Path) -> None:
    compiler = program(tmp_path / "bin" / "old-c++", "echo 'error: unrecognized option -std=c++17'; exit 1")
    done = setup_in(tmp_path, CXX=str(compiler))
    assert done.returncode == 1
    assert "cannot compile C++17" in done.stderr and "unrecognized option" in done.stderr


@pytest.mark.parametrize(
    ("cmake", "problem"), [(None, "no cmake was found"), ("echo cmake version 3.10.2", "3.13 or newer")]
)
def test_no_cmake_or_an_old_one(tmp_path: Path, cmake: str | None, problem: str) -> None:
    program(tmp_path / "bin" / "c++", "exit 0")
    if cmake is not None:
        program(tmp_path / "bin" / "cmake", cmake)
    done = setup_in(tmp_path, PATH=str(tmp_path / "bin"))
    assert done.returncode == 1
    assert "'check CMake' failed" in done.stderr and problem in done.stderr
    assert "pip install cmake" in done.stderr


def test_no_network(tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9/simple"
    done = setup_in(tmp_path, PIP_INDEX_URL=nowhere, PIP_RETRIES="0", PIP_CONFIG_FILE=os.devnull)
    assert done.returncode == 1
    assert "'install build tools' failed" in done.stderr
    assert "Last lines of" in done.stderr and "127.0.0.1" in done.stderr
    assert "What to do: The package index cannot be reached" in done.stderr


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.tex").write_text("years of work")
    done = setup_in(tmp_path)
    assert done.returncode == 1
    assert "is not an environment" in done.stderr and "HVD_HETERO_VENV" in done.stderr
    assert (tmp_path / "venv" / "thesis.tex").exists()


def test_unknown_extra_and_unknown_cuda_mode(tmp_path: Path) -> None:
    assert "there are dev, metrics, mlflow, nlp, ray, report, wandb" in setup_in(tmp_path, "--extra", "tests").stderr
    assert "must be auto, on or off" in setup_in(tmp_path, HVD_HETERO_CUDA="yes").stderr


@pytest.mark.parametrize(
    ("log", "remedy"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "MAKEFLAGS=-j1"),
        ("NewConnectionError: Failed to establish a new connection: refused", "PIP_INDEX_URL"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "another index"),
        ("something new", "the step's own"),
    ],
)
def test_remedy_follows_the_cause_in_the_log(log: str, remedy: str) -> None:
    assert remedy in remedy_for(log, "the step's own")


def test_a_long_step_shows_that_it_is_alive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = "import time; print('[ 45%] Building', flush=True); time.sleep(1)"
    Steps(tmp_path, heartbeat_sec=0.2).run("compile", [sys.executable, "-c", script], remedy="none")
    shown = capsys.readouterr().out
    assert "compile ..." in shown and "so far: [ 45%] Building" in shown and "compile: done in" in shown


def test_a_failed_step_ends_with_its_log(tmp_path: Path) -> None:
    script = "print('x.h:7:2: error: no such type', *range(100), sep='\\nline '); raise SystemExit(3)"
    with pytest.raises(StepFailed) as caught:
        Steps(tmp_path).run("compile", [sys.executable, "-c", script], remedy="Pray.")
    report = caught.value.report()
    assert "step 'compile' failed" in report and "status 3" in report and report.endswith("What to do: Pray.")
    assert "line 99" in report and "line 50\n" not in report
    assert "The first error in it:\n  | x.h:7:2: error: no such type" in report


# --- the wheel ---


def test_wheel_key_tells_builds_apart(toolkit: Path) -> None:
    cuda = torches.Cuda(toolkit, "13.0", toolkit / "include", toolkit / "lib" / "libnccl.so.2")
    keys = {
        wheel.wheel_key(CUDA_TORCH, None, "patch"),
        wheel.wheel_key(CUDA_TORCH, cuda, "patch"),
        wheel.wheel_key(CUDA_TORCH, None, "other patch"),
        wheel.wheel_key(torches.Torch("2.13.0+cpu", None), None, "patch"),
    }
    assert len(keys) == 4
    assert wheel.wheel_key(CUDA_TORCH, cuda, "patch") == wheel.wheel_key(CUDA_TORCH, cuda, "patch")


# --- CUDA ---


def test_nccl_where_torch_and_toolkit_agree(toolkit: Path) -> None:
    cuda = torches.choose_cuda(CUDA_TORCH, "auto")
    assert isinstance(cuda, torches.Cuda)
    assert (cuda.home, cuda.version, cuda.nccl_library) == (toolkit, "13.0", toolkit / "lib" / "libnccl.so.2")
    env = wheel.build_env(cuda, Path("/source"), Path("/links"))
    assert env["HOROVOD_GPU_OPERATIONS"] == "NCCL" and env["HOROVOD_NCCL_LIB"] == "/links"


@pytest.mark.parametrize(
    ("torch", "problem"),
    [
        (torches.Torch("2.13.0+cpu", None), "is a CPU build"),
        (torches.Torch("2.13.0+cu126", "12.6"), "wrong CUDA: torch 2.13.0+cu126 is for 12.6"),
    ],
)
def test_what_stands_against_nccl(toolkit: Path, torch: torches.Torch, problem: str) -> None:
    assert problem in str(torches.choose_cuda(torch, "auto"))
    with pytest.raises(StepFailed, match=problem.replace("+", r"\+")):
        torches.choose_cuda(torch, "on")
    assert torches.choose_cuda(CUDA_TORCH, "off") == "HVD_HETERO_CUDA=off"


def test_the_plan_can_be_printed(tmp_path: Path, toolkit: Path) -> None:
    plan = setup_in(tmp_path, "--extra", "dev", "--print-plan", HVD_HETERO_CUDA="on").stdout
    assert "HOROVOD_GPU_OPERATIONS=NCCL" in plan and f"HOROVOD_CUDA_HOME={toolkit}" in plan
    assert "horovod-0.28.1.patch" in plan and "--editable" in plan and "'pytest " in plan
    assert not (tmp_path / "venv").exists()


def test_a_cuda_torch_of_the_system_is_used(tmp_path: Path, toolkit: Path) -> None:
    package = tmp_path / "site" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('only looked at')")
    version = "__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\n"
    (package / "version.py").write_text(version)
    site = str(package.parent)
    plan = setup_in(tmp_path, "--print-plan", PYTHONPATH=site).stdout
    assert "--system-site-packages" in plan and "HOROVOD_GPU_OPERATIONS=NCCL" in plan
    assert "torch==" not in plan and "torchvision==0.26.0" in plan
    assert "torch==2.13.0" in setup_in(tmp_path, "--print-plan", PYTHONPATH=site, HVD_HETERO_CUDA="off").stdout
    (package / "version.py").write_text(version.replace("2.11.0", "1.13.1"))
    assert "torch==2.13.0" in setup_in(tmp_path, "--print-plan", PYTHONPATH=site).stdout, "too old"


def test_a_cuda_torch_of_the_environment_that_it_is_started_in(
    tmp_path: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new environment sees that one's packages, also when it is made ready again from elsewhere."""
    other, venv = torches.packages_of(tmp_path / "other"), tmp_path / "venv"
    (other / "torch").mkdir(parents=True)
    (other / "torch" / "__init__.py").touch()
    (other / "torch" / "version.py").write_text("__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    monkeypatch.setenv("HVD_HETERO_VENV", str(venv))
    monkeypatch.setenv("HVD_HETERO_SETUP_FROM", str(tmp_path / "other"))
    settings = main.parse([])
    found = torches.system_cuda_torch(main.other_packages(settings))
    assert found is not None and (found.version, found.packages) == ("2.11.0+cu130", other)
    torches.packages_of(venv).mkdir(parents=True)
    (venv / "pyvenv.cfg").touch()
    made: list[list[str]] = []
    monkeypatch.setattr(Steps, "run", lambda self, name, command, remedy: made.append([str(word) for word in command]))
    main.make_venv(settings, Steps(tmp_path), found)
    (other / "pip").mkdir()
    main.make_venv(settings, Steps(tmp_path), found)
    assert ["--without-pip" in command for command in made] == [False, True], "the other's pip is there too"
    (other / "shim.pth").write_text(f"{tmp_path / 'shim'}\n")
    (tmp_path / "shim").mkdir()
    see = f"import site, sys; site.addsitedir({str(torches.packages_of(venv))!r}); print(*sys.path)"
    seen = subprocess.run([sys.executable, "-c", see], capture_output=True, text=True, check=True).stdout.split()
    assert {str(other), str(tmp_path / "shim")} <= set(seen), "with what its own .pth files ask for"
    for again in (str(venv), ""):
        monkeypatch.setenv("HVD_HETERO_SETUP_FROM", again)
        assert torches.system_cuda_torch(main.other_packages(settings)) == found


# --- what is remembered ---


def test_nothing_to_do_the_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stamp counts while the environment is whole and nothing that decides it has changed."""
    monkeypatch.setenv("HVD_HETERO_VENV", str(tmp_path / "venv"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HVD_HETERO_TORCH_INDEX", raising=False)
    commands: list[str] = []

    def record(self: Steps, name: str, command: list[str], remedy: str, **rest: object) -> None:
        commands.append(name)
        if name == "make environment":
            program(tmp_path / "venv" / "bin" / "python", "exit 0")
            (tmp_path / "venv" / "pyvenv.cfg").touch()

    monkeypatch.setattr(Steps, "run", record)
    monkeypatch.setattr(torches, "probe", lambda python: torches.Torch("2.13.0+cpu", None))
    monkeypatch.setattr(wheel, "horovod_wheel", lambda *arguments: tmp_path / "horovod.whl")

    assert main.main([]) == 0 and commands[0] == "make environment" and commands[-1] == "install hvd-hetero"
    commands.clear()
    assert main.main([]) == 0 and commands == []
    assert main.main(["--extra", "dev"]) == 0
    assert commands == ["install requirements with dev", "install hvd-hetero"]
    commands.clear()
    assert main.main([]) == 0 and commands == [], "an extra that is there stays there"
    monkeypatch.setenv("HVD_HETERO_TORCH_INDEX", "http://localhost/cpu")
    assert main.main([]) == 0
    assert "install torch" in commands and "make environment" not in commands
    commands.clear()
    (tmp_path / "venv" / "bin" / "python").unlink()
    assert main.main([]) == 0 and commands[0] == "make environment", "a broken environment is made again"


def test_every_requirement_has_an_upper_end() -> None:
    always, extras = main.requirements()
    assert {"dev", "nlp", "report"} <= set(extras)
    for need in [*always, *(need for needs in extras.values() for need in needs)]:
        assert "<" in need or "==" in need, need


# --- the two commands ---


@pytest.mark.parametrize(
    ("script", "setup", "program_name", "expected"),
    [
        ("quickstart", "scripts/setup", "hvd-hetero", f"launch {ROOT}/configs/quickstart.yaml run.dir=x train.tau=2"),
        ("test", "scripts/setup --extra dev --extra report --extra nlp --extra metrics", "python",
         "-m pytest run.dir=x train.tau=2"),
    ],
)
def test_commands_epoch_their_arguments_on(
    tmp_path: Path, script: str, setup: str, program_name: str, expected: str
) -> None:
    python = program(tmp_path / "python", 'echo "setup: $*"')
    program(tmp_path / "venv" / "bin" / program_name, 'echo "then: $*"')
    env = {**os.environ, "PYTHON": str(python), "HVD_HETERO_VENV": str(tmp_path / "venv")}
    command = [str(ROOT / "scripts" / script), "run.dir=x", "train.tau=2"]
    shown = subprocess.run(command, env=env, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert shown == f"setup: {ROOT}/{setup}\nthen: {expected}\n"
