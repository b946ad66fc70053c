"""Data of a user who reads environment variables."""

from __future__ import annotations

import os
from typing import Any

from own_parts import few_samples


def needs_folder() -> Any:
    return few_samples() if os.environ["MY_DATA_DIR"] else None


def may_have_mode() -> Any:
    """Does something else, in silence, where a variable is not set."""
    return few_samples() if os.environ.get("MY_MODE", "1") == "1" else None
