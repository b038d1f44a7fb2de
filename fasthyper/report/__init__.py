"""What runs look like: a self-contained HTML page, a poster, the accuracy matrix as CSV and all scores as JSON."""

from fasthyper.report.page import write_report
from fasthyper.report.runs import Group, Run, grouped, load_run

__all__ = ["Group", "Run", "grouped", "load_run", "write_report"]
