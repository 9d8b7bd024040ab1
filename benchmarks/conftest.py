"""The `compare` fixture, and the table that it prints at the end.

Works with and without the pytest-benchmark plugin. `--record` appends rows to results/<device>.jsonl.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import subprocess
from pathlib import Path

import measure
import pytest
import table
import torch

RESULTS = Path(__file__).parent / "results"
_rows = pytest.StashKey[list]()
# Of one benchmark, on two cores: the mean over the whole suite.
_SECONDS = 25


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="append the measured rows to benchmarks/results/")
    parser.addoption("--rows", metavar="FILE", help="append the measured rows to FILE")


def pytest_configure(config):
    config.stash[_rows] = []
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(_WithoutPlugin())


class _WithoutPlugin:
    """Stands in for pytest-benchmark on a machine that has pytest alone."""

    @pytest.fixture
    def benchmark(self):
        return None


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def compare(request, device, benchmark):
    """`compare(op, shape, dtype, direction, calls, ...)` checks that all calls agree, times them, and keeps the rows.

    The first of `calls` is this package. `moved` and `flops` are the least bytes and FLOPs that the job needs;
    `ulps` is how many units in the last place of the largest value a peer may be off by.
    """

    def run(op, shape, dtype, direction, calls, moved, flops, ulps=16):
        # A call that cannot run here, such as a backward pass that a peer lacks, is named in the table and left out.
        ours = next(iter(calls))
        results, first_calls, failures = {}, {}, {}
        for name, call in calls.items():
            try:
                first_calls[name] = measure.seconds_of(call, device)
                results[name] = call()
            except Exception as error:
                if name == ours:
                    raise
                failures[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"
        measure.assert_agree(results, ulps)
        timings = measure.interleaved({name: calls[name] for name in results}, device)
        ratios = {name: timing.median / timings[ours].median for name, timing in timings.items()}
        floor = max(moved / measure.copy_bandwidth(device), flops / measure.matmul_rate(device, dtype))

        job = {"op": op, "shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "direction": direction}
        job["allocator"] = measure.allocator()
        rows = request.config.stash[_rows]
        for name, timing in timings.items():
            rows.append(job | {"backend": name} | timing._asdict())
            rows[-1] |= {"first_call": first_calls[name], "peak_memory": measure.peak_memory(calls[name], device)}
            rows[-1] |= {"bytes": moved, "flops": flops, "floor": floor, "over_ours": ratios[name]}
        rows.extend(job | {"backend": name, "failed": reason} for name, reason in failures.items())
        if benchmark is not None:
            benchmark.extra_info.update(ratios)
            benchmark.pedantic(calls[ours], rounds=5, warmup_rounds=1)

    return run


def pytest_collection_finish(session):
    if session.items:
        minutes = len(session.items) * _SECONDS / 60
        print(
            f"{len(session.items)} benchmarks, about {minutes:.0f} minutes; {measure.allocator()} allocator; each "
            "checks that this package and its peers agree, then times them in turn"
        )


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[_rows]
    if not rows:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [row | _provenance() for row in rows]
    files = [Path(file) for file in [config.getoption("--rows")] if file]
    if config.getoption("--record"):
        files.append(RESULTS / f"{measure.device_name(device)}.jsonl")
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    terminalreporter.section("medians of interleaved runs")
    bandwidth = measure.copy_bandwidth(device) / 1e9
    terminalreporter.write_line(f"{measure.device_name(device)}: copies {bandwidth:.1f} GB/s, read plus written")
    for line in table.lines(rows):
        terminalreporter.write_line(line)
    for path in files:
        terminalreporter.write_line(f"appended to {path}")


@functools.cache
def _provenance():
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    commit = subprocess.run(
        ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"torch": torch.__version__, "triton": triton, "commit": commit or None, "date": date}
