"""``hvd-hetero compare``: many runs that share a budget, in one table."""

from hvd_hetero.analysis.compare.command import compare

__all__ = ["compare"]
