"""Every rank of a job runs this: the example programs that are named, one after another, in the working directory."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"

for words in sys.argv[1:]:
    name, *arguments = words.split(",")
    sys.argv = [name, *arguments]
    print(f"{name} begins", flush=True)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
