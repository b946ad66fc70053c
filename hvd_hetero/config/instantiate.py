"""Finding things by name: import paths, optional libraries, registries and keyword arguments.

All with errors that a user understands.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

from hvd_hetero.errors import ConfigError, UserError, nearest

T = TypeVar("T")
Place = tuple[str, int | None]
"""A file and a line in it."""
WORKERS_TRACEBACK = "\nOriginal Traceback (most recent call last):\n"
PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
LIBRARIES = re.compile(rf"/(site|dist)-packages/|{re.escape(os.path.dirname(os.__file__))}|^{re.escape(PACKAGE)}|^<")
"""Files in which nobody looks for a mistake of their own."""
LONGEST = 400
"""Characters of what an exception says: some list all that torch has."""


def import_target(key: str, spec: str) -> Callable[..., Any]:
    """Return the callable that an import path ``package.module:function`` names.

    The working directory is searched first, as ``python -m`` does, so that a file beside the config is found.

    Args:
        key: the configuration key that holds the path, for the error message.
        spec: the import path; dots after the colon reach into classes.

    Raises:
        ConfigError: no colon, no such module, a module that fails to import, no such attribute, not callable.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ConfigError(key, spec, "not an import path", "write it as 'package.module:function'")
    target: Any = _import_module(key, spec, module_name)
    for part in attribute.split("."):
        if not hasattr(target, part):
            public = [name for name in vars(target) if not name.startswith("_")]
            problem = f"module '{module_name}' has no '{attribute}'"
            raise ConfigError(key, spec, problem, nearest(part, public))
        target = getattr(target, part)
    if not callable(target):
        kind = type(target).__name__
        raise ConfigError(key, spec, f"'{attribute}' is a {kind}, not callable", "name a function or a class")
    return target


def _import_module(key: str, spec: str, name: str) -> types.ModuleType:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            remedy = f"run from the folder that holds it (now {here}) or install it"
            raise ConfigError(key, spec, f"no module named '{error.name}'", remedy) from error
        problem = f"importing '{name}' failed: {error}"
        raise ConfigError(key, spec, problem, f"install '{error.name}' in this environment") from error
    except Exception as error:
        problem = f"importing '{name}' failed: {type(error).__name__}: {error}"
        raise ConfigError(key, spec, problem, f"make 'python -c \"import {name}\"' work") from error


def choose(key: str, name: str | None, options: Mapping[str, T]) -> T:
    """Return the registered option called ``name``.

    Raises:
        ConfigError: there is none; the nearest one is named.
    """
    if name is not None and name in options:
        return options[name]
    raise ConfigError(key, name, "unknown name", nearest(str(name), options))


def call(key: str, function: Callable[..., T], args: Mapping[str, Any]) -> T:
    """Call ``function`` with keyword arguments from a config, after checking their names and plain types.

    Raises:
        ConfigError: an unknown or missing argument, one whose type contradicts a plain annotation, or the function
            raises something.
    """
    check_arguments(key, function, args)
    try:
        return function(**args)
    except UserError:
        raise
    except Exception as error:  # whatever a user's function may raise
        name = getattr(function, "__qualname__", str(function))
        remedy = f"correct it, or what it is given in {key}"
        raise ConfigError(key, dict(args), f"{name} fails: {cause(error)}", remedy) from error


def cause(error: BaseException, origins: Iterable[Place] = ()) -> str:
    """An exception in one line, with the last place of the user's own in its traceback.

    Args:
        origins: where else to look, if there is none: the places that made what an exception is about.
    """
    message = in_a_line(error)
    message = message if len(message) <= LONGEST else f"{message[:LONGEST]}..."
    trace = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    of_user = [(file, line) for file, line in [*origins, *trace] if not LIBRARIES.search(file)]
    return f"{message} ({os.path.basename(of_user[-1][0])}, line {of_user[-1][1]})" if of_user else message


def in_a_line(error: BaseException) -> str:
    """An exception's type and text in one line; the original's, where a data worker has made a traceback of it."""
    text = f"{type(error).__name__}: {error}"
    if WORKERS_TRACEBACK in text:
        text = text.rstrip().splitlines()[-1]
    return " ".join(text.split())


def check_arguments(key: str, function: Callable[..., Any], args: Mapping[str, Any],
                    also: Iterable[str] = ()) -> None:
    """Check names and plain types of keyword arguments against a signature.

    Args:
        key: the configuration key that holds them, e.g. ``model.args``.
        function: whose parameters are the valid ones.
        args: the arguments given.
        also: further valid names, for the message.

    Raises:
        ConfigError: see :func:`call`.
    """
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some builtins have no signature: nothing to check against
        return
    by_keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    by_name = {name: p for name, p in parameters.items() if p.kind in by_keyword}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = _hints(function)
    for name, value in args.items():
        if name not in by_name and not takes_any:
            raise ConfigError(f"{key}.{name}", value, "unknown argument", nearest(name, [*by_name, *also]))
        if name in hints and not _fits(value, hints[name]):
            wanted = getattr(function, "__annotations__", {}).get(name, hints[name])
            raise ConfigError(f"{key}.{name}", value, f"has type {type(value).__name__}", f"give {wanted}")
    missing = [name for name, p in by_name.items() if p.default is p.empty and name not in args]
    if missing:
        remedy = f"set {key}.{missing[0]}"
        if not args and key in ("data.args", "model.args"):
            remedy += "; arguments of a former target are not kept"  # see config/load.py
        raise ConfigError(key, dict(args), f"argument '{missing[0]}' is missing", remedy)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except Exception:  # annotations a user's module cannot resolve at run time: names are still checked
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value fits an annotation made of plain types; anything more elaborate is let through."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin in (Sequence, list, tuple):
        if isinstance(value, str) or not isinstance(value, Sequence):
            return False
        return len(inner) != 1 or all(_fits(item, inner[0]) for item in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, (int, float))
    if hint in (int, bool, str, type(None)):
        return isinstance(value, hint)
    return True


def import_transformers(key: str, value: str) -> Any:
    """Import the transformers library.

    Raises:
        ConfigError: it is not installed; ``key`` and ``value`` say what needs it.
    """
    if find_spec("transformers") is None:
        problem = "needs the package transformers, which is not installed"
        raise ConfigError(key, value, problem, "pip install 'hvd-hetero[nlp]'")
    return importlib.import_module("transformers")
