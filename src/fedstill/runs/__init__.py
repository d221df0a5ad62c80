"""Run directories, checkpoints and their files."""

from fedstill.runs.checkpoint import CheckpointStore
from fedstill.runs.directory import RunDirectory
from fedstill.runs.metrics import read_metrics

__all__ = ["CheckpointStore", "RunDirectory", "read_metrics"]
