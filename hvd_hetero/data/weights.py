"""Weights of the training samples that come with the data (``sampling.sample_weights``)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_hetero.config.instantiate import cause, import_target
from hvd_hetero.data.source import Source
from hvd_hetero.errors import ConfigError, Unquoted

KEY = "sampling.sample_weights"


def sample_weights(spec: str, source: Source) -> NDArray[np.float32]:
    """Return a weight ``[n]`` for each training sample, with mean 1.

    Args:
        spec: an attribute of the training set as the user's function returned it, or ``package.module:function``, which
            takes the training set and returns the weights.

    Raises:
        ConfigError: there are none, or they are not n numbers of at least 0, some of them above.
    """
    dataset = getattr(source, "dataset", source)
    remedy = "name an attribute of the training set, or package.module:function, with one number for each sample"
    try:
        found = import_target(KEY, spec)(dataset) if ":" in spec else getattr(dataset, spec)
        weights = np.asarray(found, dtype=np.float64)
    except ConfigError:
        raise
    except Exception as error:  # whatever a user's function may raise
        raise ConfigError(KEY, spec, f"gives no weights: {cause(error)}", remedy) from error
    if weights.shape != (len(source),):
        problem = f"has the shape {list(weights.shape)}, and the training set has {len(source)} samples"
        raise ConfigError(KEY, spec, problem, remedy)
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any() or not weights.any():
        first: Any = int(np.flatnonzero(wrong)[0]) if wrong.any() else None
        problem = "are all 0" if first is None else f"is {weights[first]} for sample {first}"
        raise ConfigError(KEY, Unquoted(spec), problem, "give finite numbers of at least 0")
    return (weights / weights.mean()).astype(np.float32)
