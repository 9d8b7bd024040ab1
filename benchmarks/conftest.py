"""The `compare` fixture, and the table that it prints at the end.

Works with and without the pytest-benchmark plugin. `--record` appends rows to results/<device>.jsonl.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import subprocess
from pathlib import Path

import measure
import pytest
import torch

RESULTS = Path(__file__).parent / "results"
_rows = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="append the measured rows to benchmarks/results/")


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
    `targets` says for some peers how many times the package's time they are meant to take; `ulps` how many units in the
    last place of the largest value a peer may be off by.
    """

    def run(op, shape, dtype, direction, calls, moved, flops, targets=None, ulps=16):
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

        job = {"op": op, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "direction": direction}
        rows = request.config.stash[_rows]
        for name, timing in timings.items():
            rows.append(job | {"backend": name} | timing._asdict())
            rows[-1] |= {"first_call": first_calls[name], "peak_memory": measure.peak_memory(calls[name], device)}
            rows[-1] |= {"bytes": moved, "flops": flops, "floor": floor, "over_ours": ratios[name]}
            rows[-1] |= {"target": (targets or {}).get(name)}
        rows.extend(job | {"backend": name, "failed": reason} for name, reason in failures.items())
        if benchmark is not None:
            benchmark.extra_info.update(ratios)
            benchmark.pedantic(calls[ours], rounds=5, warmup_rounds=1)

    return run


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[_rows]
    if not rows:
        return
    write = terminalreporter.write_line
    device = "cuda" if torch.cuda.is_available() else "cpu"
    terminalreporter.section("medians of interleaved runs")
    write(f"{measure.device_name(device)}: copies {measure.copy_bandwidth(device) / 1e9:.1f} GB/s, read plus written")
    write("ratio: time over this package's (above 1: the package is faster); target: what it is meant to be")
    write("floor: the larger of bytes / copy bandwidth and FLOPs / matmul rate, over the time")
    job = None
    for row in rows:
        if job != (job := tuple(row[key] for key in ("op", "direction", "shape", "dtype"))):
            write("\n" + " ".join(str(part) for part in job))
            write(f"  {'':25}      ms   ratio  target   floor    GB/s TFLOP/s  peak MiB  first ms")
        if "failed" in row:
            write(f"  {row['backend']:25} cannot run: {row['failed']}")
            continue
        target = f"{row['target']:g}" if row["target"] else ""
        memory = "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.1f}"
        write(
            f"  {row['backend']:25}{row['median'] * 1e3:8.3f}{row['over_ours']:8.2f}{target:>8}"
            f"{row['floor'] / row['median']:8.1%}{row['bytes'] / row['median'] / 1e9:8.1f}"
            f"{row['flops'] / row['median'] / 1e12:8.3f}{memory:>10}{row['first_call'] * 1e3:10.1f}"
        )
    if config.getoption("--record"):
        path = RESULTS / f"{measure.device_name(device)}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with open(path, "a") as file:
            file.writelines(json.dumps(row | _provenance()) + "\n" for row in rows if "failed" not in row)
        write(f"\nappended to {path}")


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
