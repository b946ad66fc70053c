"""What the ranks tell each other before Horovod is initialized.

Horovod's process sets must be known at ``hvd.init``, and they depend on what every rank sees (hosts, GPUs). So ranks
exchange that first, over the key-value store that horovodrun opens for the job anyway. It also carries each rank's
complaint, so that bad input ends all ranks with one message and nobody waits in ``init`` for a peer that gave up.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
import urllib.error
import urllib.request
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from hvd_hetero.errors import ConfigError

SCOPE = "hvd_hetero"
JOB = "HVD_HETERO_JOB"
"""In the environment of all processes of a launched job, on all hosts: the job's id, by which they are found."""
TRIED = "HVD_HETERO_TRIED"
"""Set by ``hvd-hetero launch``, which has tried out what the job is made of."""
COLUMNS = "HVD_HETERO_COLUMNS"
"""Set by the launcher to the width of its terminal: ranks themselves never see one."""
ORPHAN = "HVD_HETERO_ORPHAN_SEC"
"""In the environment: how long a rank goes on without reaching its launcher, if not :attr:`JobEnv.orphan_sec`."""
TIMEOUT_SEC, BEAT_TIMEOUT_SEC = 30.0, 5.0
LOOK_SEC, MOST_LOOK_SEC = 0.005, 0.5
"""Between two looks for what another rank says; it grows to a tenth of the time that was waited so far."""
LOOKS_PER_SEC = 400.0
"""Of all ranks together, so that the store, a server in Python, has time for those who say something."""
_numbers: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
"""Exchanges of this process so far, by name: a program may start several jobs, and a job may save several times."""


@dataclass(frozen=True)
class JobEnv:
    """This process's place in the job, as horovodrun tells it through the environment; alone it is rank 0 of 1.

    Attributes:
        store: address of the job's key-value store, if it has one.
        columns: width of the terminal that shows rank 0's output, if it is one.
        orphan_sec: how long it goes on without reaching the store.
        launched: by ``hvd-hetero launch``, which has tried out beforehand what the job is made of.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    host: str = "localhost"
    store: str | None = None
    columns: int | None = None
    orphan_sec: float = 30.0
    launched: bool = False


def job_env() -> JobEnv:
    """Reads the job's environment.

    Raises:
        ConfigError: started by something other than horovodrun with Gloo.
    """
    env = os.environ
    if "HOROVOD_RANK" not in env:
        if "OMPI_COMM_WORLD_RANK" in env or "PMI_RANK" in env:
            raise ConfigError("launcher", "mpirun", "ranks are placed through horovodrun's Gloo rendezvous",
                              "start with horovodrun --gloo, or with hvd-hetero launch")
        return JobEnv(host=socket.gethostname())
    address, port = env.get("HOROVOD_GLOO_RENDEZVOUS_ADDR"), env.get("HOROVOD_GLOO_RENDEZVOUS_PORT")
    return JobEnv(
        rank=int(env["HOROVOD_RANK"]),
        size=int(env["HOROVOD_SIZE"]),
        local_rank=int(env["HOROVOD_LOCAL_RANK"]),
        host=env.get("HOROVOD_HOSTNAME") or socket.gethostname(),
        store=f"http://{address}:{port}/{SCOPE}" if address else None,
        columns=int(env[COLUMNS]) if COLUMNS in env else None,
        orphan_sec=float(env.get(ORPHAN, JobEnv.orphan_sec)),
        launched=TRIED in env,
    )


def exchange(env: JobEnv, name: str, content: dict[str, Any], timeout_sec: float) -> list[dict[str, Any]]:
    """Gives every rank what every rank said, by rank.

    Args:
        name: of this exchange. The first one of that name meets the first ones of the other ranks, and so on.
        content: fit for JSON.

    Raises:
        TimeoutError: a rank said nothing in time; it is named.
    """
    return from_shared(collect(env, name, content, timeout_sec, to_shared))


def collect(
    env: JobEnv, name: str, content: dict[str, Any], timeout_sec: float, answer: Callable[[list[dict[str, Any]]], Any]
) -> Any:
    """Gives rank 0 what every rank said, by rank, and every rank what rank 0 answers to it.

    Rank 0 asks for one rank after the other. What it answers is read as often as there are ranks, so it goes packed.

    Args:
        name, content: as in :func:`exchange`.
        answer: called on rank 0; its result is fit for JSON.

    Raises:
        TimeoutError: a rank said nothing in time; it is named.
    """
    if env.size == 1 or env.store is None:
        return answer([content])
    deadline, where = time.monotonic() + timeout_sec, f"{env.store}/{name}.{next(_numbers[name])}"

    def put(key: object, data: bytes) -> None:
        _patiently(lambda: _put(f"{where}.{key}", data), deadline, "the launcher")

    if env.rank > 0:
        put(env.rank, to_bytes(content))
        every_sec = env.size / LOOKS_PER_SEC
        return unpack(_patiently(lambda: _get(f"{where}.all"), deadline, "rank 0", every_sec))

    def said_by(rank: int) -> Any:
        return json.loads(_patiently(lambda: _get(f"{where}.{rank}"), deadline, f"rank {rank}"))

    result = answer([content, *map(said_by, range(1, env.size))])
    put("all", pack(result))
    return result


def to_shared(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what ranks said with each part that several say once: most of it is the same on all."""
    numbers: dict[str, int] = {}
    rows = [[numbers.setdefault(json.dumps(part), len(numbers)) for part in one.items()] for one in messages]
    return {"parts": list(numbers), "ranks": rows}


def from_shared(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what :func:`to_shared` was given; parts that are the same are one object."""
    parts = [json.loads(part) for part in content["parts"]]
    return [dict(parts[number] for number in row) for row in content["ranks"]]


def to_bytes(content: Any) -> bytes:
    return json.dumps(content).encode()


def pack(content: Any) -> bytes:
    """Return JSON, packed."""
    return zlib.compress(to_bytes(content), level=1)


def unpack(data: bytes) -> Any:
    return json.loads(zlib.decompress(data))


def forget_addresses(env: JobEnv, hosts: Iterable[str], local_ranks: Iterable[int]) -> None:
    """Removes from the job's store the addresses at which ranks met in Horovod's init, so that it can be called again.

    Horovod's server counts the ranks that are done with a scope, but forgets all counts when one scope is complete. So
    a scope may stay, and the next init of these processes would connect to where nobody listens any more. One rank
    calls it, when all have left init and none has shut down. A store that does not answer is left alone.
    """
    if env.store is None:
        return
    server = env.store.rpartition("/")[0]
    scopes = ["global", *(f"local_{host}" for host in hosts), *(f"cross_{rank}" for rank in local_ranks)]
    with suppress(OSError, HTTPException):
        for url in (f"{server}/{scope}/0" for scope in scopes):
            for _ in range(env.size):  # so many are counted at most until the scope is complete
                if not _is_there(url):
                    break
                with _open(urllib.request.Request(url, method="DELETE"), BEAT_TIMEOUT_SEC):
                    pass


def put_beat(env: JobEnv, beat: dict[str, Any]) -> None:
    """Says what this rank is doing, fit for JSON.

    Raises:
        OSError, http.client.HTTPException: the store is not reached.
    """
    _put(f"{env.store}/beat.{env.rank}", to_bytes(beat), BEAT_TIMEOUT_SEC)


def get_beat(env: JobEnv, rank: int) -> dict[str, Any] | None:
    """What a rank said last; None if it has said nothing yet.

    Raises:
        OSError, http.client.HTTPException: the store is not reached.
    """
    data = _get(f"{env.store}/beat.{rank}", BEAT_TIMEOUT_SEC)
    beat: dict[str, Any] | None = None if data is None else json.loads(data)
    return beat


def _put(url: str, data: bytes, timeout_sec: float = TIMEOUT_SEC) -> int:
    """Puts it under a key; returns the store's status."""
    request = urllib.request.Request(url, data=data, method="PUT")
    with _open(request, timeout_sec) as answer:
        return int(answer.status)


def _patiently(call: Callable[[], Any], deadline: float, peer: str, every_sec: float = LOOK_SEC) -> Any:
    """Calls until there is an answer. The store may fail once; where it fails for long, the watchdog sees to it.

    Args:
        every_sec: so much time passes between two calls at least.
    """
    began, problem = time.monotonic(), None
    while True:
        try:
            if (answer := call()) is not None:
                return answer
        except (OSError, HTTPException) as error:
            problem = error
        now = time.monotonic()
        if now > deadline:
            why = f" ({problem})" if problem else ""
            raise TimeoutError(f"{peer} did not answer in time: it may still be at work on its data, or be gone{why}")
        time.sleep(max(LOOK_SEC, every_sec, min(MOST_LOOK_SEC, (now - began) / 10)))


def _is_there(url: str) -> bool:
    try:
        with _open(urllib.request.Request(url), BEAT_TIMEOUT_SEC):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return error.code != 404


def _get(url: str, timeout_sec: float = TIMEOUT_SEC) -> bytes | None:
    """What lies under a key; None where there is nothing."""
    try:
        with _open(urllib.request.Request(url), timeout_sec) as answer:
            found: bytes = answer.read()
            return found
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 404:
            raise
        return None


def _open(request: urllib.request.Request, timeout_sec: float) -> Any:
    # The job's own store is never behind a proxy, whatever the environment says.
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout_sec)
