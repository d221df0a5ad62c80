"""Studies: many runs from one file, and what they say."""

from fedstill.studies.plan import Cell, Study
from fedstill.studies.search import search
from fedstill.studies.sweep import Outcome, sweep

__all__ = ["Cell", "Outcome", "Study", "search", "sweep"]
