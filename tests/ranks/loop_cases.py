"""Loops of a program on two ranks, one after another; each rank tells in RANK.json what it has seen."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

import hvd_hetero

FOLDER = Path(sys.argv[1])
X = torch.randn(240, 6, generator=torch.Generator().manual_seed(1))
Y = (X.sum(1) > 0).long()
CLASSES = {"fast": {"ranks": [0]}, "slow": {"ranks": [1], "slowdown": 3.0}}
COMMON: dict[str, Any] = {
    "cluster.classes": CLASSES, "train.tau": {"fast": 6, "slow": 2}, "train.batch_size": 4, "train.epochs": 3,
    "train.loss_args": {}, "checkpoint.every_sec": None,
}  # fmt: skip
RICH = {"aggregation.outer_lr": 0.9, "aggregation.outer_momentum": 0.5, "aggregation.outer_nesterov": True,
        "aggregation.optimizer_state": "average", "train.scheduler": "cosine", "train.warmup_rounds": 3}


def model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, 0.02)


def step(loop: hvd_hetero.Loop, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loop.optimizer.zero_grad()
    losses = nn.functional.cross_entropy(loop.model(x), y, reduction="none")
    losses.mean().backward()
    loop.optimizer.step()
    return losses


def weights(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().double().reshape(-1) for p in model.state_dict().values()]).tolist()


def trained(loop: hvd_hetero.Loop) -> list[float]:
    with loop:
        for round in loop:
            for x, y in round:
                round.losses(step(loop, x, y))
        return weights(loop.model)


def as_the_trainer_does(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The same run by ``train`` and by a loop."""
    folder = FOLDER / name
    hvd_hetero.train(None, COMMON | settings | {"run.dir": str(folder)}, model=model(), train_data=(X, Y),
                     test_data=(X, Y), optimizer=adam)
    own = FOLDER / f"{name}-loop"
    loop = hvd_hetero.Loop(model(), (X, Y), COMMON | settings | {"run.dir": str(own)}, optimizer=adam)
    return {"weights": trained(loop)}


def measured() -> dict[str, Any]:
    """tau is derived from the program's steps, which are put back."""
    counter = nn.BatchNorm1d(6)  # something of the program's that changes, and is kept
    with hvd_hetero.Loop(model(), (X, Y), COMMON | {"train.tau": 9, "profile.seconds": 0.3}, optimizer=adam) as loop:
        loop.keep(counter=counter)
        before, rounds, first = weights(loop.model), 0, None
        for round in loop:
            rounds += round.measures
            if not round.measures and first is None:
                first = {"weights": weights(loop.model), "state": len(loop.optimizer.state), "number": round.number,
                         "counter": int(counter.num_batches_tracked)}
            for x, y in round:
                counter(x)
                round.losses(step(loop, x, y))
        return {"before": before, "first": first, "measured": rounds, "taus": [c.tau for c in loop.plan.classes]}


def chosen() -> dict[str, Any]:
    """The length of rounds is chosen by the program's steps and an average, all put back; nobody knows it before."""
    settings = COMMON | {"train.tau": "auto", "train.tau_overhead": 1.0, "profile.seconds": 0.3, "train.epochs": 1}
    with hvd_hetero.Loop(model(), (X, Y), settings, optimizer=adam) as loop:
        output, before, first = list[str](), weights(loop.model), None
        for round in loop:
            try:
                taus = [c.tau for c in loop.plan.classes]
                first = first or {"measures": round.measures, "taus": taus, "weights": weights(loop.model)}
            except RuntimeError as error:
                output.append(f"{round.measures}: {error}")
            for x, y in round:
                round.losses(step(loop, x, y))
        average_sec = loop._trainer.algorithm.policy.average_sec
        return {"said": output, "before": before, "first": first, "average_sec": average_sec}


def resumed() -> dict[str, Any]:
    """A loop that is left in its second epoch and goes on elsewhere, from states that the program has kept."""
    settings = COMMON | RICH | {"checkpoint.every_rounds": 4}
    whole = hvd_hetero.Loop(model(), (X, Y), settings, optimizer=adam)
    file = FOLDER / f"state{whole.rank}.pt"
    rounds = []
    with whole as loop:
        loop.keep(note=(note := nn.BatchNorm1d(6)))
        for round in loop:
            rounds.append(round.number)
            if loop.save_due() and round.number < 15:
                torch.save(loop.state_dict(), file)
            for x, y in round:
                note(x)
                round.losses(step(loop, x, y))
        last_due, end = loop.save_due(), weights(loop.model) + weights(note)
    again, note = hvd_hetero.Loop(model(), (X, Y), settings, optimizer=adam), nn.BatchNorm1d(6)
    again.keep(note=note)
    again.load_state_dict(torch.load(file, weights_only=True))
    numbers = []
    with again as loop:
        for round in loop:
            numbers.append(round.number)
            for x, y in round:
                note(x)
                round.losses(step(loop, x, y))
        return {"rounds": rounds, "end": end, "numbers": numbers, "again": weights(loop.model) + weights(note),
                "last_due": last_due}


class Numbers(IterableDataset[Any]):
    """Samples (k, 0) in a random order that has to be the same on all ranks."""

    def __iter__(self) -> Iterator[Any]:
        for number in torch.randperm(100).tolist():
            yield torch.tensor([number + 1e-3 * torch.rand(()).item()] + [0.0] * 5), 0


class Backwards(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(len(X))[::-1])

    def __len__(self) -> int:
        return len(X)


def streamed() -> dict[str, Any]:
    """Samples that each rank has got of a stream, in two runs of which the second is resumed; batches of a loader."""
    settings = COMMON | {"checkpoint.every_rounds": 2, "train.epochs": 2, "train.tau": {"fast": 3, "slow": 1}}
    seen: list[list[int]] = []
    state = None
    with hvd_hetero.Loop(model(), Numbers(), settings, samples=96) as loop:
        for round in loop:
            if loop.save_due() and round.number == 9:
                state = loop.state_dict()
            seen.append([])
            for x, y in round:
                seen[-1] += [int(number) for number in x[:, 0]]
                step(loop, x, y)
    again: list[list[int]] = []
    loop = hvd_hetero.Loop(model(), Numbers(), settings, samples=96)
    loop.load_state_dict(state or {})
    with loop:
        for round in loop:
            again.append([])
            for x, y in round:
                again[-1] += [int(number) for number in x[:, 0]]
                step(loop, x, y)
    batches = []
    numbered = TensorDataset(torch.arange(240.0).expand(6, -1).T.clone(), Y)
    loader = DataLoader(numbered, batch_size=4, sampler=Backwards())
    with hvd_hetero.Loop(model(), loader, {**settings, "train.epochs": 1}) as loop:
        for round in loop:
            for x, y in round:
                batches.append([int(number) for number in x[:, 0]])
                round.losses(step(loop, x, y))
    shuffled = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
    dealt = {key: value for key, value in settings.items() if key != "train.batch_size"}
    with hvd_hetero.Loop(model(), shuffled, {**dealt, "train.epochs": 1}) as loop:
        for round in loop:
            for x, y in round:
                round.losses(step(loop, x, y))
        sizes = [c.batch_size for c in loop.plan.classes]
    return {"seen": seen, "again": again, "batches": batches, "sizes": sizes}


def reshaped() -> list[dict[str, Any]]:
    """A loop over a stream that is left in its first epoch, and goes on with its second rank as one of a new class."""
    parts = []
    for name, stop in (("slow", 5), ("late", 0)):
        settings = COMMON | {
            "cluster.classes": {"fast": {"ranks": [0]}, name: {"ranks": [1]}}, "train.tau": {"fast": 3, name: 1},
            "train.epochs": 1, "checkpoint.every_rounds": 2, "run.dir": str(FOLDER / "reshaped"),
            "run.resume": "reshape",
        }  # fmt: skip
        seen, kept, note = list[int](), None, nn.BatchNorm1d(6)
        with hvd_hetero.Loop(model(), Numbers(), settings, samples=96, optimizer=adam) as loop:
            loop.keep(note=note)
            for round in loop:
                if kept is None:
                    steps = {int(state["step"]) for state in loop.optimizer.state.values()}
                    kept = {"note": int(note.num_batches_tracked), "optimizer": sorted(steps)}
                if round.number == stop:
                    break
                for x, y in round:
                    note(x)
                    seen += [int(number) for number in x[:, 0]]
                    step(loop, x, y)
        parts.append({"seen": seen, "kept": kept})
    return parts


def left_early() -> list[float]:
    """A loop that all ranks leave in the middle of a round."""
    with hvd_hetero.Loop(model(), (X, Y), COMMON) as loop:
        for round in loop:
            if round.number == 3:
                break
            for x, y in round:
                round.losses(step(loop, x, y))
        return weights(loop.model)


def main() -> None:
    output: dict[str, Any] = {"plain": as_the_trainer_does("plain", {}), "rich": as_the_trainer_does("rich", RICH)}
    output["delayed"] = as_the_trainer_does("delayed", {"aggregation.delayed": True, "run.seed": 3})
    output["solo"] = trained(hvd_hetero.Loop(model(), (X, Y), COMMON | {"aggregation.mode": "solo"}, optimizer=adam))
    output |= {"measured": measured(), "chosen": chosen(), "resumed": resumed(), "streamed": streamed()}
    output["reshaped"] = reshaped()
    output["left"] = left_early()
    (FOLDER / f"{os.environ['HOROVOD_RANK']}.json").write_text(json.dumps(output))


if __name__ == "__main__":
    main()
