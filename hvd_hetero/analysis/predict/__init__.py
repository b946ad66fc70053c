"""Predict what a run would take from measured speeds, without torch or Horovod: ``hvd-hetero plan``."""

from hvd_hetero.analysis.predict.command import plan

__all__ = ["plan"]
