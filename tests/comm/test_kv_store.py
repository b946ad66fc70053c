"""What ranks say to one another through the job's store, which is Horovod's own: also when there are many of them."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvd_hetero.comm.kv_store import (
    LOOKS_PER_SEC,
    SCOPE,
    JobEnv,
    collect,
    exchange,
    from_shared,
    pack,
    to_shared,
    unpack,
)

pytestmark = pytest.mark.horovod

SIZE = 48
VALUES = st.none() | st.integers() | st.text(max_size=5) | st.lists(st.booleans() | st.floats(0, 1), max_size=3)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.dictionaries(st.sampled_from(["facts", "data", "error"]), VALUES), min_size=1, max_size=6))
def test_what_several_say_alike_is_told_once_and_comes_back_as_it_was(output: list[dict[str, Any]]) -> None:
    assert from_shared(unpack(pack(to_shared(output)))) == output


def test_what_is_told_grows_little_with_ranks_that_are_alike() -> None:
    """A rank adds what is its own, in few bytes; what is the same on all is one object, and quickly compared."""
    alike = {"fingerprint": {f"train.key{i}": f"value {i}" for i in range(200)}}

    def told(size: int) -> bytes:
        own = ({"rank": rank, "host": f"node{rank // 8}", "cores": list(range(64))} for rank in range(size))
        return pack(to_shared([{"facts": facts, **alike} for facts in own]))

    few, many = len(told(100)), len(told(1100))
    assert (many - few) / 1000 < 40 < len(json.dumps(alike)) / 100
    back = from_shared(unpack(told(100)))
    assert all(one["fingerprint"] is back[0]["fingerprint"] for one in back)


@pytest.fixture
def asked() -> Counter[str]:
    """How often keys were asked for."""
    return Counter()


@pytest.fixture
def store(asked: Counter[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousServer

    get = RendezvousHandler.do_GET

    def counted(handler: Any) -> None:
        asked[handler.path.rpartition("/")[2]] += 1
        get(handler)

    monkeypatch.setattr(RendezvousHandler, "do_GET", counted)
    server = RendezvousServer()
    port = server.start()
    server.init([])
    # ranks that are threads of one process: each begins to count its exchanges
    monkeypatch.setattr("hvd_hetero.comm.kv_store._numbers", defaultdict(partial(itertools.repeat, 0)))
    yield f"http://127.0.0.1:{port}/{SCOPE}"
    server.stop()


def test_ranks_that_wait_ask_together_no_more_often_than_the_store_can_bear(store: str, asked: Counter[str]) -> None:
    envs = [JobEnv(rank=rank, size=SIZE, store=store) for rank in range(SIZE)]
    begin = time.monotonic()

    def rank(env: JobEnv) -> list[dict[str, Any]]:
        if env.rank == 0:
            time.sleep(2)
        return exchange(env, "many", {"rank": env.rank, "all": "alike"}, 60)

    with ThreadPoolExecutor(SIZE) as pool:
        output = list(pool.map(rank, envs))
    assert all(one == [{"rank": r, "all": "alike"} for r in range(SIZE)] for one in output)
    waited = sum(times for key, times in asked.items() if key.endswith(".all"))
    assert waited <= LOOKS_PER_SEC * (time.monotonic() - begin) + SIZE


def test_only_rank_0_hears_all_where_the_others_need_but_its_answer(store: str, asked: Counter[str]) -> None:
    """As ranks do when they save: what each of them says is read once."""
    envs = [JobEnv(rank=rank, size=4, store=store) for rank in range(4)]
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda env: collect(env, "save", {"rank": env.rank}, 60, sum_of), envs))
    assert told == [6] * 4


def sum_of(output: list[dict[str, Any]]) -> int:
    return sum(one["rank"] for one in output)


def test_who_does_not_answer_is_named(store: str) -> None:
    with pytest.raises(TimeoutError, match="rank 1 did not answer"):
        exchange(JobEnv(rank=0, size=2, store=store), "alone", {}, 0.2)
    with pytest.raises(TimeoutError, match="rank 0 did not answer"):
        exchange(JobEnv(rank=1, size=2, store=store), "alone", {}, 0.2)
