"""Looks for what must be there already: Python with venv and headers, a C++17 compiler, CMake, make."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

from installer.steps import StepFailed

CMAKE_LEAST = (3, 13)
PACKAGES = "Debian, Ubuntu: apt-get install {0}; Fedora: dnf install {1}; without root: conda install {2}"


def check_venv(wants_pip: bool = True) -> None:
    """Some systems ship Python without the part that makes environments.

    Args:
        wants_pip: whether the environment has to be given a pip.

    Raises:
        StepFailed: there is no venv or no pip to put into it.
    """
    if find_spec("venv") is None or (wants_pip and find_spec("ensurepip") is None):
        raise StepFailed(
            "check Python",
            "this Python cannot make environments: venv or ensurepip is missing",
            PACKAGES.format("python3-venv", "python3", "python"),
        )


def check_build_tools() -> str:
    """Whether Horovod can be compiled here, found out before minutes are spent on downloads.

    Returns:
        What was found, for one line on the screen.

    Raises:
        StepFailed: something is missing or too old.
    """
    compiler = _check_compiler()
    cmake = _check_cmake()
    if not shutil.which("make"):
        raise StepFailed("check make", "no make was found", PACKAGES.format("make", "make", "make"))
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        remedy = PACKAGES.format("python3-dev", "python3-devel", "python")
        raise StepFailed("check Python headers", f"there is no {header}", remedy)
    return f"{compiler}, CMake {cmake}"


def _check_compiler() -> str:
    """The C++ compiler's name, once it has compiled a line of C++17."""
    remedy = PACKAGES.format("g++", "gcc-c++", "cxx-compiler") + "; or name yours in CXX"
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise StepFailed("check C++ compiler", "no C++ compiler was found (c++, g++ or clang++)", remedy)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cc")
        source.write_text("#include <optional>\nint main() { return std::optional<int>(0).value(); }\n")
        log = Path(tempfile.gettempdir(), f"hvd-hetero-compiler-{os.getuid()}.log")
        with log.open("w") as out:
            command = [*compiler.split(), "-std=c++17", str(source), "-o", str(Path(folder, "probe"))]
            try:
                status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode
            except OSError as error:
                raise StepFailed("check C++ compiler", f"cannot start {compiler}: {error}", remedy) from error
    if status != 0:
        raise StepFailed("check C++ compiler", f"{compiler} cannot compile C++17 here", remedy, log)
    return compiler


def _check_cmake() -> str:
    """CMake's version."""
    remedy = PACKAGES.format("cmake", "cmake", "cmake") + "; or pip install cmake"
    cmake = os.environ.get("HOROVOD_CMAKE") or shutil.which("cmake")
    if cmake is None:
        raise StepFailed("check CMake", "no cmake was found", remedy)
    try:
        text = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        raise StepFailed("check CMake", f"cannot start {cmake}: {error}", remedy) from error
    match = re.search(r"version (\d+)\.(\d+)\S*", text)
    least = ".".join(map(str, CMAKE_LEAST))
    if match is None or (int(match[1]), int(match[2])) < CMAKE_LEAST:
        problem = f"{cmake} says {text.strip()[:60]!r}; {least} or newer is needed"
        raise StepFailed("check CMake", problem, remedy)
    return match[0].removeprefix("version ")
