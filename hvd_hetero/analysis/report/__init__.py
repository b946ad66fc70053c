"""Report runs: tables, pictures, one page that holds them all."""

from hvd_hetero.analysis.report.tables import closing_table, table
from hvd_hetero.analysis.report.write import report

__all__ = ["closing_table", "report", "table"]
