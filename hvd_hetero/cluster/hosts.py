"""Read lists of hosts."""

from __future__ import annotations

import re

from hvd_hetero.errors import ConfigError


def parse_hosts(text: str) -> list[tuple[str, int]]:
    """Reads ``host:slots,host:slots`` as horovodrun's -H does; a host without a number has one slot.

    Raises:
        ConfigError: malformed, a host named twice, no slot at all.
    """
    hosts = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*([A-Za-z0-9._-]+)(?::([0-9]+))?\s*", item)
        if match is None or match[2] == "0":
            raise ConfigError("cluster.hosts", text, f"{item!r} is not host:slots", "write for example node1:2,node2:4")
        hosts.append((match[1], int(match[2] or 1)))
    names = [name for name, _ in hosts]
    if len(set(names)) < len(names):
        raise ConfigError("cluster.hosts", text, "a host is named twice", "give each host once, with all its slots")
    return hosts
