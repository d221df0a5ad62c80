"""The report: a study, or loose runs, as one HTML file, with its figures as SVG and PDF beside it."""

from fedstill.report.html.write import write_report

__all__ = ["write_report"]
