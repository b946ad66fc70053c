"""Tell secrets in variables and command lines, so that they are neither passed on nor shown."""

from __future__ import annotations

import re

SECRET = re.compile(r"TOKEN(?!IZERS_)|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)
"""In the name of a variable that is a secret."""


def is_secret(name: str, value: str) -> bool:
    """Tell whether a variable is secret: by its name, or because a password stands in its value."""
    return SECRET.search(name) is not None or without_passwords(value) != value


def without_passwords(word: str) -> str:
    """A word of a command line without what stands before the @ of a URL, and without values of keys named after it."""
    word = re.sub(r"(?<=://)[^/@\s]+(?=@)", "***", word)
    return re.sub(r"(?i)((?:token|secret|passw(?:or)?d|api_?key)['\"]?\s*[=:]\s*)[^\s,&}]+", r"\1***", word)
