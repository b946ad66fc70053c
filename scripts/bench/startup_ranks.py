"""One rank of scripts/bench/startup: FOLDER EPOCHS."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch


class Clock:
    """CPU seconds of this process and seconds on the clock, phase by phase, from its birth on."""

    def __init__(self) -> None:
        self._cpu, self._at = 0.0, psutil.Process().create_time()
        self.phases: dict[str, dict[str, float]] = {}

    def end(self, phase: str) -> None:
        cpu, at = time.process_time(), time.time()
        self.phases[phase] = {"cpu": cpu - self._cpu, "sec": at - self._at}
        self._cpu, self._at = cpu, at

    def around(self, owner: Any, name: str, before: str, phase: str = "") -> None:
        """Ends a phase before a call and, where it is given one, another after it; the first time it is called."""
        call = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            if before in self.phases:
                return call(*args, **options)
            self.end(before)
            result = call(*args, **options)
            if phase:
                self.end(phase)
            return result

        setattr(owner, name, timed)


def main(folder: Path, epochs: int) -> None:
    clock = Clock()
    from hvd_hetero.comm import communicator
    from hvd_hetero.telemetry.heartbeat import Heartbeat
    from hvd_hetero.training import api, startup, trainer

    clock.end("Python and imports")
    collectives: defaultdict[str, float] = defaultdict(float)
    waiting, begun = Heartbeat.waiting, {}

    @contextmanager
    def counted(self: Heartbeat, name: str) -> Iterator[None]:
        start = time.thread_time()
        with waiting(self, name):
            yield
        if begun:
            collectives[re.sub(r"\.?\d+", "", name)] += time.thread_time() - start

    Heartbeat.waiting = counted  # type: ignore[method-assign, assignment]
    work = trainer.Trainer._work

    def first(self: Any, epoch: Any) -> Any:
        if not begun:
            clock.end("model to all, plan, samples")
            begun.update(at=time.time(), cpu=time.process_time())
        return work(self, epoch)

    trainer.Trainer._work = first  # type: ignore[method-assign]
    clock.around(startup, "_exchange", "data, model", "facts of all ranks")
    clock.around(communicator.Comm, "__init__", "alike? classes, places", "hvd.init")
    rank, size = api.job_env().rank, api.job_env().size
    half, samples = size // 2, 30 * size
    classes = {"fast": {"ranks": list(range(half))}, "slow": {"ranks": list(range(half, size))}}
    inputs, targets = torch.ones(samples, 8), torch.arange(samples) % 4
    api.train(overrides={
        "cluster.classes": classes, "train.tau": {"fast": 4, "slow": 2}, "train.batch_size": 1, "train.epochs": epochs,
        "run.dir": str(folder / "run"), "run.trace_rounds": 0, "eval.every_epochs": 1000, "cluster.affinity": False,
    }, model=torch.nn.Linear(8, 4), train_data=(inputs, targets), test_data=(inputs[:10], targets[:10]))  # fmt: skip
    summary = folder / "run" / "summary.json"
    found = {
        "phases": clock.phases, "collectives": collectives, "first_step": begun["at"], "first_step_cpu": begun["cpu"],
        "training_cpu": time.process_time() - begun["cpu"], "training_sec": time.time() - begun["at"],
        "rounds": json.loads(summary.read_text())["rounds"],
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
