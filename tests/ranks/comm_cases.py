"""Every rank of a job runs this: it goes through a table of cases with the real collectives and writes what it found.

``comm_cases.py FOLDER HOSTS`` writes ``FOLDER/rank{N}.json``. One job carries many cases, since starting one takes
longer than all of them: all process sets are made by the first ``hvd.init``, and each case's ``Comm`` finds its own.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

LAYOUTS: dict[int, list[list[list[int]]]] = {
    1: [[[0]]],
    2: [[[0, 1]], [[0], [1]], [[1], [0]]],
    3: [[[0], [1, 2]], [[0, 2], [1]], [[2], [0], [1]], [[0, 1, 2]]],
    4: [[[0], [1, 2, 3]], [[1, 3], [0, 2]], [[2], [0, 1], [3]], [[0, 1, 2, 3]], [[0, 3], [1], [2]]],
}
"""By number of ranks: the ranks of each class, in the order of the configuration; leaders need not be in order."""
DTYPES = ("float32", "float64")
PATHS = {"flat": {}, "hierarchical": {}, "hierarchical, cut": {"chunk_mb": 0.1}}
TAUS = (32, 5, 1)
SIZES = (1, 7, 100_003)


def cases(size: int) -> list[str]:
    """The keys of all aggregation cases of a job with so many ranks."""
    layouts = LAYOUTS[size]
    return [f"{layout}/{path}/{dtype}" for layout in layouts for path in PATHS for dtype in DTYPES]


def main(folder: Path, hosts: str) -> None:
    import torch
    from torch import nn

    from hvd_hetero.cluster.device_classes import Cluster, DeviceClass
    from hvd_hetero.cluster.hardware import RankFacts
    from hvd_hetero.cluster.hosts import parse_hosts
    from hvd_hetero.comm.averaging import average
    from hvd_hetero.comm.communicator import Comm, hvd
    from hvd_hetero.comm.flat_params import FlatState
    from hvd_hetero.comm.kv_store import job_env
    from hvd_hetero.config.schema import AggregationConfig

    torch.set_num_threads(1)
    env = job_env()
    places = [(host, slot) for host, slots in parse_hosts(hosts) for slot in range(slots)]
    facts = tuple(RankFacts(i, host, slot, (), "cpu", (0,)) for i, (host, slot) in enumerate(places))
    layouts = LAYOUTS[env.size]
    groups = {tuple(sorted(ranks)) for layout in layouts for ranks in (*layout, [c[0] for c in layout])}
    hvd.init(process_sets=[hvd.ProcessSet(list(ranks)) for ranks in sorted(groups) if 1 < len(ranks) < env.size])

    def cluster(layout: list[list[int]]) -> Cluster:
        return Cluster(tuple(DeviceClass(f"c{i}", "cpu", tuple(r)) for i, r in enumerate(layout)), facts)

    def weights(layout: list[list[int]]) -> list[float]:
        """w of every rank, by steps."""
        tau = {rank: TAUS[i] for i, ranks in enumerate(layout) for rank in ranks}
        return [tau[rank] / sum(tau.values()) for rank in range(env.size)]

    def values(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """What a rank holds before the aggregation; every rank can make every other's."""
        generator = torch.Generator().manual_seed(1000 * rank + count)
        return torch.randn(count, dtype=dtype, generator=generator) * 10 ** (rank - 1)

    def formula(layout: list[list[int]], count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """sum_i w_i x_i in double precision, and sum_i w_i |x_i|, by which its error is judged."""
        parts = [values(r, count, dtype).double() for r in range(env.size)]
        pairs = list(zip(weights(layout), parts, strict=True))
        return sum(w * x for w, x in pairs), sum(w * x.abs() for w, x in pairs)  # type: ignore[return-value]

    def error_of(result: torch.Tensor, layout: list[list[int]]) -> float:
        exact, scale = formula(layout, result.numel(), result.dtype)
        return float(((result.double() - exact).abs() / scale).max())

    def vectors(comm: Comm, layout: list[list[int]], dtype: torch.dtype) -> dict[str, Any]:
        """Vectors of several lengths, each twice under one name, as in round after round."""
        errors, digest = [], hashlib.sha256()
        for count in SIZES:
            for _ in range(2):
                vector = values(env.rank, count, dtype)
                comm.weighted_sum_(vector, weights(layout)[env.rank], f"vector.{dtype}.{count}")
                errors.append(error_of(vector, layout))
                digest.update(vector.numpy().tobytes())
        return {"error": max(errors), "digest": digest.hexdigest(), "path": comm.path}

    def model(comm: Comm, layout: list[list[int]], dtype: torch.dtype) -> dict[str, Any]:
        """Parameters, BatchNorm's buffers and an integer buffer of a model that is partly frozen."""
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(dtype)
        frozen = net[2].bias.requires_grad_(False).clone()
        net.register_buffer("counts", torch.zeros(2, 2, dtype=torch.int32))
        state = FlatState(net, policies={"counts": "max"})
        comm.broadcast_state(state)
        net.counts = torch.tensor([[10 + env.rank, 10 - env.rank], [0, -1]], dtype=torch.int32)
        net[1].num_batches_tracked.fill_(5 + env.rank)
        norm = net[1]
        tensors = (*net[0].parameters(), *norm.parameters(), net[2].weight, norm.running_mean, norm.running_var)
        counts = [t.numel() for t in tensors]
        for tensor, part in zip(tensors, values(env.rank, sum(counts), dtype).split(counts), strict=True):
            tensor.data.copy_(part.view_as(tensor))
        average(comm, state, weights(layout)[env.rank])
        digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in net.state_dict().values())).hexdigest()
        spread = torch.cat([t.detach().reshape(-1) for t in tensors])
        return {
            "model_error": error_of(spread, layout),
            "model_digest": digest,
            "tracked": int(norm.num_batches_tracked),
            "counts": net.get_buffer("counts").tolist(),
            "frozen_moved": not torch.equal(net[2].bias, frozen),
        }

    def everything_else(comm: Comm) -> dict[str, Any]:
        size, rank = env.size, env.rank
        found: dict[str, Any] = {}
        found["broadcast"] = [
            comm.broadcast(torch.tensor([rank + 1, 7], dtype=dtype), f"b.{dtype}", root=size - 1).tolist()
            for dtype in (torch.int32, torch.int64, torch.float32, torch.float64)
        ]
        found["gather_even"] = [t.tolist() for t in comm.gather(torch.tensor([rank, -rank]), "g.even")]
        sizes = [(2 * r) % 3 for r in range(size)]  # 0, 2, 1, 0
        uneven = comm.gather(torch.full((sizes[rank],), float(rank)), "g.uneven", sizes)
        found["gather_uneven"] = [t.tolist() for t in uneven]
        found["sum"] = comm.sum([1.0, rank, 0.1], "s")
        found["max"] = comm.max([rank, -rank, 0.1], "m")
        comm.agree("0123456789abcdef", "agree.same", "plan")
        try:
            comm.agree("ffffffffffffff00" if rank == size - 1 else "0123456789abcdef", "agree.other", "plan")
            found["disagreement"] = None
        except RuntimeError as error:
            found["disagreement"] = str(error)
        torch.manual_seed(rank)
        net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        net[0].bias.requires_grad_(False)
        net[0].bias.data.fill_(float(rank))
        net[1].num_batches_tracked.fill_(rank + 3)
        comm.broadcast_state(FlatState(net))
        found["start"] = [t.tolist() for t in net.state_dict().values()]
        comm.barrier("b")
        return found

    found: dict[str, Any] = {"rank": env.rank, "cases": {}}
    for layout in layouts:
        for path in PATHS:
            spec = AggregationConfig(path=path.split(",")[0], **PATHS[path])
            comm = Comm(cluster(layout), env.rank, spec)
            for dtype in DTYPES:
                kind = getattr(torch, dtype)
                found["cases"][f"{layout}/{path}/{dtype}"] = vectors(comm, layout, kind) | model(comm, layout, kind)
    found["auto_path"] = Comm(cluster(layouts[0]), env.rank).path
    found |= everything_else(comm)
    comm.close()
    found["closed"] = not hvd.is_initialized()
    (folder / f"rank{env.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
