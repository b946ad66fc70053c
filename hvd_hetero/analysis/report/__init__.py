"""Report runs: tables, pictures, one page that holds them all."""

from hvd_hetero.analysis.report.write import report

__all__ = ["report"]
