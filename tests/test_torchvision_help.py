"""torchvision beside a torch that it was not built for: it can be imported, and nothing else is done to it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

META = """
import torch, torchvision.count
torchvision.count.imports += 1
torch.library.register_fake("torchvision::nms")(lambda dets, scores, threshold: dets)
"""
SAYS = """
import sys, hvd_hetero
assert "torch" not in sys.modules and "torchvision" not in sys.modules
{first}
import torchvision
loader = torchvision.__loader__
assert type(loader).__name__ == "SourceFileLoader" and torchvision.__spec__.loader is loader
{then}
"""


def says(folder: Path | None, first: str = "", then: str = "") -> str:
    path = [str(Path(__file__).parent.parent), *([] if folder is None else [str(folder)])]
    code = f"import sys; sys.path[:0] = {path}\n" + SAYS.format(first=first, then=then)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def package(folder: Path, **files: str) -> Path:
    (folder / "torchvision").mkdir()
    for name, text in files.items():
        (folder / "torchvision" / f"{name}.py").write_text(text)
    return folder


def test_it_is_imported_again_with_its_operators(tmp_path: Path) -> None:
    """Wherever the import stands: here in the user's function; and what was half imported is imported anew."""
    files = {"__init__": "import torchvision.meta\nready = True\n", "meta": META, "count": "imports = 0\n"}
    told = says(package(tmp_path, **files), then="print(torchvision.ready, torchvision.count.imports)")
    assert told == "True 1"


def test_another_error_is_its_own(tmp_path: Path) -> None:
    files = {"__init__": "raise RuntimeError('no such thing')\n"}
    assert says(package(tmp_path, **files)) == "RuntimeError: no such thing"


def test_one_that_works_is_left_alone_and_torch_is_not_needed(tmp_path: Path) -> None:
    files = {"__init__": "import torchvision.count\ntorchvision.count.imports += 1\n", "count": "imports = 0\n"}
    told = says(package(tmp_path, **files), then="print(torchvision.count.imports, 'torch' in sys.modules)")
    assert told == "1 False"


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_the_real_one() -> None:
    made = "from torchvision.models import resnet18; print(sum(p.numel() for p in resnet18().parameters()))"
    assert says(None, then=made) == "11689512"
