"""``hvd-hetero`` whose ranks write down where the channel of partial collectives listens, and join it seconds later."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from hvd_hetero.cli import main
from hvd_hetero.comm.partial import control_channel


class LateLink(control_channel.ControlClient):
    def __init__(self, address: tuple[str, int], *given: Any) -> None:
        Path(os.environ["HVD_HETERO_TEST_ADDRESS"]).write_text(f"{address[0]} {address[1]}\n")
        time.sleep(3)
        super().__init__(address, *given)


if __name__ == "__main__":
    control_channel.ControlClient = LateLink  # type: ignore[misc]
    sys.exit(main())
