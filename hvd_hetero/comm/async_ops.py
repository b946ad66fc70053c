"""Beginning Horovod's operations and waiting for them, by polling and sleeping.

Horovod's own wait spins, which costs the other ranks of a busy CPU host their cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
from horovod.common.exceptions import HorovodInternalError

POLL_SEC, MOST_POLL_SEC = 5e-5, 1e-3


class PeerLost(RuntimeError):
    """A collective could not finish because another rank is gone."""


PEER_LOST = (PeerLost, HorovodInternalError)
"""What a collective may raise, when it is begun or while it is waited for, because another rank is gone."""


def begin(operation: Callable[..., int], *args: Any, name: str, **options: Any) -> int:
    """Begins one of Horovod's asynchronous operations; it refuses that of a set that has lost a rank."""
    handle: int = guarded(lambda: operation(*args, name=name, **options))
    return handle


def wait_until(handle: int) -> None:
    """Returns when the operation is done, without taking its result.

    Pauses are a twentieth of the wait so far: a rank that waits long must not spend on looking what it may have of a
    core, which a CPU quota may have made little.
    """
    start = time.perf_counter()
    while not hvd.poll(handle):
        time.sleep(min(max(POLL_SEC, (time.perf_counter() - start) / 20), MOST_POLL_SEC))


def finished(handle: int) -> Any:
    """Waits for the operation; returns its result."""
    return guarded(lambda: _done(handle))


def _done(handle: int) -> Any:
    wait_until(handle)
    return hvd.synchronize(handle)


def guarded(call: Callable[[], Any]) -> Any:
    """Calls it; what Horovod raises where another rank is gone becomes :class:`PeerLost`."""
    try:
        return call()
    except HorovodInternalError as error:
        raise PeerLost(f"another rank is gone ({str(error).splitlines()[0].partition('. ')[0]})") from error
    except ValueError as error:
        # what Horovod says of a set that it gave up after a member died
        if "Process set provided does not exist" in str(error):
            raise PeerLost("another rank is gone (its process set was given up)") from error
        raise
