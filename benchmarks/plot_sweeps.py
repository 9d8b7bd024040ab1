"""Plots time and memory of an operation and of its eager form over two sizes, from recorded rows.

pytest benchmarks/test_correlation_soft_argmax.py -k sweep --record
pytest benchmarks/test_track_attention.py -k growth --record
python benchmarks/plot_sweeps.py benchmarks/results/DEVICE.jsonl docs
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

QUANTITIES = (
    ("time in s", lambda row: row["median"]),
    ("peak memory in MiB", lambda row: row["peak_memory"] / 2**20),
)


class Sweep(NamedTuple):
    """One picture."""

    file: str
    op: str
    lines: dict[tuple[str, str], tuple[str, str]]
    """(backend, direction) of a row -> label and style."""
    axes: dict[str, Callable[[list[int]], int | None]]
    """What a column of the picture goes over -> where a row of this shape stands in it, if it does."""
    title: str


SWEEPS = [
    Sweep(
        "correlation-sweep.png",
        "correlation_soft_argmax",
        {("eager", "forward"): ("eager", "s--"), ("tritonkern", "forward"): ("tritonkern", "o-")},
        {
            "queries, 64 x 64 cells": lambda s: s[0] if (s[1], s[2], s[4]) == (24, 64, 384) else None,
            "rows and columns of the grid, 64 queries": lambda s: s[2] if (s[0], s[1], s[4]) == (64, 24, 384) else None,
        },
        "Forward, float32, 24 frames, 384 channels",
    ),
    Sweep(
        "track-attention-sweep.png",
        "track_attention",
        {
            ("SDPA + stored bias", "sample"): ("sample, SDPA with its bias stored", "s--"),
            ("SDPA + stored bias", "splat"): ("splat, SDPA with its bias stored", "^--"),
            ("tritonkern", "sample"): ("sample, tritonkern", "o-"),
            ("tritonkern", "splat"): ("splat, tritonkern", "d-"),
        },
        {
            "tracks, 64 x 64 cells": lambda s: s[1] if (s[0], s[2], s[4], s[5]) == (1, 64, 8, 32) else None,
            "rows and columns of the grid, 576 tracks": lambda s: s[2] if (*s[:2], *s[4:]) == (1, 576, 8, 32) else None,
        },
        "Forward, float32, 1 frame, 8 heads of 32, sigma 1/2",
    ),
]


def plot(sweep: Sweep, rows: list[dict], device: str, folder: Path) -> None:
    kind = (sweep.op, "float32", "default")
    rows = [row for row in rows if (row["op"], row["dtype"], row["allocator"]) == kind and "median" in row]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for column, (label, position) in enumerate(sweep.axes.items()):
        for (backend, direction), (name, style) in sweep.lines.items():
            # The latest row of each shape.
            points = {
                position(row["shape"]): row
                for row in rows
                if (row["backend"], row["direction"]) == (backend, direction) and position(row["shape"]) is not None
            }
            places = sorted(points)
            for line, (_, quantity) in enumerate(QUANTITIES):
                values = [quantity(points[place]) for place in places]
                axes[line][column].loglog(places, values, style, label=name)
                if backend == "tritonkern":  # the last, and measured everywhere
                    axes[line][column].set_xticks(places, [str(place) for place in places])
                    axes[line][column].minorticks_off()
        axes[1][column].set_xlabel(label)
    for line, (label, _) in enumerate(QUANTITIES):
        axes[line][0].set_ylabel(label)
    axes[0][0].legend()
    figure.suptitle(f"{sweep.title}: {device}")
    figure.savefig(folder / sweep.file, dpi=110)


def main(rows_path: str, folder: str) -> None:
    rows = [json.loads(line) for line in Path(rows_path).read_text().splitlines()]
    for sweep in SWEEPS:
        plot(sweep, rows, Path(rows_path).stem, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
