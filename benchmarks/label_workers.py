"""Clips per second of `tritonkern label` with one and two workers in turn, and resident memory over many clips.

python benchmarks/label_workers.py speed [CLIPS] [ROUNDS]     # OMP_NUM_THREADS=1: one thread in each process
python benchmarks/label_workers.py memory [CLIPS]             # MiB of the driver and of its worker, clip by clip
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tritonkern.tracking import VideoWriter
from tritonkern.tracking.label_workers import label_in_processes
from tritonkern.tracking.labels import Clip, LabelFolder, LabelOptions
from tritonkern.training.synthetic import generate_clip

GRID = 10


def label(base: Path, count: int, workers: int, options: LabelOptions, finished: Callable[[Clip], None]) -> None:
    with tempfile.TemporaryDirectory(dir=base) as out, LabelFolder(Path(out) / "labels", options) as folder:
        clips = [Clip(str(number), "clip.mp4", "") for number in range(count)]
        label_in_processes(clips, base, folder, options, workers, finished)
        folder.finish()


def rate(base: Path, count: int, workers: int) -> float:
    """Clips per second between the first clip of each worker, which waits for the model, and the last one."""
    times: list[float] = []
    label(base, count, workers, LabelOptions(grid=GRID), lambda clip: times.append(time.perf_counter()))
    return (count - workers) / (times[-1] - times[workers - 1])


def speed(base: Path, count: int = 17, rounds: int = 3) -> None:
    ratios = []
    for _ in range(rounds):
        one, two = rate(base, count, 1), rate(base, count, 2)
        ratios.append(two / one)
        print(f"one worker {one:.2f} clips/s, two {two:.2f}, ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}; threads in all {os.environ.get('OMP_NUM_THREADS', 'all')}")


def resident(process: int | str) -> float:
    """MiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(base: Path, count: int = 500) -> None:
    rows: list[tuple[float, float]] = []

    def finished(clip: Clip) -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        rows.append((resident("self"), max(map(resident, children))))

    label(base, count, 1, LabelOptions(grid=4), finished)
    for number in sorted({0, *range(0, count, max(1, count // 10)), count - 1}):
        print("clip {}: driver {:.0f} MiB, worker {:.0f} MiB".format(number, *rows[number]))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        frames = 24 if sys.argv[1] == "speed" else 4
        with VideoWriter(Path(name) / "clip.mp4", 24) as writer:
            for frame in generate_clip(0, frames=frames, points=1).video:
                writer.write(frame)
        {"speed": speed, "memory": memory}[sys.argv[1]](Path(name), *map(int, sys.argv[2:]))
