"""Parameter groups: settings of some of a model's parameters alone, by patterns of their names (train.groups)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from hvd_hetero.errors import ConfigError, nearest

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
"""Makes an optimizer of parameters or of groups; of pairs (name, parameter) if it asks for ``named_parameters``."""
MATCH, FROZEN, LR_SCALE = "match", "frozen", "lr_scale"
NOT_NEGATIVE = ("weight_decay", "momentum")

Options = dict[nn.Parameter, dict[str, Any]]
"""What is set for a parameter, beside its optimizer's defaults."""


def options_of(model: nn.Module, groups: Sequence[Any]) -> Options:
    """Read ``train.groups``: where several fit a parameter, a later one wins, key by key.

    A parameter that has several names fits a pattern if one of them does.

    Raises:
        ConfigError: an entry is none, or a pattern fits no parameter.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    options: Options = {}
    for i, group in enumerate(groups):
        patterns = _patterns(f"train.groups[{i}]", group)
        settings = {name: value for name, value in group.items() if name != MATCH}
        for pattern in patterns:
            found = [param for name, param in named if fnmatchcase(name, pattern)]
            if not found:
                remedy = nearest(pattern, [name for name, _ in named])
                raise ConfigError(f"train.groups[{i}].{MATCH}", pattern, "fits the name of no parameter", remedy)
            for param in found:
                options.setdefault(param, {}).update(settings)
    return options


def _patterns(key: str, group: Any) -> list[str]:
    if not isinstance(group, Mapping) or not isinstance(group.get(MATCH), str):
        problem, remedy = "does not say which parameters", "write {match: '*.bias, *norm*', weight_decay: 0}"
        raise ConfigError(key, group, problem, remedy)
    if len(group) == 1:
        raise ConfigError(key, group, "sets nothing", f"give it {FROZEN}, {LR_SCALE} or an option of the optimizer")
    if not isinstance(group.get(FROZEN, False), bool):
        raise ConfigError(f"{key}.{FROZEN}", group[FROZEN], "is neither true nor false", "give one of them")
    if LR_SCALE in group and not (_is_number(group[LR_SCALE]) and group[LR_SCALE] > 0):
        raise ConfigError(f"{key}.{LR_SCALE}", group[LR_SCALE], "is no number above 0", f"give one, or {FROZEN}: true")
    return [pattern.strip() for pattern in group[MATCH].split(",")]


def freeze(options: Options) -> None:
    """Freeze the parameters that are to be; a group below may have taken that back."""
    for param, group in options.items():
        if group.get(FROZEN):
            param.requires_grad_(False)


def grouped(
    make: MakeOptimizer, model: nn.Module, options: Options, groups: Sequence[Mapping[str, Any]]
) -> MakeOptimizer:
    """Return what makes the optimizer, with groups or names as it takes them.

    It is called with all parameters of the model that are trained, or with copies of them, in the model's order.
    """
    by_names = asks_for_names(make)
    trained = [(name, options.get(param, {})) for name, param in model.named_parameters() if param.requires_grad]
    settings = [(f"train.groups[{i}].{name}", name, value) for i, group in enumerate(groups)
                for name, value in group.items() if name not in (MATCH, FROZEN)]  # fmt: skip
    if by_names and settings:
        key, _, value = settings[0]
        problem = "the optimizer's function asks for named_parameters, and makes its groups itself"
        raise ConfigError(key, value, problem, "leave it out, or let the function ask for parameters")

    def make_grouped(params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        if by_names:
            return make([(name, param) for (name, _), param in zip(trained, params, strict=True)])
        optimizer = make(_split(params, [options for _, options in trained]) if settings else params)
        for key, name, value in settings:
            if name != LR_SCALE:
                _check_option(key, name, value, optimizer)
        for group in optimizer.param_groups if settings else ():
            if LR_SCALE in group:
                group["lr"] = group["lr"] * group.pop(LR_SCALE)
        return optimizer

    return make_grouped


def asks_for_names(make: Callable[..., Any]) -> bool:
    """Say whether a function's first parameter is called ``named_parameters``."""
    try:
        return next(iter(inspect.signature(make).parameters), None) == "named_parameters"
    except (TypeError, ValueError):  # it is not callable, or has no signature
        return False


def _split(params: Sequence[nn.Parameter], options: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a group for each set of options; the first is of those parameters that have none, if there are any."""
    groups: dict[str, dict[str, Any]] = {repr({}): {"params": []}}
    for param, options_of_param in zip(params, options, strict=True):
        group_options = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in sorted(options_of_param.items()) if name != FROZEN
        }  # fmt: skip
        groups.setdefault(repr(group_options), {"params": [], **group_options})["params"].append(param)
    return [group for group in groups.values() if group["params"]]


def _check_option(key: str, name: str, value: Any, optimizer: torch.optim.Optimizer) -> None:
    """Refuse what an optimizer would keep in its groups without a word."""
    known = {other: default for other, default in optimizer.defaults.items() if other != "lr"}
    if name not in known:
        remedy = f"set {LR_SCALE}" if name == "lr" else nearest(name, [FROZEN, LR_SCALE, *known])
        raise ConfigError(key, value, f"is no option of a group of {type(optimizer).__name__}", remedy)
    if isinstance(known[name], bool) or not isinstance(known[name], (int, float)):
        return
    if not _is_number(value) or (name in NOT_NEGATIVE and value < 0):
        raise ConfigError(key, value, "is no number that it may be", f"give one such as {known[name]}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
