"""Builds the Horovod wheel from the patched source, once for each key."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from installer.steps import StepFailed, Steps
from installer.tools import check_build_tools
from installer.torches import Cuda, Torch

HOROVOD = "0.28.1"
SOURCES = Path(__file__).resolve().parent.parent / "horovod"
PATCH = SOURCES / f"horovod-{HOROVOD}.patch"

BUILD_ENV = {
    "HOROVOD_WITH_PYTORCH": "1",
    "HOROVOD_WITHOUT_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITH_GLOO": "1",
    "HOROVOD_WITHOUT_MPI": "1",  # mixing an MPI controller with Gloo's CPU operations crashes
    "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # CMake 4 refuses the older ones that bundled projects ask for
    "LDFLAGS": "-Wl,--strip-debug",  # 1 MB in place of 18
}


def apply_patch(patch: str, root: Path) -> list[str]:
    """Applies a unified diff with paths `a/...` and `b/...`, so that no `patch` program is needed.

    Args:
        patch: the diff; lines before the first `---` are comment.
        root: the folder that the paths are in.

    Returns:
        The changed paths.

    Raises:
        ValueError: a line of context differs from the file.
    """
    changed: list[str] = []
    lines: list[str] = []  # of the file in hand
    shift = 0  # by how many lines the earlier hunks moved the rest
    target: Path | None = None

    def write() -> None:
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("".join(line + "\n" for line in lines))

    body = iter(patch.splitlines())
    for line in body:
        if line.startswith("--- a/"):
            write()
            name = next(body).removeprefix("+++ b/")
            target, shift = root / name, 0
            lines = target.read_text().splitlines() if target.exists() else []
            changed.append(name)
        elif match := re.match(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@", line):
            old_count, new_count = (int(group) if group is not None else 1 for group in match.group(2, 3))
            old: list[str] = []
            new: list[str] = []
            while len(old) < old_count or len(new) < new_count:
                part = next(body)
                if part[:1] != "+":
                    old.append(part[1:])
                if part[:1] != "-":
                    new.append(part[1:])
            begin = int(match[1]) - 1 + shift if old_count else int(match[1]) + shift
            if lines[begin : begin + old_count] != old:
                raise ValueError(f"{changed[-1]}, line {begin + 1}: not what the patch expects")
            lines[begin : begin + old_count] = new
            shift += new_count - old_count
    write()
    return changed


def build_env(cuda: Cuda | None, source: Path, nccl_folder: Path) -> dict[str, str]:
    """The variables of the build.

    Args:
        cuda: what NCCL needs, or None for CPUs.
        source: where the source is; left out of the messages that Horovod prints.
        nccl_folder: where a link `libnccl.so` is, since pip's NCCL has a versioned name alone.
    """
    # gcc 13 no longer includes these by way of others.
    flags = f"-include stdexcept -include string -include cstdint -ffile-prefix-map={source}/="
    env = {**BUILD_ENV, "CXXFLAGS": " ".join(filter(None, [os.environ.get("CXXFLAGS"), flags]))}
    if "MAKEFLAGS" not in os.environ:
        env["MAKEFLAGS"] = f"-j{len(os.sched_getaffinity(0))}"
    if cuda is not None:
        env |= {
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_CUDA_HOME": str(cuda.home),
            "CUDA_HOME": str(cuda.home),
            "HOROVOD_NCCL_INCLUDE": str(cuda.nccl_include),
            "HOROVOD_NCCL_LIB": str(nccl_folder),
            "HOROVOD_NCCL_LINK": "SHARED",
        }
    return env


def wheel_key(torch: Torch, cuda: Cuda | None, patch: str) -> str:
    """The name of the cached wheel's folder: two builds share it only if one can stand in for the other."""
    parts = {
        "horovod": HOROVOD,
        "patch": patch,
        "env": BUILD_ENV,
        "torch": torch.version,
        "torch_cuda": torch.cuda,
        "python": f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}",
        "cuda": [cuda.version, os.environ.get("HOROVOD_BUILD_CUDA_CC_LIST")] if cuda else None,
        "platform": [sys.platform, platform.machine(), *platform.libc_ver()],
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    kind = f"nccl-cu{cuda.version}" if cuda else "cpu"
    return f"horovod-{HOROVOD}-torch{torch.version}-{parts['python']}-{kind}-{digest}"


def cached_wheel(cache: Path, key: str) -> Path | None:
    """The wheel of that key, if it was built before."""
    return next(iter(sorted((cache / "wheels" / key).glob("horovod-*.whl"))), None)


def horovod_wheel(steps: Steps, python: Path, cache: Path, torch: Torch, cuda: Cuda | None) -> Path:
    """The Horovod wheel for this torch: the cached one, or a new one that goes into the cache.

    Args:
        steps: runs and shows the steps.
        python: the environment's Python; torch and the build tools are in it.
        cache: the cache folder.
        torch: the torch in the environment.
        cuda: what a build with NCCL needs, or None for CPUs.

    Raises:
        StepFailed: a tool is missing, or downloading, patching or compiling failed.
    """
    key = wheel_key(torch, cuda, PATCH.read_text())
    wheel = cached_wheel(cache, key)
    if wheel is not None:
        steps.say(f"Horovod: the wheel built earlier, {wheel}")
        return wheel
    found = check_build_tools()
    kind = f"with NCCL, CUDA {cuda.version}" if cuda else "for CPUs"
    steps.say(f"Horovod: building {HOROVOD} {kind} ({found}); a few minutes, once")
    with tempfile.TemporaryDirectory(prefix="hvd-hetero-build-") as folder:
        work = Path(folder)
        archive = _download(steps, python, cache)
        source = _unpack(steps, archive, work)
        if cuda is not None and not steps.dry_run:
            (work / "libnccl.so").symlink_to(cuda.nccl_library)
        steps.run(
            "build Horovod",
            [python, "-m", "pip", "wheel", "--verbose", "--no-build-isolation", "--no-deps", "--no-cache-dir",
             "--wheel-dir", work / "out", source],
            remedy="Read the first error in the log. If the compiler does not suit, name another in CXX; "
            "gcc 12 with CMake 3.25 works.",
            env=build_env(cuda, source, work),
        )  # fmt: skip
        if steps.dry_run:
            return cache / "wheels" / key / f"horovod-{HOROVOD}-*.whl"
        built = next((work / "out").glob("horovod-*.whl"))
        target = cache / "wheels" / key / built.name
        target.parent.mkdir(parents=True, exist_ok=True)
        half = target.with_suffix(".half")  # renamed when complete, so that no one installs half a wheel
        shutil.copyfile(built, half)
        half.rename(target)
    return target


def _download(steps: Steps, python: Path, cache: Path) -> Path:
    """The source distribution, from the cache or the package index; pip checks its hash."""
    folder = cache / "sources"
    archive = folder / f"horovod-{HOROVOD}.tar.gz"
    if not archive.exists():
        steps.run(
            "download Horovod",
            [python, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--no-binary", "horovod",
             "--require-hashes", "--dest", folder, "--requirement", SOURCES / "source.txt"],
            remedy="The index that pip uses must have Horovod's source distribution; see PIP_INDEX_URL.",
        )  # fmt: skip
    return archive


def _unpack(steps: Steps, archive: Path, work: Path) -> Path:
    """The source, unpacked and patched."""
    source = work / f"horovod-{HOROVOD}"
    if steps.dry_run:
        print(f"# unpack and patch Horovod\ntar -xzf {shlex.quote(str(archive))} && patch -p1 < {PATCH}")
        return source
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(work)
        changed = apply_patch(PATCH.read_text(), source)
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        remedy = f"Remove {archive}, which seems to be damaged, and run again."
        raise StepFailed("patch Horovod", f"{archive}: {error}", remedy) from error
    steps.say(f"patched {len(changed)} files of Horovod ({PATCH.name} says what and why)")
    return source
