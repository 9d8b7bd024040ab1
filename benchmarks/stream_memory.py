"""Resident memory of a stream, with points added and removed at random: `stream_memory.py FIRST LAST EVERY [PLOT]`.

Prints the frame and the resident bytes, of frames FIRST to LAST, every EVERY frames, and draws them if PLOT is given.
The last number is what is resident once glibc has returned the free memory that it keeps (`malloc_trim`).
The model is a Chrono with small random weights: what a stream keeps (rings, statistics, features of frames, points) is
there, and a frame takes milliseconds.
"""

import ctypes
import sys

import numpy as np
import torch

from tritonkern.models import Chrono
from tritonkern.models.dinov2 import DINOv2Config
from tritonkern.tracking import PointTracker

SIZE = (24, 20)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def trimmed() -> int:
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident()


def measure(first: int, last: int, every: int) -> list[tuple[int, int]]:
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    clip = random.integers(0, 255, (50, SIZE[1], SIZE[0], 3), dtype=np.uint8)
    model = Chrono(DINOv2Config(32, 3, 2, grid=2), hidden=32)
    model.cells = 4
    stream = PointTracker(model, device="cpu").stream(lookahead=3, max_points=50)
    rows = []
    for number in range(last + 1):
        if random.random() < 0.1 and len(stream.ids) < 40:
            points = random.random((random.integers(1, 10), 2)) * SIZE
            stream.add(points, frame=max(stream.oldest_frame, number - 2))
        ids = stream.ids
        if len(ids) > 30 or (len(ids) and random.random() < 0.15):
            stream.remove(random.choice(ids, min(len(ids), 3), replace=False))
        stream.step(clip[number % len(clip)])
        if number >= first and (number - first) % every == 0:
            rows.append((number, resident()))
            print(*rows[-1], trimmed(), flush=True)
    return rows


def draw(rows: list[tuple[int, int]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    frames, sizes = np.array(rows).T
    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    axes.plot(frames, sizes / 2**20)
    axes.axhspan(sizes[0] * 0.98 / 2**20, sizes[0] * 1.02 / 2**20, alpha=0.15, label="2 % about the first one")
    axes.set(xlabel="frame", ylabel="resident MiB", ylim=(0, 1.2 * sizes.max() / 2**20))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    measured = measure(*map(int, sys.argv[1:4]))
    if len(sys.argv) > 4:
        draw(measured, sys.argv[4])
