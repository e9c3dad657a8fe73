"""Hooks: on a machine with a GPU a suite for it of which every test was skipped is a failure. Skips are right where
there is no GPU or no emulator; where there is one they would look like success. conftest.py takes them over."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

SUITES = ("tests/triton/", "tests/native/")

_run: Counter[str] = Counter()
_skipped: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    suite = next((suite for suite in SUITES if suite in report.nodeid), None)
    if suite is None:
        return
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped[suite] += 1
    elif report.when == "call" or report.failed:
        _run[suite] += 1


def idle_suites() -> list[str]:
    """What was skipped altogether, on a machine with a GPU."""
    return [suite for suite in SUITES if torch.cuda.is_available() and _skipped[suite] and not _run[suite]]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if idle_suites() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for suite in idle_suites():
        count = _skipped[suite]
        terminalreporter.write_line(
            f"SKIPPED SUITE {suite}: there is a GPU, and all its {count} tests were skipped; -ra shows why", red=True
        )
