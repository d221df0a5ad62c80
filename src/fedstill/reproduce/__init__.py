"""The papers' tables and figures: their numbers, and the runs that make ours beside them.

A *reproduction* is a study (:mod:`fedstill.studies`) whose settings and variants are those of a paper's table.
"""

from fedstill.reproduce.engine import Plan, carry_out
from fedstill.reproduce.sheet import Sheet
from fedstill.reproduce.tables import list_tables, load_table

__all__ = ["Plan", "Sheet", "carry_out", "list_tables", "load_table"]
