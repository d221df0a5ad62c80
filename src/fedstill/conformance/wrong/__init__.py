"""Deliberately wrong methods, each with the check that must catch it: the suite's own proof.

A function in these files makes a method with one mistake from a configuration; its docstring says what the mistake is.
Many of them have been made in public implementations. Importing this package fills the table ``WRONG``.
"""

from fedstill.conformance.wrong import averaging, feddf, feddistill, feddyn, fedftg, fedgen, fedmd, moon, scaffold
from fedstill.conformance.wrong.registry import WRONG, Wrong

MODULES = (averaging, scaffold, feddyn, moon, fedgen, feddistill, fedmd, fedftg, feddf)
"""Where wrong methods are defined."""

__all__ = ["MODULES", "WRONG", "Wrong"]
