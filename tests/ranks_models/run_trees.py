"""Both ranks of a job run this: ``run_trees.py FOLDER`` takes the trees of ``FOLDER/trees.json`` through a life.

They are broadcast, changed by each rank in its own way, averaged twice, put into a checkpoint and taken out again. It
writes ``FOLDER/rank{N}.json``: what was not as it should be.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from trees import build, change

from hvd_hetero.checkpoint import ShardInfo, Store
from hvd_hetero.cluster.device_classes import assign
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.comm.averaging import average, average_untrained
from hvd_hetero.comm.communicator import Comm
from hvd_hetero.comm.flat_params import FlatState
from hvd_hetero.comm.kv_store import job_env
from hvd_hetero.config.load import device_classes
from hvd_hetero.config.schema import AggregationConfig

WEIGHTS = (0.75, 0.25)


def bits(module: torch.nn.Module) -> dict[str, Any]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {
        name: (str(t.dtype), list(t.shape), bytes(t.detach().contiguous().reshape(-1).view(torch.uint8).tolist()).hex())
        for name, t in named
    }


def life(spec: dict[str, Any], number: int, comm: Comm, folder: Path) -> list[str]:
    wrong: list[str] = []

    def check(what: str, is_so: bool, *more: Any) -> None:
        if not is_so:
            wrong.append(f"{what} {more}")

    module = build(spec, seed=100 * comm.rank)
    state = FlatState(module)
    comm.broadcast_state(state)
    start = bits(module)
    check("broadcast: as rank 0 made it", start == bits(build(spec, seed=0)))
    for turn in range(2):
        before = bits(module)
        change(module, seed=10 * turn + comm.rank + 1)
        changed = bits(module)
        trained = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        average(comm, state, WEIGHTS[comm.rank])
        average_untrained(comm, state, WEIGHTS[comm.rank], only_new=True)
        after = bits(module)
        own = json.dumps([before, changed, after])
        told = [json.loads(text) for text in comm.gather_text(own, f"told.{number}.{turn}")]
        for name in after:
            check("average: ranks agree", told[0][2][name] == told[1][2][name], name)
            is_trained = name in trained or any(p is q for n, p in module.named_parameters(remove_duplicate=False)
                                                if n == name for q in module.parameters() if q.requires_grad)
            if not is_trained and all(each[0][name] == each[1][name] for each in told):
                check("average: what did not change is as it was", after[name] == before[name], name)
        for name, own in trained.items():
            total = own * WEIGHTS[comm.rank]
            pair = torch.view_as_real(total) if total.is_complex() else total
            both = [pair.double().contiguous()]
            comm.sum_(both[0], f"sum.{number}.{turn}.{name}")
            mine = module.get_parameter(name).detach()
            mine = torch.view_as_real(mine) if mine.is_complex() else mine
            tolerance = 4 * torch.finfo(mine.dtype).eps
            close = torch.allclose(mine.double(), both[0], rtol=tolerance, atol=tolerance)
            check("average: is the weighted sum", close, name)
    saved = state.state_dict()
    store = Store(folder)
    infos = [json.loads(text) for text in comm.gather_text(
        store.write_shard(number + 1, comm.rank, saved).to_json(), f"infos.{number}")]
    if comm.rank == 0:
        store.commit(number + 1, [ShardInfo.from_json(json.dumps(info)) for info in infos], epochs=0, made_with={})
    comm.barrier(f"committed.{number}")
    fresh = build(spec, seed=7777)
    again = FlatState(fresh)
    again.load_state_dict(Store(folder).at(number + 1).load(comm.rank))
    check("checkpoint: restored bit by bit", bits(fresh) == bits(module))
    return wrong


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    env = job_env()
    facts = [RankFacts(rank, "localhost", rank, (), "cpu", (0,)) for rank in range(env.size)]
    cluster = assign(device_classes({"fast": {"ranks": [0]}, "slow": {"ranks": [1]}}), facts)
    comm = Comm(cluster, env.rank, AggregationConfig())
    trees = json.loads((folder / "trees.json").read_text())
    wrong = [found for i, spec in enumerate(trees) for found in [life(spec, i, comm, folder)]]
    (folder / f"rank{env.rank}.json").write_text(json.dumps(wrong))
    comm.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
