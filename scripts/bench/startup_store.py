"""horovodrun as launch runs it, which counts what ranks ask of its key-value store, for scripts/bench/startup: FOLDER
ARGUMENT...

Writes ``FOLDER/store.json``: by scope the requests, and the kilobytes of what was put and got. Names of Gloo's scopes
are shortened to ``gloo``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

from horovod.runner.http.http_server import KVStoreHandler

from hvd_hetero.comm import horovodrun

OWN = "hvd_hetero"


def main(folder: Path) -> None:
    counts: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    lock = threading.Lock()

    def counted(call: Any, bytes_of: Any) -> Any:
        def handle(self: Any) -> None:
            _, scope, key = (self.path.split("/") + ["", ""])[:3]
            call(self)
            what = f"{scope} {key.partition('.')[0]}" if scope == OWN else "gloo"
            with lock:
                counts[what][0] += 1
                counts[what][1] += bytes_of(self, scope, key) / 1e3

        return handle

    def got(self: Any, scope: str, key: str) -> int:
        return len(self._get_value(scope, key) or b"")

    KVStoreHandler.do_GET = counted(KVStoreHandler.do_GET, got)
    KVStoreHandler.do_PUT = counted(KVStoreHandler.do_PUT, lambda self, *_: int(self.headers["Content-Length"]))
    sys.argv[1:1] = [str(os.dup(sys.stderr.fileno())), "ssh", "0"]  # where ranks' output goes; the others are not used
    try:
        horovodrun.main()
    finally:
        (folder / "store.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv.pop(1)))
