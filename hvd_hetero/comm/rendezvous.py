"""Where ranks meet that something other than horovodrun has started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


class Rendezvous:
    """Horovod's rendezvous and key-value store for ranks on these hosts; closed by :meth:`close`.

    Args:
        hosts: of each rank, by any names that tell them apart.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        from horovod.runner.common.util.hosts import SlotInfo
        from horovod.runner.http.http_server import RendezvousServer

        local = [Counter(hosts[:rank])[host] for rank, host in enumerate(hosts)]
        cross = [Counter(local[:rank])[number] for rank, number in enumerate(local)]
        on_host, crossing, size = Counter(hosts), Counter(local), len(hosts)
        self._slots = [
            SlotInfo(host, rank, local[rank], cross[rank], size, on_host[host], crossing[local[rank]])
            for rank, host in enumerate(hosts)
        ]
        self._server = RendezvousServer()
        self._port = self._server.start()
        self._server.init(self._slots)

    def environment(self, rank: int, address: str, interface: str) -> dict[str, str]:
        """Return the variables by which a rank finds the others.

        Args:
            address: of this process, as ranks reach it.
            interface: of the rank's host, by which others reach it.
        """
        slot = self._slots[rank]
        values = {
            "HOSTNAME": slot.hostname, "RANK": rank, "SIZE": slot.size, "LOCAL_RANK": slot.local_rank,
            "LOCAL_SIZE": slot.local_size, "CROSS_RANK": slot.cross_rank, "CROSS_SIZE": slot.cross_size,
            "GLOO_RENDEZVOUS_ADDR": address, "GLOO_RENDEZVOUS_PORT": self._port, "GLOO_IFACE": interface,
            "CONTROLLER": "gloo", "CPU_OPERATIONS": "gloo",
        }  # fmt: skip
        return {f"HOROVOD_{name}": str(value) for name, value in values.items()} | {"NCCL_SOCKET_IFNAME": interface}

    def close(self) -> None:
        self._server.stop()
