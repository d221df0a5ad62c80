"""Tables and pictures that compare runs."""

from fedstill.report.curves import draw_curves
from fedstill.report.table import Bound, Curve, markdown, reading, rich_table

__all__ = ["Bound", "Curve", "draw_curves", "markdown", "reading", "rich_table"]
