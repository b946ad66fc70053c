"""Every rank runs this: ``peers_ranks.py FOLDER KIND TARGET EPOCHS PERIOD CONFIG...`` trains as one of :data:`PEERS`.

Model, data, loss, optimizer, seed and batch are those of the configuration, as in a run of the package; each rank
takes the same number of samples, as these tools mean it. The clock stops several times in an epoch, after a barrier,
and goes on when rank 0 has evaluated. Rank 0 writes ``FOLDER/KIND.json``: seconds and accuracy at each of these. With
it comes :func:`data`, the part of the data set on which everybody trains.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hvd_hetero import algorithms
from hvd_hetero.config.load import load
from hvd_hetero.data import TensorSource
from hvd_hetero.data import load as load_data
from hvd_hetero.worker import components

EVALUATED_BATCH = 256
EVALUATIONS = 4
"""In an epoch: theirs take longer than ours, and are not to lose by being looked at more seldom."""


def data(name: str, root: str, train: int, test: int) -> tuple[TensorSource, TensorSource]:
    """The first samples of a data set."""
    whole = load_data(name, root, None, {})
    return tuple(TensorSource(s.inputs[:count], s.targets[:count], s.transform)  # type: ignore[return-value]
                 for s, count in ((whole.train, train), (whole.test, test)))


Step = Callable[[Any, torch.Tensor], None]
Made = tuple[Step, Callable[[], None], contextlib.AbstractContextManager[Any]]
"""What a step does, what brings all ranks together, and the context of all steps."""


def gloo(folder: Path) -> None:
    """torch.distributed among horovodrun's ranks, which share a file system."""
    rank, size = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), size), rank=rank, world_size=size)


def ddp(parts: components.Components, period: int, folder: Path) -> Made:
    """torch's DistributedDataParallel."""
    gloo(folder)
    model = torch.nn.parallel.DistributedDataParallel(parts.model)
    return plain_step(parts, model, parts.optimizer(list(model.parameters()))), dist.barrier, contextlib.nullcontext()


def post_local_sgd(parts: components.Components, period: int, folder: Path) -> Made:
    """torch's PostLocalSGDOptimizer, from the first step on; models are averaged, no gradients."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    gloo(folder)
    for tensor in parts.model.state_dict().values():
        dist.broadcast(tensor, 0)
    inner = parts.optimizer(list(parts.model.parameters()))
    optimizer = PostLocalSGDOptimizer(inner, PeriodicModelAverager(period=period))
    return plain_step(parts, parts.model, optimizer), dist.barrier, contextlib.nullcontext()


def accelerate_local_sgd(parts: components.Components, period: int, folder: Path) -> Made:
    """Hugging Face Accelerate's LocalSGD."""
    rank, size = os.environ["HOROVOD_RANK"], os.environ["HOROVOD_SIZE"]
    os.environ |= {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": "0", "MASTER_ADDR": "unused", "MASTER_PORT": "1",
                   "ACCELERATE_USE_CPU": "true"}
    gloo(folder)
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(parts.model, parts.optimizer(list(parts.model.parameters())))
    assert accelerator.num_processes == int(size), accelerator.state
    local = LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=period, enabled=True)
    inner = plain_step(parts, model, optimizer, accelerator.backward)

    def step(inputs: Any, targets: torch.Tensor) -> None:
        inner(inputs, targets)
        local.step()

    return step, dist.barrier, local


def horovod(parts: components.Components, period: int, folder: Path) -> Made:
    """Horovod's own DistributedOptimizer."""
    import horovod.torch as hvd

    hvd.init()
    hvd.broadcast_parameters(parts.model.state_dict(), root_rank=0)
    inner = parts.optimizer(list(parts.model.parameters()))
    optimizer = hvd.DistributedOptimizer(inner, named_parameters=parts.model.named_parameters())
    return plain_step(parts, parts.model, optimizer), hvd.barrier, contextlib.nullcontext()


PEERS = {"ddp": ddp, "post_local_sgd": post_local_sgd, "accelerate_local_sgd": accelerate_local_sgd,
         "horovod": horovod}


def plain_step(parts: components.Components, model: torch.nn.Module, optimizer: Any,
               backward: Callable[[torch.Tensor], None] = torch.Tensor.backward) -> Step:
    def step(inputs: Any, targets: torch.Tensor) -> None:
        optimizer.zero_grad()
        returned = parts.loss(model(inputs), targets)
        backward((returned[0] if isinstance(returned, tuple) else returned).mean())
        optimizer.step()

    return step


def rows_of_epoch(samples: int, batch: int, number: int, seed: int) -> Iterator[np.ndarray]:
    """This rank's half of a permutation, or its third, ... ``[steps, B]``."""
    rank, size = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])
    steps = samples // (batch * size)
    order = np.random.default_rng([seed, number]).permutation(samples)[: steps * size * batch]
    return order.reshape(size, steps, batch)[rank]


@torch.no_grad()
def accuracy(parts: components.Components) -> float:
    """Of rank 0's model on the test set."""
    parts.model.eval()
    test = parts.dataset.test
    right = 0
    for part in np.array_split(np.arange(len(test)), -(-len(test) // EVALUATED_BATCH)):
        for inputs, targets in test.batches(part[None], torch.Generator()):
            right += int((parts.model(inputs).argmax(1) == targets).sum())
    parts.model.train()
    return right / len(test)


def main(folder: Path, kind: str, target: float, epochs: int, period: int, *config: str) -> None:
    import horovod.torch  # noqa: F401  (for all of them: it is by this that the lab knows a rank)

    torch.set_num_threads(1)
    loaded = load([w for w in config if "=" not in w], [w for w in config if "=" in w], algorithms.method)
    parts = components.build(loaded)
    rank = int(os.environ["HOROVOD_RANK"])
    torch.manual_seed(loaded.run.seed * 1000003 + rank)
    step, together, context = PEERS[kind](parts, period, folder)
    found: list[dict[str, float]] = []
    seconds, done, reached = 0.0, 0, folder / "reached"
    together()
    (folder / "begun").touch()
    with context:
        while done < epochs and not reached.exists():
            rows = rows_of_epoch(len(parts.dataset.train), loaded.train.batch_size, done, loaded.run.seed)
            done += 1
            for part in np.array_split(rows, EVALUATIONS):
                together()
                start = time.perf_counter()
                for inputs, targets in parts.dataset.train.batches(part, torch.Generator()):
                    step(inputs, targets)
                together()
                seconds += time.perf_counter() - start
                if rank == 0:
                    found.append({"seconds": seconds, "accuracy": accuracy(parts)})
                    print(f"{kind}: {found[-1]}", flush=True)
                    if found[-1]["accuracy"] >= target:
                        reached.touch()
                together()  # everybody sees the same
    if rank == 0:
        (folder / f"{kind}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), *sys.argv[6:])
