"""Prints recorded rows, one table per job, default and tuned allocator side by side.

python benchmarks/table.py build/benchmark-rows.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

HEADER = """ratio: time over this package's time (above 1: the package is faster), both under the same allocator
floor: the larger of bytes / copy bandwidth and FLOPs / matrix product rate, over the time
default, tuned: allocators, see docs/backends.md"""


def lines(rows: Iterable[Row]) -> Iterator[str]:
    """The table of `rows`; of several rows for the same measurement the last one is shown."""
    jobs: dict[tuple[str, ...], dict[str, dict[str, Row]]] = {}
    for row in rows:
        job = tuple(str(row[key]) for key in ("op", "direction", "shape", "dtype"))
        jobs.setdefault(job, {}).setdefault(row["backend"], {})[row["allocator"]] = row
    yield from HEADER.splitlines()
    for job, backends in jobs.items():
        yield ""
        yield " ".join(job)
        yield f"  {'':27}{'default ms':>11}{'ratio':>7}{'tuned ms':>11}{'ratio':>7}{'floor':>8} peak MiB  first ms"
        for backend, by_allocator in backends.items():
            yield f"  {backend:27}" + _cells(by_allocator)


def _cells(by_allocator: dict[str, Row]) -> str:
    failed = next((row["failed"] for row in by_allocator.values() if "failed" in row), None)
    if failed is not None:
        return f"cannot run: {failed}"
    text = ""
    for allocator in ("default", "tuned"):
        row = by_allocator.get(allocator)
        text += f"{row['median'] * 1e3:11.3f}{row['over_ours']:7.2f}" if row else f"{'-':>11}{'-':>7}"
    row = by_allocator.get("default") or by_allocator["tuned"]
    memory = "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.1f}"
    return f"{text}{row['floor'] / row['median']:8.1%}{memory:>9}{row['first_call'] * 1e3:10.1f}"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    recorded = (json.loads(line) for name in sys.argv[1:] for line in Path(name).read_text().splitlines())
    print("\n".join(lines(row for row in recorded if "allocator" in row)))
