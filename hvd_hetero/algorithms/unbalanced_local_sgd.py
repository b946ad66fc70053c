"""Unbalanced local SGD, unbiased: local steps by speed, otherwise local SGD as ever (the baseline of "Biased Local SGD
for Efficient Deep Learning on Heterogeneous Systems").

A round, on worker i of class g among m workers, from the common model x::

    x_i = x
    repeat tau_g times:                 # tau_g = max(1, round(tau_fast * t_fast / t_g)), and see train.tau_margin
        draw a mini-batch of B_g samples from the worker's share of the epoch
        x_i = x_i - lr * gradient(x_i)
    x = (1/m) sum_i x_i                 # a rank with fewer steps counts as much

Samples are drawn uniformly, without replacement over all classes. With equal tau it is balanced local SGD.
"""

from __future__ import annotations

from typing import final

from hvd_hetero.algorithms.local_sgd import LocalSGD


@final
class UnbalancedLocalSGD(LocalSGD):
    """Give local steps by speed, uniform samples, and all models the same weight."""
