"""The order of the steps, and what is remembered so that a second run has nothing to do."""

from __future__ import annotations

import argparse
import configparser
import fcntl
import hashlib
import json
import os
import sys
import tempfile
from ast import literal_eval
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from installer import tools, torches, wheel
from installer.steps import StepFailed, Steps

ROOT = Path(__file__).resolve().parent.parent.parent
STAMP = "hvd-hetero-setup.json"
OTHER_PACKAGES = "hvd-hetero-torch.pth"
# Horovod's build and horovodrun want these; pip's isolation is off, so that it compiles against our torch.
BUILD_TOOLS = ["pip>=23.1", "setuptools>=77.0.3,<82"]
BUILD_TOOLS += ["wheel", "packaging", "cffi", "pyyaml", "psutil", "cloudpickle"]

HELP_END = """\
variables:
  HVD_HETERO_VENV         where the environment is (default: .venv beside setup.cfg)
  HVD_HETERO_TORCH_INDEX  address of one more package index to take torch from. PyTorch has one for CPU-only
                          wheels, far smaller than the default's, and one for each CUDA version: pytorch.org
                          shows them under "Get Started"
  HVD_HETERO_CUDA         auto: Horovod gets NCCL where torch is a CUDA build and a matching toolkit is there;
                          on: fail where it cannot; off: never (default: auto)
  CUDA_HOME               the CUDA toolkit (default: where nvcc is)
  XDG_CACHE_HOME          the built wheel is kept in hvd-hetero/ under it (default: ~/.cache)
  MAKEFLAGS, CXX, PIP_*   as ever
"""


@dataclass(frozen=True)
class Settings:
    """What the command line and the environment ask for."""

    venv: Path
    cache: Path
    extras: frozenset[str]
    package: bool
    torch_index: str
    cuda_mode: str
    dry_run: bool

    @property
    def python(self) -> Path:
        """The environment's Python."""
        return self.venv / "bin" / "python"

    @property
    def index_options(self) -> list[str]:
        """How pip is told of the index for torch."""
        return ["--extra-index-url", self.torch_index] if self.torch_index else []


def parse(arguments: Sequence[str]) -> Settings:
    """Reads the command line and the environment."""
    parser = argparse.ArgumentParser(
        prog="scripts/setup",
        description="Makes the environment: torch, Horovod (built here), hvd-hetero; skips what is there.",
        epilog=HELP_END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--extra", action="append", default=[], metavar="NAME", help="dev, nlp or report; repeatable")
    add("--no-package", action="store_true", help="all but hvd-hetero itself (for container layers)")
    add("--print-plan", action="store_true", help="print the commands and run none")
    options = parser.parse_args(arguments)
    known = requirements()[1]
    for name in options.extra:
        if name not in known:
            parser.error(f"--extra {name}: unknown; there are {', '.join(sorted(known))}")
    mode = os.environ.get("HVD_HETERO_CUDA") or "auto"
    if mode not in ("auto", "on", "off"):
        parser.error(f"HVD_HETERO_CUDA={mode}: must be auto, on or off")
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Settings(
        venv=Path(os.environ.get("HVD_HETERO_VENV") or ROOT / ".venv").absolute(),
        cache=Path(cache_home).absolute() / "hvd-hetero",
        extras=frozenset(options.extra),
        package=not options.no_package,
        torch_index=os.environ.get("HVD_HETERO_TORCH_INDEX", ""),
        cuda_mode=mode,
        dry_run=options.print_plan,
    )


def other_packages(settings: Settings) -> Path | None:
    """The folder of packages of the environment that scripts/setup was started in, now or when ours was made."""
    prefix, seen = os.environ.get("HVD_HETERO_SETUP_FROM"), torches.packages_of(settings.venv) / OTHER_PACKAGES
    if prefix and Path(prefix).resolve() != settings.venv.resolve():
        return torches.packages_of(Path(prefix))
    return Path(literal_eval(seen.read_text().partition("addsitedir(")[2].strip()[:-1])) if seen.exists() else None


def requirements() -> tuple[list[str], dict[str, list[str]]]:
    """What setup.cfg says the package needs: always, and for each extra."""
    parser = configparser.ConfigParser(comment_prefixes=("#",), inline_comment_prefixes=(" #",))
    parser.read(ROOT / "setup.cfg")
    extras = dict(parser["options.extras_require"]) if "options.extras_require" in parser else {}
    return (
        parser["options"]["install_requires"].split("\n")[1:],
        {name: text.split("\n")[1:] for name, text in extras.items()},
    )


def digest(*parts: object) -> str:
    """A short hash of anything that json can write."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def keys(settings: Settings, system_torch: torches.Torch | None, extras: frozenset[str]) -> dict[str, str]:
    """What decides each stage: one whose key is remembered is done. A later key holds the earlier ones."""
    scripts = sorted([*wheel.SOURCES.iterdir(), *Path(__file__).parent.glob("*.py")])
    toolkit = torches.find_toolkit() if settings.cuda_mode != "off" else None
    python = os.path.realpath(sys.executable)  # it has several names
    interpreter = digest(str(settings.venv), sys.version, python, str(system_torch))
    texts = [file.read_text() for file in scripts]
    base = digest(interpreter, texts, settings.torch_index, settings.cuda_mode, str(toolkit))
    always, optional = requirements()
    needs = digest(base, always, {name: optional[name] for name in sorted(extras)})
    packaging = [(ROOT / name).read_text() for name in ("setup.cfg", "pyproject.toml")]
    package = digest(needs, str(ROOT), packaging)
    return {"interpreter": interpreter, "base": base, "requirements": needs, "package": package}


def remembered(settings: Settings) -> dict[str, str]:
    """The stages that the environment has behind it; empty if it is broken or not there."""
    try:
        stamp = json.loads((settings.venv / STAMP).read_text())
        return dict(stamp) if settings.python.exists() else {}
    except (OSError, ValueError):
        return {}


def main(arguments: Sequence[str]) -> int:
    """Runs the set-up.

    Returns:
        The exit status.
    """
    settings = parse(arguments)
    steps = Steps(settings.cache / "logs" / digest(str(settings.venv)), settings.dry_run)
    may_use_cuda = settings.cuda_mode != "off" and torches.find_toolkit() is not None
    system_torch = torches.system_cuda_torch(other_packages(settings)) if may_use_cuda else None
    try:
        if up_to_date(settings, system_torch):
            steps.say(f"environment {settings.venv}: nothing to do")
            return 0
        settings.cache.mkdir(parents=True, exist_ok=True)
        with (settings.cache / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                steps.say("waiting for another scripts/setup to end ...")
                fcntl.flock(lock, fcntl.LOCK_EX)
            install(settings, steps, system_torch)
    except StepFailed as failure:
        print(failure.report(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; run again to go on from here", file=sys.stderr)
        return 130
    return 0


def up_to_date(settings: Settings, system_torch: torches.Torch | None) -> bool:
    """Whether the environment already has all that is asked for."""
    done = remembered(settings)
    extras = settings.extras | frozenset(filter(None, done.get("extras", "").split(",")))
    wanted = keys(settings, system_torch, extras)
    stages = ["interpreter", "base", "requirements"] + (["package"] if settings.package else [])
    return not settings.dry_run and all(done.get(stage) == wanted[stage] for stage in stages)


def install(settings: Settings, steps: Steps, system_torch: torches.Torch | None) -> None:
    """Runs the stages that are not behind us, and remembers each when it is done."""
    done = {} if settings.dry_run else remembered(settings)
    extras = settings.extras | frozenset(filter(None, done.get("extras", "").split(",")))
    wanted = keys(settings, system_torch, extras)
    pip: list[str | Path] = [settings.python, "-m", "pip", "install", "--progress-bar", "off"]

    def finish(stage: str) -> None:
        done[stage] = wanted[stage]
        done["extras"] = ",".join(sorted(extras))
        if not settings.dry_run:
            (settings.venv / STAMP).write_text(json.dumps(done, indent=1))

    steps.say(f"environment {settings.venv}, Python {sys.version.split()[0]}, logs in {steps.log_dir}")
    if done.get("interpreter") != wanted["interpreter"]:
        tools.check_venv(wants_pip=system_torch is None or not system_torch.brings_pip)
        if not list(settings.cache.glob(f"wheels/horovod-*-{sys.implementation.cache_tag}-*/*.whl")):
            tools.check_build_tools()  # now, and not after minutes of downloads
        make_venv(settings, steps, system_torch)
        done.clear()
        finish("interpreter")
    if done.get("base") != wanted["base"]:
        install_base(settings, steps, pip, system_torch)
        finish("base")
    if done.get("requirements") != wanted["requirements"]:
        always, optional = requirements()
        names = always + [need for name in sorted(extras) for need in optional[name]]
        steps.run(
            "install requirements" + (f" with {', '.join(sorted(extras))}" if extras else ""),
            [*pip, *settings.index_options, *names],
            remedy="Read the log: a package of setup.cfg could not be installed.",
        )
        finish("requirements")
    if settings.package and done.get("package") != wanted["package"]:
        command = [*pip, "--no-deps", "--no-build-isolation", "--editable", ROOT]
        steps.run("install hvd-hetero", command, remedy="Read the log: setup.cfg or the package is at fault.")
        finish("package")
    if not settings.dry_run:
        steps.say(f"ready: {settings.venv}/bin/hvd-hetero")


def make_venv(settings: Settings, steps: Steps, system_torch: torches.Torch | None) -> None:
    """Makes the environment, in place of a broken or outdated one; it sees the packages beside a torch that is there.

    Raises:
        StepFailed: the folder holds something that is not an environment.
    """
    venv = settings.venv
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        raise StepFailed(
            "make environment",
            f"{venv} exists and is not an environment, so it is left alone",
            "Name another folder in HVD_HETERO_VENV, or remove this one.",
        )
    command: list[str | Path] = [sys.executable, "-m", "venv", "--clear", venv]
    if system_torch is not None:
        command += ["--system-site-packages", *(["--without-pip"] if system_torch.brings_pip else [])]
    steps.run("make environment", command, remedy=f"Is {venv.parent} writable? Has this Python venv?")
    if system_torch is not None and system_torch.packages is not None:
        steps.say(f"the environment sees {system_torch.packages}, where torch is")
        if not steps.dry_run:  # its own .pth files count too: by one of them setuptools gives Horovod its distutils
            line = f"import site; site.addsitedir({str(system_torch.packages)!r})\n"
            (torches.packages_of(venv) / OTHER_PACKAGES).write_text(line)


def install_base(
    settings: Settings, steps: Steps, pip: Sequence[str | Path], system_torch: torches.Torch | None
) -> None:
    """torch, torchvision and Horovod, in this order, since Horovod is compiled against torch."""
    steps.run("install build tools", [*pip, *BUILD_TOOLS], remedy="Read the log: pip could not install them.")
    version = system_torch.version if system_torch else torches.TORCH
    if system_torch is not None:
        steps.say(f"torch: the CUDA build that this Python has, {version}")
    else:
        remedy = f"Is there a torch {version} for this Python? HVD_HETERO_TORCH_INDEX names another index."
        steps.run("install torch", [*pip, *settings.index_options, f"torch=={version}"], remedy=remedy)
    vision = f"torchvision=={torches.torchvision_for(version)}"
    # Without its requirements: they name torch, and the index may hold a torch of another kind.
    command = [*pip, "--no-deps", *settings.index_options, vision]
    steps.run("install torchvision", command, remedy=f"Is there a {vision} for this Python?")
    if settings.dry_run:
        torch, chosen = torches.guess(system_torch, settings.cuda_mode)
    else:
        torch = torches.probe(settings.python)
        chosen = torches.choose_cuda(torch, settings.cuda_mode)
    cuda = chosen if isinstance(chosen, torches.Cuda) else None
    steps.say(f"torch {torch.version}; Horovod " + ("with NCCL" if cuda else f"for CPUs ({chosen})"))
    built = wheel.horovod_wheel(steps, settings.python, settings.cache, torch, cuda)
    command = [*pip, "--no-deps", "--force-reinstall", built]
    steps.run("install Horovod", command, remedy=f"Remove {built}, which seems to be damaged, and run again.")
    with tempfile.TemporaryDirectory() as elsewhere:  # no folder that could hide the installed package
        steps.run(
            "check Horovod",
            [settings.python, "-c", "import horovod.torch as h; from horovod._hvd_hetero_fixes import FIXES; "
             "assert h.gloo_built(); print(FIXES, 'nccl', h.nccl_built())"],
            remedy=f"The build does not fit this torch. Remove {built} and run again.",
            cwd=Path(elsewhere),
        )  # fmt: skip
