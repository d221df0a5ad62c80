"""Tell a right implementation of a federated method from a wrong one.

``check_method`` runs every check that applies to a method, whoever wrote it, ``conformance`` those of the built-in
methods. ``fedstill.conformance.wrong`` holds variants with a known mistake, each with the check that must catch it.
"""

from fedstill.conformance.findings import Check, DoesNotApply, Finding, Verdict
from fedstill.conformance.runner import check_method, conformance, list_checks

__all__ = ["Check", "DoesNotApply", "Finding", "Verdict", "check_method", "conformance", "list_checks"]
