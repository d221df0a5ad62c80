"""The numbers of released code: how each recorded case is replayed with a subject.

Importing this package fills the table ``REPLAYS``.
"""

from fedstill.conformance.replays import averaging, feddf, feddyn, fedftg, fedgen, fedmd, moon, partitions, scaffold
from fedstill.conformance.replays.registry import OWN, REPLAYS, Case, Disagrees, Replay, folder

MODULES = (averaging, scaffold, feddyn, moon, fedgen, fedmd, fedftg, feddf, partitions)
"""Where replays are defined."""

__all__ = ["MODULES", "OWN", "REPLAYS", "Case", "Disagrees", "Replay", "folder"]
