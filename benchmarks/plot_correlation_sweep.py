"""Plots time and memory of `correlation_soft_argmax` and of eager over queries and grid size, from recorded rows.

pytest benchmarks/test_correlation_soft_argmax.py -k sweep --record
python benchmarks/plot_correlation_sweep.py benchmarks/results/DEVICE.jsonl docs/correlation-sweep.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FRAMES, CHANNELS = 24, 384


def main(rows_path: str, picture: str) -> None:
    latest = {}
    for line in Path(rows_path).read_text().splitlines():
        row = json.loads(line)
        if (row["op"], row["direction"], row["dtype"]) == ("correlation_soft_argmax", "forward", "float32"):
            latest[(row["backend"], *row["shape"])] = row

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    sweeps = (
        ("queries, 64 x 64 cells", lambda n, rows: n if rows == 64 else None),
        ("rows and columns of the grid, 64 queries", lambda n, rows: rows if n == 64 else None),
    )
    quantities = (
        ("time in s", lambda row: row["median"]),
        ("peak memory in MiB", lambda row: row["peak_memory"] / 2**20),
    )
    for column, (label, position) in enumerate(sweeps):
        for backend, style in (("eager", "s--"), ("tritonkern", "o-")):
            points = {
                position(n, rows): row
                for (name, n, frames, rows, _, channels), row in latest.items()
                if (name, frames, channels) == (backend, FRAMES, CHANNELS) and position(n, rows) is not None
            }
            places = sorted(points)
            for line, (_, quantity) in enumerate(quantities):
                values = [quantity(points[place]) for place in places]
                axes[line][column].loglog(places, values, style, label=backend)
                if backend == "tritonkern":  # the last, and measured everywhere
                    axes[line][column].set_xticks(places, [str(place) for place in places])
                    axes[line][column].minorticks_off()
        axes[1][column].set_xlabel(label)
    for line, (label, _) in enumerate(quantities):
        axes[line][0].set_ylabel(label)
    axes[0][0].legend()
    figure.suptitle(f"Forward, float32, {FRAMES} frames, {CHANNELS} channels: {Path(rows_path).stem}")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
