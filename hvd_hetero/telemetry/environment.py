"""Describe what a run was made with: versions, hardware, revision."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from hvd_hetero.cluster.device_classes import Cluster
from hvd_hetero.secrets import without_passwords


def environment(cluster: Cluster, horovod: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader needs to know of where a run was made."""
    packages = ("torch", "torchvision", "numpy", "omegaconf", "hvd-hetero")
    return {
        "versions": {"python": platform.python_version(), "horovod": dict(horovod)}
        | {name: _version(name) for name in packages},
        "platform": platform.platform(),
        "ranks": [fact.to_dict() for fact in cluster.facts],
        "command": [without_passwords(word) for word in sys.argv],
        "git_revision": _git_revision(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Of the working directory, where the user's own code and configs are."""
    command = ["git", "-C", os.getcwd(), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
