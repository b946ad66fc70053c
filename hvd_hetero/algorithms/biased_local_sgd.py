"""System-aware biased local SGD ("Biased Local SGD for Efficient Deep Learning on Heterogeneous Systems", Algorithm 1).

A round, on worker i of class g, from the common model x::

    x_i = x
    repeat tau_g times:                 # tau_g = max(1, round(tau_fast * t_fast / t_g)), and see train.tau_margin
        draw a mini-batch of B_g samples from the worker's share of the epoch
        x_i = x_i - lr * gradient(x_i)
    x = sum_i w_i x_i                   # w_i = tau_i / sum_j tau_j (eq. 4): faster workers weigh more

Where ``train.tau=auto`` chooses the length of rounds, weights are ``normalised`` unless they are set, so that every
gradient counts the same: in short rounds that was the best of all weights on each of our tasks (docs/findings.md).

At the start of an epoch the fast class is given floor(p N_fast) samples of the highest last known losses and others at
random; every other class draws uniformly from all samples. Each bias can be switched off: ``sampling.scheme=uniform``
or ``sampling.high_loss_ratio=0``, ``aggregation.weights=uniform``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

from hvd_hetero.algorithms.local_sgd import BLOCKING, LocalSGD
from hvd_hetero.config.schema import AUTO
from hvd_hetero.planning.local_steps import WAIT_AVOIDING
from hvd_hetero.planning.plan import BY_STEPS, NORMALISED


@final
class BiasedLocalSGD(LocalSGD):
    """Give the hard samples to the fast class, and weights by local steps."""

    defaults: ClassVar[Mapping[str, str]] = {"sampling.scheme": "separate", "aggregation.weights": BY_STEPS}

    @classmethod
    def defaults_for(cls, settings: Mapping[str, Any]) -> Mapping[str, str]:
        """Return the paper's biases; with ``train.tau=auto`` and ranks that are waited for, normalised weights."""
        sections = [settings[name] for name in ("train", "aggregation", "cluster")]
        if not all(isinstance(section, Mapping) for section in sections):
            return cls.defaults
        train, aggregation, cluster = sections
        waits = aggregation["mode"] == BLOCKING and cluster["too_slow"] != WAIT_AVOIDING
        chosen = train["tau"] == AUTO and waits and aggregation["anneal_from"] is None
        return {**cls.defaults, "aggregation.weights": NORMALISED} if chosen else cls.defaults
