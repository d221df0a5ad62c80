"""What all tests share: one thread, the reference cases' count in the summary."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "golden"))
torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many reference cases ran and what the others wait for."""
    ran = {
        report.nodeid
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if "test_golden.py::test_case[" in report.nodeid and report.when == "call"
    }
    if ran:
        from test_golden import summary

        terminalreporter.write_line(summary(len(ran)))
