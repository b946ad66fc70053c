"""Which torch is used, and whether Horovod is built with NCCL for it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from installer.steps import StepFailed

TORCH = "2.13.0"  # what is installed where no usable torch is there already
TORCHVISION_OF = {"2.11": "0.26.0", "2.12": "0.27.0", "2.13": "0.28.0"}  # made for each other

PROBE = """
import importlib.util, json, torch
spec = importlib.util.find_spec("nvidia.nccl") if importlib.util.find_spec("nvidia") else None
nccl = spec.submodule_search_locations[0] if spec else None
print(json.dumps([torch.__version__, torch.version.cuda, nccl]))
"""


@dataclass(frozen=True)
class Torch:
    """The torch that Horovod is built for.

    Args:
        version: with its local part, as `2.13.0+cpu`.
        cuda: the CUDA version it was built for, or None.
        nccl: the folder with the NCCL headers and library that came with it, or None.
        packages: the folder of packages that it lies in, if that is another environment's.
    """

    version: str
    cuda: str | None
    nccl: Path | None = None
    packages: Path | None = None

    @property
    def brings_pip(self) -> bool:
        """Whether an environment that sees its packages has a pip with them."""
        return self.packages is not None and (self.packages / "pip").is_dir()


@dataclass(frozen=True)
class Cuda:
    """What a build with NCCL needs: the toolkit and NCCL's files."""

    home: Path
    version: str
    nccl_include: Path
    nccl_library: Path


def torchvision_for(torch_version: str) -> str:
    """The torchvision version that goes with a torch version."""
    return TORCHVISION_OF[".".join(torch_version.split(".")[:2])]


def packages_of(environment: Path) -> Path:
    """The folder of an environment's packages."""
    return environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def system_cuda_torch(packages: Path | None = None) -> Torch | None:
    """Find the CUDA torch that is there already, if there is one in our range, without importing it.

    Args:
        packages: a folder to look in before those of the Python that runs this.
    """
    if packages is not None and (there := _cuda_torch(PathFinder.find_spec("torch", [str(packages)]))) is not None:
        return replace(there, packages=packages)
    return _cuda_torch(PathFinder.find_spec("torch"))


def _cuda_torch(spec: ModuleSpec | None) -> Torch | None:
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text()
    version = re.search(r"__version__ *(?::[^=]*)?= *'([^']+)'", text)
    cuda = re.search(r"^cuda *(?::[^=]*)?= *'([^']+)'", text, re.MULTILINE)
    if version is None or cuda is None or ".".join(version[1].split(".")[:2]) not in TORCHVISION_OF:
        return None
    return Torch(version[1], cuda[1])


def probe(python: Path) -> Torch:
    """Asks an environment which torch it has.

    Raises:
        StepFailed: torch cannot be imported there.
    """
    done = subprocess.run([str(python), "-c", PROBE], capture_output=True, text=True)
    if done.returncode != 0:
        raise StepFailed(
            "check torch",
            "torch was installed but cannot be imported: " + done.stderr.strip().splitlines()[-1],
            "Remove the environment's folder and run again. If it stays, torch does not fit this machine.",
        )
    version, cuda, nccl = json.loads(done.stdout.strip().splitlines()[-1])
    return Torch(version, cuda, Path(nccl) if nccl else None)


def guess(system: Torch | None, mode: str) -> tuple[Torch, Cuda | str]:
    """What an environment that is not made yet would have, to print a plan."""
    toolkit = find_toolkit()
    if toolkit is None or (system is None and mode != "on"):
        return system or Torch(f"{TORCH}+cpu", None), "as far as can be told before torch is installed"
    nccl = Path("<site-packages>/nvidia/nccl")
    torch = system or Torch(f"{TORCH}+cu{toolkit[1].replace('.', '')}", toolkit[1], nccl)
    return torch, Cuda(*toolkit, nccl / "include", nccl / "lib" / "libnccl.so.2")


def find_toolkit() -> tuple[Path, str] | None:
    """The CUDA toolkit's folder and version: that of CUDA_HOME, of nvcc on the path, or /usr/local/cuda."""
    on_path = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), str(Path(on_path).resolve().parent.parent) if on_path else None]
    for home in [*homes, "/usr/local/cuda"]:
        nvcc = Path(home, "bin", "nvcc") if home else None
        # nvcc on the path may be a wrapper outside of the toolkit, so a candidate must hold the headers too.
        if home and nvcc and nvcc.exists() and Path(home, "include", "cuda_runtime.h").exists():
            text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
            match = re.search(r"release (\d+\.\d+)", text)
            if match:
                return Path(home), match[1]
    return None


def choose_cuda(torch: Torch, mode: str) -> Cuda | str:
    """Decides between a build with NCCL and one for CPUs.

    Args:
        torch: the torch in the environment.
        mode: `auto`, `on` or `off`, as HVD_HETERO_CUDA says.

    Returns:
        What the build needs, or the reason why it is for CPUs.

    Raises:
        StepFailed: mode is `on` and it cannot be done.
    """
    if mode == "off":
        return "HVD_HETERO_CUDA=off"
    toolkit = find_toolkit()
    include, library = _find_nccl(torch, toolkit[0] if toolkit else None)
    if torch.cuda is None:
        problem = f"torch {torch.version} is a CPU build"
        remedy = "name an index of CUDA wheels in HVD_HETERO_TORCH_INDEX and remove the environment's folder"
    elif toolkit is None:
        problem = "no CUDA toolkit was found"
        remedy = f"install CUDA {torch.cuda} with nvcc and name its folder in CUDA_HOME"
    elif toolkit[1].split(".")[0] != torch.cuda.split(".")[0]:
        problem = f"wrong CUDA: torch {torch.version} is for {torch.cuda}, but {toolkit[0]} is {toolkit[1]}"
        remedy = f"name a CUDA {torch.cuda} toolkit in CUDA_HOME, or use a torch built for {toolkit[1]}"
    elif include is None or library is None:
        problem = "NCCL's header and library were not found"
        remedy = f"pip install nvidia-nccl-cu{torch.cuda.split('.')[0]}, or install NCCL into {toolkit[0]}"
    else:
        return Cuda(toolkit[0], toolkit[1], include, library)
    if mode == "on":
        raise StepFailed("check CUDA", problem, remedy + "; or build for CPUs with HVD_HETERO_CUDA=off.")
    return problem


def _find_nccl(torch: Torch, toolkit: Path | None) -> tuple[Path | None, Path | None]:
    """NCCL's header folder and library; first those that came with torch, so that both use the same one."""
    roots = [root for root in (torch.nccl, toolkit, Path("/usr")) if root is not None]
    headers = [root / "include" for root in roots if (root / "include" / "nccl.h").exists()]
    places = ("lib", "lib64", "lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu")
    folders = [root / place for root in roots for place in places]
    libraries = [file for folder in folders for file in sorted(folder.glob("libnccl.so*"))]
    return (headers[0] if headers else None), (libraries[0] if libraries else None)
