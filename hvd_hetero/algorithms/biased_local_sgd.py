"""System-aware biased local SGD ("Biased Local SGD for Efficient Deep Learning on Heterogeneous Systems", Algorithm 1).

A round, on worker i of class g, from the common model x::

    x_i = x
    repeat tau_g times:                 # tau_g = max(1, round(tau_fast * t_fast / t_g)), and see train.tau_margin
        draw a mini-batch of B_g samples from the worker's share of the epoch
        x_i = x_i - lr * gradient(x_i)
    x = sum_i w_i x_i                   # w_i = tau_i / sum_j tau_j (eq. 4): faster workers weigh more

At the start of an epoch the fast class is given floor(p N_fast) samples of the highest last known losses and others at
random; every other class draws uniformly from all samples. Each bias can be switched off: ``sampling.scheme=uniform``
or ``sampling.high_loss_ratio=0``, ``aggregation.weights=uniform``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

from hvd_hetero.algorithms.local_sgd import LocalSGD


@final
class BiasedLocalSGD(LocalSGD):
    """Hard samples to the fast class, weights by local steps."""

    defaults: ClassVar[Mapping[str, str]] = {"sampling.scheme": "separate", "aggregation.weights": "steps"}
