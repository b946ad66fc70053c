"""Runs that are limited in time, with data for hours: ``limited.py FOLDER``. Rank 0 writes what came of each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hvd_hetero

FOLDER = Path(sys.argv[1])
SAMPLES = 400_000
RUNS: dict[str, dict[str, Any]] = {
    "in step": {"algorithm.name": "sync_sgd"},
    "claimed": {"algorithm.name": "eager_sgd", "algorithm.mode": "solo"},
    "local": {"algorithm.name": "biased_local_sgd", "train.tau": {"fast": 4, "slow": 1}},
    "local, solo": {"algorithm.name": "unbalanced_local_sgd", "train.tau": {"fast": 4, "slow": 1},
                    "aggregation.mode": "solo"},
    "nobody saves": {"algorithm.name": "balanced_local_sgd", "train.tau": 4, "checkpoint.every_sec": None},
}  # fmt: skip


def main() -> None:
    x = torch.arange(8.0).repeat(SAMPLES // 8)[:, None]
    y = (x[:, 0] > 3).long()
    found = {}
    for name, settings in RUNS.items():
        folder = FOLDER / name
        summary = hvd_hetero.train(
            model=nn.Linear(1, 2), train_data=(x, y), test_data=(x[:64], y[:64]),
            overrides={**settings, "run.dir": str(folder), "train.epochs": None, "train.max_train_sec": 2.0,
                       "train.batch_size": 4, "train.scheduler": "cosine", "train.scheduler_args": {"warmup": 0.1},
                       "train.loss_args": {}, "cluster.classes": {"fast": {"ranks": [0]}, "slow": {"ranks": [1]}}},
        )  # fmt: skip
        if summary is not None:
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            found[name] = {"epochs": summary["epochs"], "samples": summary["samples_seen"], "rows": len(rows),
                           "train_sec": summary["train_sec"]}  # fmt: skip
            (FOLDER / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
