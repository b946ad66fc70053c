"""``hvd-hetero`` on hosts that have drifted apart: on rank 1, what ``UNLIKE`` names is another one.

``package``: a copy of the package with a comment more; ``module``: a module of the user's own; the rest are settings.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":
    rank, unlike, folder = int(os.environ["HOROVOD_RANK"]), sys.argv[1], Path(sys.argv[2]) / os.environ["HOROVOD_RANK"]
    words = sys.argv[3:]
    folder.mkdir()
    if unlike == "package":
        import hvd_hetero

        shutil.copytree(Path(hvd_hetero.__file__).parent, folder / "hvd_hetero")
        for name in [name for name in sys.modules if name.partition(".")[0] == "hvd_hetero"]:
            del sys.modules[name]
        if rank == 1:
            with (folder / "hvd_hetero" / "plan.py").open("a") as file:
                file.write("# of yesterday\n")
    elif unlike == "module":
        shutil.copy(Path(__file__).with_name("own_parts.py"), folder / "mine.py")
        if rank == 1:
            (folder / "mine.py").write_text((folder / "mine.py").read_text().replace("Dropout(0.1)", "Dropout(0.2)"))
    elif rank == 1:
        words += [unlike]
    sys.path.insert(0, str(folder))
    from hvd_hetero.cli import main

    sys.exit(main(words))
