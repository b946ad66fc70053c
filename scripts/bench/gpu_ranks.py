"""What each of the three ranks of scripts/bench/gpu does.

``gpu_ranks.py FOLDER OUT DEVICE SECONDS TARGET ROWS CONFIG...``
"""

from __future__ import annotations

import json
import runpy
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from hvd_hetero import algorithms
from hvd_hetero.cluster.device_classes import Cluster, assign
from hvd_hetero.cluster.hardware import RankFacts, local_facts
from hvd_hetero.cluster.placement import place
from hvd_hetero.comm.async_ops import begin, finished
from hvd_hetero.comm.communicator import Comm, hvd
from hvd_hetero.comm.kv_store import JobEnv, exchange, job_env
from hvd_hetero.config.load import device_classes, load
from hvd_hetero.data import read
from hvd_hetero.training import epoch, startup, trainer
from hvd_hetero.training.watchdog import Watchdog
from hvd_hetero.worker import components

PLAIN = runpy.run_path(str(Path(__file__).with_name("plain")))
MEGABYTES = (1.1, 100)
TURNS = 9
ROUNDS = 10
GPU_BOUND = 4096
"""Samples of a batch whose step takes the GPU longer than Python takes to launch it."""
TOP = 12
ROUND = "end of a round"
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
SPEED_ONLY = {"train.epochs": None, "eval.every_epochs": 10**6, "checkpoint.every_sec": None, "profile.reuse": False,
              "cluster.too_slow": "shrink_batch"}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What the rows share. Methods that are given a folder's name are called by all ranks, as is each row."""

    env: JobEnv
    facts: list[RankFacts]
    folder: Path
    device: str
    seconds: float
    target: float
    config: list[str]

    def classes(self, gpus: int, slowdown: float = 1.0) -> dict[str, Any]:
        """``cluster.classes``: the first ranks are on the GPU, of which all but one are slow; the others on the CPU."""
        ranks = {"gpu": [0], "slow": list(range(1, gpus)), "cpu": list(range(gpus, 3))}
        made = {name: {"device": "cpu" if name == "cpu" else self.device, "ranks": own} for name, own in ranks.items()}
        made["slow"]["slowdown"] = slowdown
        return {name: c for name, c in made.items() if c["ranks"]}

    def trained(
        self, name: str, settings: Mapping[str, Any], cluster: Cluster | None = None
    ) -> tuple[trainer.Trainer, dict[str, Any]]:
        """Trains; with a cluster of rank 0 alone, only that calls it. The summary is rank 0's."""
        words = [word for word in self.config if "=" in word]
        files = [word for word in self.config if "=" not in word]
        words += [f"{key}={json.dumps(value)}" for key, value in {"run.trace_rounds": 0, **settings}.items()]
        config = load(files, words, algorithms.method)
        env = self.env if cluster is None else replace(self.env, size=1)
        if cluster is None:
            cluster = assign(device_classes(config.cluster.classes), self.facts, share_gpus=True)
        parts = components.build(config)
        startup.check(config, parts, cluster)
        placement = replace(place(cluster, env.rank, config.cluster.gpu_cores, affinity=False), threads=1)
        made = trainer.Trainer(startup.Job(env, config, parts, cluster, placement, Watchdog(env)), self.folder / name)
        made.prepare()
        summary = made.run()
        made.algorithm.close()
        return made, summary or {}

    def alone(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The summary of the GPU rank's own run, while the others wait."""
        return self.on_rank_0(lambda: self.trained_alone(name, settings)[1]) or {}

    def trained_alone(self, name: str, settings: Mapping[str, Any]) -> tuple[trainer.Trainer, dict[str, Any]]:
        """Trains on rank 0 without the others; only that calls it."""
        classes = {"gpu": {"device": self.device, "ranks": [0]}}
        one = assign(device_classes(classes), self.facts[:1])
        return self.trained(name, {**settings, "cluster.classes": classes}, one)

    def plain(self, *more: str) -> float:
        """Samples per second of the plain loop, while the others wait."""
        return self.on_rank_0(lambda: PLAIN["plain_loop"]([*self.config, *more], self.seconds, self.device)) or 0.0

    def on_rank_0(self, call: Callable[[], Any]) -> Any:
        """What a call gives there, None on the others, who wait; if it fails, all of them raise."""
        result = error = None
        if self.env.rank == 0:
            try:
                result = call()
            except Exception as problem:
                error = problem
        if agreed("rank_0", float(error is not None)):
            raise error or RuntimeError("rank 0 has failed")
        return result

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


def agreed(name: str, value: float = 0.0) -> float:
    """The largest of all ranks' values, when all have come."""
    return float(finished(begin(hvd.allreduce_async, torch.tensor(value), op=hvd.Max, name=f"bench.{name}")))


def steps_of(summary: Mapping[str, Any]) -> int:
    return int(summary["classes"][0]["steps"])


def rate(summary: Mapping[str, Any], what: str = "samples") -> float:
    """Samples or steps per second of the GPU rank."""
    return float(summary["classes"][0][what] / summary["train_sec"]) if summary else 0.0


# ---- rows -----------------------------------------------------------------------------------------------------------


def speed(bench: Bench) -> dict[str, Any]:
    limits = {**SPEED_ONLY, "train.max_train_sec": bench.seconds}
    plain, alone = bench.plain(), bench.alone("alone", limits)
    beside = bench.trained("beside", {**limits, "train.max_train_sec": 2 * bench.seconds,
                                      "cluster.classes": bench.classes(1)})[1]  # fmt: skip
    if not beside:
        return {}
    gpu, cpu = beside["classes"]
    return {
        "plain_samples_per_sec": plain, "alone_samples_per_sec": rate(alone), "over_plain": rate(alone) / plain,
        "alone_time_sec": alone["classes"][0]["time_sec"], "alone_step_ms": 1e3 * alone["train_sec"] / steps_of(alone),
        "beside_over_alone": rate(beside, "steps") / rate(alone, "steps"), "tau": [gpu["tau"], cpu["tau"]],
        "blocked_fraction": gpu["blocked_fraction"], "step_ms": [1e3 * gpu["step_sec"], 1e3 * cpu["step_sec"]],
        "comm_fraction": gpu["time_sec"]["comm"] / sum(gpu["time_sec"].values()),
        "average_ms": 1e3 * gpu["time_sec"]["comm"] / beside["rounds"], "peak_gpu_bytes": gpu["peak_gpu_bytes"],
    }  # fmt: skip


def graphs(bench: Bench) -> dict[str, Any]:
    """One setting after another is added, so that it is seen which of them does what."""
    limits = {**SPEED_ONLY, "train.batch_size": 32, "train.max_train_sec": bench.seconds}
    settings: dict[str, dict[str, Any]] = {
        "eager": {},
        "fused and graphs": {"train.optimizer_args": {"momentum": 0.9, "fused": True},
                             "train.compile": "reduce-overhead" if bench.on_gpu else None},
        "channels_last": {"train.channels_last": True},
        "tf32": {"train.matmul_precision": "high"},
    }  # fmt: skip
    plain, found = bench.plain("train.batch_size=32"), dict[str, Any]()

    def measure(name: str) -> dict[str, Any]:
        made, summary = bench.trained_alone(name, limits)
        return {"over_plain": rate(summary) / plain, "time_sec": summary["classes"][0]["time_sec"],
                "steps": steps_of(summary), **kernels(made)}  # fmt: skip

    for name, more in settings.items():
        limits |= more
        startup.set_precision(str(limits.get("train.matmul_precision", "highest")))
        found[name] = bench.on_rank_0(lambda: measure(name))  # noqa: B023
    startup.set_precision("highest")
    return {"plain_samples_per_sec": plain, **found}


def kernels(made: trainer.Trainer, steps: int = 20) -> dict[str, Any]:
    """What a local step launches, and what takes the GPU longest: milliseconds of a step."""
    worker, source = made.worker, made.source
    size = made.plan.of_rank(0).batch_size
    rows = np.random.default_rng(0).integers(len(source), size=(2 * steps, size))
    batches = read(source, rows, worker.generator)
    worker.local_steps(batches, steps)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        seconds = timed(lambda: worker.local_steps(batches, steps))
    events = [e for e in prof.key_averages() if e.device_type == DeviceType.CUDA]
    times = {e.key[:60]: e.self_device_time_total / 1e3 / steps for e in events}
    launches = [e.name for e in prof.events() or [] if e.name.startswith("cu") and "Launch" in e.name]
    return {"step_ms": 1e3 * seconds / steps, "gpu_ms": sum(times.values()), "launches": Counter(launches),
            "longest": dict(sorted(times.items(), key=lambda item: -item[1])[:4])}  # fmt: skip


def average(bench: Bench) -> dict[str, Any]:
    cluster = assign(device_classes(bench.classes(1)), bench.facts)
    comm, result = Comm(cluster, bench.env.rank), {}
    device = "cuda" if bench.on_gpu and bench.env.rank == 0 else "cpu"
    for megabytes in MEGABYTES if bench.on_gpu else MEGABYTES[:1]:
        name, vector = f"{megabytes} MB", torch.randn(int(megabytes * 1e6) // 4, device=device)
        pinned = torch.empty(vector.shape, pin_memory=device == "cuda")

        def there_and_back() -> None:
            pinned.copy_(vector, non_blocking=True)  # noqa: B023
            if device == "cuda":
                torch.cuda.current_stream().synchronize()  # the host is to sum it
            vector.copy_(pinned, non_blocking=True)  # noqa: B023

        def own_copies() -> None:
            host = comm.on_host(vector)  # noqa: B023
            if host is not vector:  # noqa: B023
                vector.copy_(host)  # noqa: B023

        times = {what: [clock(call) for _ in range(TURNS)] for what, call in (
            ("pinned", there_and_back), ("copies", own_copies),
            ("whole", lambda: comm.weighted_sum_(vector, 1 / 3, f"bench.{name}")),  # noqa: B023
        )}  # fmt: skip
        medians = {what: 1e3 * statistics.median(seconds) for what, seconds in times.items()}
        result[name] = {f"{what}_ms": ms for what, ms in medians.items()}
        result[name]["pinned_over_copies"] = medians["pinned"] / medians["copies"]
    return result


def clock(call: Callable[[], Any]) -> float:
    agreed("turn")
    return timed(call)


def timed(call: Callable[[], Any]) -> float:
    """Seconds, with what it leaves to the GPU."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def steps(bench: Bench) -> dict[str, Any]:
    """The local steps of a job against those of the plain loop, in one process."""
    result = bench.on_rank_0(lambda: _steps(bench)) or {}
    agreed("steps")
    return result


def _steps(bench: Bench) -> dict[str, Any]:
    count, batch = (50, 128) if bench.on_gpu else (5, 2)
    made, _ = bench.trained_alone("steps", {**SPEED_ONLY, "train.batch_size": batch, "train.max_train_sec": 0.1})
    worker, source = made.worker, made.source
    rows = np.random.default_rng(0).integers(len(source), size=(count, batch))

    def ours() -> None:
        worker.local_steps(read(source, rows, worker.generator), count)

    plain, _ = PLAIN["plain_step"]([*bench.config, f"train.batch_size={batch}"], bench.device)
    turns = [(timed(ours), timed(lambda: [plain() for _ in range(count)])) for _ in range(TURNS)]
    result: dict[str, Any] = {
        "steps_over_plain": statistics.median(theirs / own for own, theirs in turns),
        "step_ms": 1e3 * statistics.median(own for own, _ in turns) / count,
        "plain_step_ms": 1e3 * statistics.median(theirs for _, theirs in turns) / count,
    }
    with profiled(bench) as prof:
        ours()
    names = [e.name for e in sorted(prof.events() or [], key=lambda e: e.time_range.start)]
    launched = [name.startswith("cudaLaunch") for name in names]
    at = [n for n, name in enumerate(names) if name in WAITS]
    result |= {
        "steps": count, "waits": len(at), "waits_at": [sum(launched[:n]) / max(sum(launched), 1) for n in at],
        "items": names.count("aten::_local_scalar_dense"), "launches_a_step": sum(launched) / count,
        "host_ms_a_step": hot(prof, count),
    }  # fmt: skip
    with profiled(bench) as prof:
        for _ in range(count):
            plain()
    return result | {"plain_host_ms_a_step": hot(prof, count)}


def trace(bench: Bench) -> dict[str, Any]:
    """Ten rounds with delayed averages."""
    settings = {**SPEED_ONLY, "aggregation.delayed": True, "cluster.classes": bench.classes(1),
                "train.epoch_length": "dataset",
                "train.tau": {"gpu": 4, "cpu": 1}, "train.batch_size": {"gpu": GPU_BOUND, "cpu": 2}}  # fmt: skip
    if not bench.on_gpu:
        settings |= {"train.tau": {"gpu": 1, "cpu": 1}, "train.batch_size": 2}
    tau = settings["train.tau"]["gpu"]
    with nullcontext() if bench.env.rank else profiled(bench) as prof, marked_rounds():
        bench.trained("delayed", {**settings, "train.max_fast_steps": tau * (ROUNDS + 4)})
    if prof is None:
        return {}
    events = list(prof.events() or [])
    ends = sorted(e.time_range.end for e in events if e.name == ROUND)
    return {"rounds": ROUNDS, **idle(events, ends[2], ends[2 + ROUNDS])}


def hot(prof: Any, steps: int) -> dict[str, float]:
    """Where the host spends most of its time: milliseconds of a step by operator, and of all."""
    own = {e.key: e.self_cpu_time_total / 1e3 / steps for e in prof.key_averages()}
    return {"all": sum(own.values())} | dict(sorted(own.items(), key=lambda item: -item[1])[:TOP])


def profiled(bench: Bench) -> Any:
    return profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])])


@contextmanager
def marked_rounds() -> Iterator[None]:
    """Marks the end of each round in the trace."""
    end_round = epoch.RoundSpans.end_round

    def marked(self: epoch.RoundSpans) -> None:
        with record_function(ROUND):
            end_round(self)

    epoch.RoundSpans.end_round = marked  # type: ignore[method-assign]
    try:
        yield
    finally:
        epoch.RoundSpans.end_round = end_round  # type: ignore[method-assign]


def idle(events: list[Any], begin_us: float, end_us: float) -> dict[str, Any]:
    """The share of the time between in which nothing runs on the GPU, None without one, and the longest gaps."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if e.device_type == DeviceType.CUDA)
    busy, reached, gaps = 0.0, begin_us, list[float]()
    for start, end in spans:
        start, end = max(start, reached), min(end, end_us)
        if end > start:
            gaps.append((start - reached) / 1e3)
            busy, reached = busy + end - start, end
    share = 1 - busy / (end_us - begin_us) if spans else None
    return {"idle_fraction": share, "took_ms": (end_us - begin_us) / 1e3, "gaps_ms": sorted(gaps)[:-TOP:-1]}


def accuracy(bench: Bench) -> dict[str, Any]:
    limits = {"train.epochs": None, "train.max_train_sec": bench.seconds, "checkpoint.every_sec": None,
              "profile.reuse": False, "cluster.too_slow": "shrink_batch", "train.lr": 0.1, "train.scheduler": None}
    result: dict[str, Any] = {"target": bench.target}
    for name, gpus in (("gpu and 2 cpus", 1), ("two classes on the gpu", 2)):
        bench.trained(name, {**limits, "cluster.classes": bench.classes(gpus, slowdown=4.0)})
        result[name] = reached(bench, name)
    bench.alone("gpu alone", limits)
    result["gpu alone"] = reached(bench, "gpu alone")
    by_hand = bench.on_rank_0(lambda: ddp(bench))
    if by_hand:
        result["ddp"] = by_hand
    return result


def ddp(bench: Bench) -> dict[str, Any]:
    """The same of torch's DistributedDataParallel on the GPU alone, as one writes it by hand."""
    import torch.distributed as dist

    config = load([w for w in bench.config if "=" not in w], [*(w for w in bench.config if "=" in w), "train.lr=0.1"],
                  algorithms.method)  # fmt: skip
    parts, device = components.build(config), torch.device(bench.device)
    dist.init_process_group("nccl" if bench.on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = torch.nn.parallel.DistributedDataParallel(parts.model.to(device))
    optimizer, generator = parts.optimizer(list(model.parameters())), torch.Generator(device)
    train, test = parts.dataset.train.to(device), parts.dataset.test.to(device)
    batch, seconds, found, epochs = config.train.batch_size, 0.0, list[tuple[float, float]](), 0
    while seconds < bench.seconds:
        start, steps = time.perf_counter(), len(train) // batch
        rows = np.random.default_rng(epochs).permutation(len(train))[: steps * batch].reshape(steps, batch)
        for inputs, targets in train.batches(rows, generator):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), targets, **config.train.loss_args).backward()
            optimizer.step()
        if bench.on_gpu:
            torch.cuda.synchronize()
        seconds, epochs = seconds + time.perf_counter() - start, epochs + 1
        model.eval()
        with torch.no_grad():
            rows = np.arange(len(test) // 100 * 100).reshape(-1, 100)
            right = sum(int((model(i).argmax(1) == t).sum()) for i, t in test.batches(rows, generator))
        found.append((seconds, right / rows.size))
        model.train()
    dist.destroy_process_group()
    first = next((seconds for seconds, accuracy in found if accuracy >= bench.target), None)
    return {"seconds": first, "accuracy": found[-1][1], "epochs": epochs, "train_sec": seconds}


def question(bench: Bench) -> dict[str, Any]:
    """Three ranks on the GPU, of which two are emulated to be four times slower; the rate falls to zero."""
    limits = {"train.epochs": None, "train.max_train_sec": bench.seconds, "checkpoint.every_sec": None,
              "profile.reuse": False, "cluster.too_slow": "shrink_batch", "train.lr": 0.1,
              "train.scheduler": "cosine", "train.scheduler_args": {"floor": 0.0},
              "cluster.classes": bench.classes(3, slowdown=4.0)}  # fmt: skip
    biased = {"algorithm.name": "biased_local_sgd"}
    uniform = {"aggregation.weights": "uniform"}
    plain, normalised = {"sampling.scheme": "uniform"}, {"aggregation.weights": "normalised"}
    runs: dict[str, dict[str, Any]] = {
        "fast alone": {"algorithm.name": "sync_sgd", "algorithm.participants": "fast"},
        "dlb": {"algorithm.name": "dlb"},
    } | {
        f"{name}, tau {tau}": {**biased, **more, "train.tau": tau}
        for tau in (4, 32)
        for name, more in (("both biases", {}), ("weights by steps", plain), ("uniform", {**plain, **uniform}),
                           ("normalised", {**plain, **normalised}))
    }
    result = {}
    for name, settings in runs.items():
        bench.trained(name, {**limits, **settings})
        result[name] = reached(bench, name)
        if bench.env.rank == 0:
            print(f"{name}: {result[name]}", flush=True)
    return result


def reached(bench: Bench, name: str) -> dict[str, Any] | None:
    """The last accuracy of a run, its epochs, and the seconds of training after which it had the target."""
    if bench.env.rank:
        return None
    rows = [json.loads(line) for line in (bench.folder / name / "metrics.jsonl").read_text().splitlines()]
    tested = [row for row in rows if row.get("eval_accuracy") is not None]
    first = next((row["train_sec"] for row in tested if row["eval_accuracy"] >= bench.target), None)
    last = tested[-1] if tested else {}
    return {"seconds": first, "accuracy": last.get("eval_accuracy"), "epochs": rows[-1]["epoch"],
            "train_sec": rows[-1]["train_sec"]}  # fmt: skip


ROWS = {call.__name__: call for call in (speed, steps, graphs, average, trace, accuracy, question)}


def main(folder: str, out: str, device: str, seconds: str, target: str, rows: str, *config: str) -> None:
    env = job_env()
    output = exchange(env, "bench", local_facts(env.rank, "localhost", env.local_rank).to_dict(), 120)
    facts = [RankFacts.from_dict(other) for other in output]
    torch.set_num_threads(1)
    startup.set_precision("highest")
    if device == "cuda":
        torch.cuda.set_device(0)
    hvd.init(process_sets=[hvd.ProcessSet([0, 1]), hvd.ProcessSet([1, 2])])  # leaders of two classes, and the others
    bench = Bench(env, facts, Path(folder), device, float(seconds), float(target), list(config))
    card = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    for name in rows.split(","):
        start, result = time.time(), dict[str, Any]()
        try:
            result = ROWS[name](bench)
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        failed = agreed(f"row.{name}", float("error" in result))
        if env.rank == 0:
            result |= {"error": "another rank has failed"} if failed and "error" not in result else {}
            with open(out, "a") as file:
                file.write(json.dumps({"row": name, "device": card, "took_sec": time.time() - start, **result}) + "\n")
    hvd.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
