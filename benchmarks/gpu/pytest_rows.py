"""A pytest plugin: every failure is a row as soon as it is known, and the counts are the last one."""

from __future__ import annotations

import collections
import os
from pathlib import Path

from rows import append

_counts: collections.Counter[str] = collections.Counter()


def pytest_runtest_logreport(report):
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.failed:
        message = str(report.longrepr)[-400:]
        append(Path(os.environ["OUT"]), {"part": "tests", "name": f"{report.nodeid} {report.when}", "failed": message})
    if report.when == "call" or report.outcome != "passed":
        _counts[report.outcome] += 1


def pytest_sessionfinish(session, exitstatus):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        append(Path(os.environ["OUT"]), {"part": "tests", "name": "counts", "status": int(exitstatus), **_counts})
