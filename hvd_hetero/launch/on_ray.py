"""Training on a Ray cluster: one placement group with a bundle for each rank, and an actor in each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from hvd_hetero import algorithms
from hvd_hetero.comm.rendezvous import Rendezvous
from hvd_hetero.config.load import load
from hvd_hetero.errors import EXIT_LOST, UserError
from hvd_hetero.launch.environment import for_ranks
from hvd_hetero.telemetry.run_folder import SUMMARY
from hvd_hetero.training.api import run_dir

PLACED_SEC = 60.0
"""What Ray may take to find room for all bundles."""
ENDED_SEC = 10.0
"""What ranks have to notice that another one is gone, and to end."""
LOOPBACK = "127.0.0.1"
Bundle = Mapping[str, float]


def launch_on_ray(
    config: str | Path | Sequence[str | Path], bundles: Sequence[Bundle], overrides: Sequence[str] = (), *,
    placed_sec: float = PLACED_SEC,
) -> dict[str, Any]:  # fmt: skip
    """Trains on Ray, and returns the content of ``summary.json``.

    Args:
        config: files, as for :func:`hvd_hetero.train`; ``overrides`` are ``key=value``.
        bundles: the resources of each rank, in the order of ranks, for example ``[{"CPU": 2, "GPU": 1}, {"CPU": 1}]``.
        placed_sec: how long to wait until the cluster has room for all of them.

    Raises:
        UserError: Ray is not installed or has no room, a setting is wrong, or the job has failed: with what the rank
            said that failed first.
    """
    ray = _ray()
    files = [str(config)] if isinstance(config, (str, Path)) else [str(file) for file in config]
    if not bundles or any(not bundle or min(bundle.values()) <= 0 for bundle in bundles):
        raise UserError(f"launch_on_ray: bundles={list(bundles)}: give a bundle for each rank, [{{'CPU': 1}}, ...]")
    read = load(files, overrides, algorithms.method)
    folder = run_dir(read)
    words = ["train", *files, *overrides, f"run.dir={folder.resolve()}"]
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"))
    group = ray.util.placement_group([dict(bundle) for bundle in bundles])
    try:
        if not group.wait(placed_sec):
            problem = f"no room for {[dict(bundle) for bundle in bundles]} in {ray.available_resources()}"
            raise UserError(f"launch_on_ray: {problem}; ask for less, or start more of the cluster")
        actors = [_actor(ray, group, rank, bundle) for rank, bundle in enumerate(bundles)]
        places = ray.get([actor.place.remote() for actor in actors])
        nodes = [place["node"] for place in places]
        rendezvous = Rendezvous(nodes)
        alone = len(set(nodes)) == 1
        address = LOOPBACK if alone else ray.util.get_node_ip_address()
        environment = for_ranks(read)
        runs = {}
        for rank, (actor, place) in enumerate(zip(actors, places, strict=True)):
            interface = "lo" if alone else place["interface"]
            env = {**environment, **rendezvous.environment(rank, address, interface), **gpus_of(rank, places)}
            runs[actor.run.remote(words, env, os.getcwd())] = rank
        try:
            _wait(ray, runs)
        finally:
            ray.get([actor.stop.remote() for actor in actors], timeout=ENDED_SEC)
            rendezvous.close()
    finally:
        ray.util.remove_placement_group(group)  # which ends the actors too
    summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
    return summary


def _ray() -> Any:
    try:
        import ray
        import ray.util
    except ImportError as error:
        raise UserError("launch_on_ray: Ray is not installed; pip install 'hvd-hetero[ray]'") from error
    return ray


def _actor(ray: Any, group: Any, rank: int, bundle: Bundle) -> Any:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
    others = {name: number for name, number in bundle.items() if name not in ("CPU", "GPU", "memory")}
    return ray.remote(Rank).options(
        num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0), memory=bundle.get("memory"), resources=others,
        scheduling_strategy=place, max_concurrency=2,
    ).remote()  # fmt: skip


def _wait(ray: Any, runs: dict[Any, int]) -> None:
    """Waits for all ranks; where one fails, for the others only as long as it takes them to notice, and tells why."""
    failed: list[tuple[int, int, str]] = []
    while runs:
        ended, _ = ray.wait(list(runs), num_returns=1, timeout=ENDED_SEC if failed else None)
        if not ended:
            break
        done = ended[0]
        rank = runs.pop(done)
        try:
            status, error_text = ray.get(done)
        except ray.exceptions.RayError as error:
            status, error_text = EXIT_LOST, str(error).strip().splitlines()[0]
        if status:
            failed.append((rank, status, error_text))
    if failed:
        # a rank that only lost another one is not the cause, and of bad input one rank tells for all
        rank, status, error_text = min(failed, key=lambda one: (one[1] == EXIT_LOST, not one[2]))
        raise UserError(f"launch_on_ray: rank {rank} ended with status {status}: {error_text or 'it said nothing'}")


def gpus_of(rank: int, places: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return which GPUs a rank sees: those of all ranks of its host, in their order, as ranks choose among them."""
    gpus = [gpu for place in places if place["node"] == places[rank]["node"] for gpu in place["gpus"]]
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}


class Rank:
    """One rank, as an actor. It trains in a process of its own, whose status and last words are known."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def place(self) -> dict[str, Any]:
        """Where this is: the node, its network interface, and the GPUs that Ray has given it."""
        ray = _ray()
        address = ray.util.get_node_ip_address()
        names = (name for name, known in psutil.net_if_addrs().items() if any(a.address == address for a in known))
        context = ray.get_runtime_context()
        return {"node": f"{socket.gethostname()}.{context.get_node_id()[:8]}", "interface": next(names, "lo"),
                "gpus": context.get_accelerator_ids().get("GPU", [])}  # fmt: skip

    def run(self, words: Sequence[str], env: Mapping[str, str], folder: str) -> tuple[int, str]:
        """Trains; returns the status, and the last error that was said."""
        command, last_error = [sys.executable, "-m", "hvd_hetero", *words], ""
        with subprocess.Popen(command, env=dict(env), cwd=folder, stderr=subprocess.PIPE, text=True) as process:
            self._process = process
            assert process.stderr is not None
            for line in process.stderr:
                print(line, end="", file=sys.stderr, flush=True)
                last_error = line.strip() if "hvd-hetero: error: " in line else last_error
        return process.returncode, last_error.partition("hvd-hetero: error: ")[2]

    def stop(self) -> None:
        """Ends its process, which would outlive it."""
        if self._process is not None:
            self._process.kill()
