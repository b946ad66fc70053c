"""horovodrun for scripts/bench/startup, which counts what ranks ask of its key-value store: FOLDER ARGUMENT...

Writes ``FOLDER/store.json``: by scope the requests, and the kilobytes of what was put and got. Names of Gloo's scopes
are shortened to ``gloo``.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

from horovod.runner import launch
from horovod.runner.http.http_server import KVStoreHandler

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
    try:
        launch.run_commandline()
    finally:
        (folder / "store.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv.pop(1)))
