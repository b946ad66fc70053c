"""The environment of ranks: what ``hvd-hetero launch`` passes on of its own, and how its preflight sees just that."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from hvd_hetero.config.instantiate import LIBRARIES
from hvd_hetero.errors import ConfigError, UserError
from hvd_hetero.secrets import is_secret

if TYPE_CHECKING:
    from hvd_hetero.config.schema import Config

FORWARDED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TMPDIR|TZ|LANG|LANGUAGE|LC_.*|TERM|COLORTERM|NO_COLOR|FORCE_COLOR|XDG_.*|"
    r"VIRTUAL_ENV|CONDA_PREFIX|CONDA_DEFAULT_ENV|LD_LIBRARY_PATH|LD_PRELOAD|CC|CXX|PYTHON.*|SSH_AUTH_SOCK|"
    r"(?i:https?|no|all)_(?i:proxy)|SSL_CERT_FILE|SSL_CERT_DIR|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|"
    r"HVD_HETERO_.*|HOROVOD_.*|NCCL_.*|CUDA_.*|CUBLAS_WORKSPACE_CONFIG|NVIDIA_TF32_OVERRIDE|OMP_.*|MKL_.*|KMP_.*|"
    r"GOMP_.*|OPENBLAS_.*|NUMBA_.*|TORCH_.*|PYTORCH_.*|TORCHINDUCTOR_CACHE_DIR|TRITON_CACHE_DIR|"
    r"HF_.*|HUGGINGFACE_.*|TRANSFORMERS_.*|TOKENIZERS_.*|WANDB_.*|MLFLOW_.*|MPLCONFIGDIR|MPLBACKEND|NLTK_DATA|"
    r"SLURM_(?:JOB_.*|JOBID|ARRAY_.*|SUBMIT_.*|CLUSTER_NAME|CONF|RESTART_COUNT)"
)
"""Variables that ranks get, unless they are secrets. Of Slurm's those of the job: those of a task or a step tell of the
launcher, and libraries would take every rank for it."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""Of a variable that a shell takes; horovodrun writes names into a shell's command line as they are."""
HASH_SEED = "PYTHONHASHSEED"
PLUMBING = ("os", "collections.abc", "_collections_abc")
"""Modules through which Python looks for a variable."""


def for_ranks(config: Config) -> dict[str, str]:
    """Return what ranks get of this process's environment, and the seed of hashes, which all ranks share.

    A secret is passed on only where ``launch.environment`` has its very name: a pattern may match more than is meant.
    """
    wanted = config.launch.environment

    def passes(name: str, value: str) -> bool:
        listed = FORWARDED.fullmatch(name) is not None or any(fnmatchcase(name, pattern) for pattern in wanted)
        return NAME.fullmatch(name) is not None and (name in wanted or (listed and not is_secret(name, value)))

    passed_on = {name: value for name, value in os.environ.items() if passes(name, value)}
    return {**passed_on, HASH_SEED: passed_on.get(HASH_SEED) or str(config.run.seed)}


def hidden(config: Config) -> list[str]:
    """Return the names of the variables that are set here and that ranks do not get."""
    return sorted(os.environ.keys() - for_ranks(config).keys())


def check_secrets(config: Config) -> None:
    """Make sure that no secret is to be passed on to another host, which is done by command lines.

    Raises:
        ConfigError: naming the variable.
    """
    for name in config.launch.environment:
        if name in os.environ and is_secret(name, os.environ[name]):
            problem = "is a secret, and goes to other hosts by command lines, which every user there can read"
            raise ConfigError("launch.environment", name, problem, "let your module read it from a file of your own")


@contextmanager
def as_ranks(config: Config) -> Iterator[None]:
    """Leave this process only what ranks have of its environment, for as long as the block lasts.

    What is looked for in vain meanwhile because it is not passed on is told: by the error with which the block ends,
    where that names it or the user's own code looked for it, and else on standard error.

    Raises:
        UserError: that of the block.
    """
    before, passed_on, environ_type = dict(os.environ), for_ranks(config), type(os.environ)
    absent = hidden(config)
    missed: dict[str, bool] = {}

    class Watched(os._Environ[str]):
        def __getitem__(self, name: str) -> str:
            try:
                return super().__getitem__(name)
            except KeyError:
                if name in absent:
                    missed[name] = missed.get(name, False) or _is_users()
                raise

    _set(passed_on)
    os.environ.__class__ = Watched
    try:
        yield
    except UserError as error:
        names = [name for name, users in missed.items() if users or re.search(rf"\b{name}\b", str(error))]
        if not names:
            raise
        hint = f"launch does not pass {_remedy(config, names)}"
        if not isinstance(error, ConfigError):
            raise UserError(f"{error}; {hint}") from error
        raise ConfigError(error.key, error.value, error.problem, f"{error.remedy}; {hint}") from error
    else:
        if names := [name for name, users in missed.items() if users]:
            print(f"hvd-hetero: launch does not pass {_remedy(config, names)}", file=sys.stderr, flush=True)
    finally:
        os.environ.__class__ = environ_type
        _set(before)


def _remedy(config: Config, names: list[str]) -> str:
    them, are = ("it", "it is") if len(names) == 1 else ("them", "they are")
    listed = ",".join([*config.launch.environment, *names])
    variables = f"{', '.join(names)} on to ranks, though {are} set here and looked for"
    return f"{variables}; launch.environment=[{listed}] passes {them} on"


def _is_users() -> bool:
    """Whether a variable is looked for by the user's own code, or by a reference in a configuration."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") in PLUMBING:
        frame = frame.f_back
    file = frame.f_code.co_filename
    return LIBRARIES.search(file) is None or f"{os.sep}omegaconf{os.sep}" in file


def _set(variables: dict[str, str]) -> None:
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)
