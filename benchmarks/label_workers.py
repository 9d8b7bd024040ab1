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


def rates(base: Path, count: int, workers: int) -> tuple[float, float]:
    """Clips per second, and processor seconds of the workers per clip, after each worker's first clip, which waits for
    the model.
    """
    times: list[tuple[float, float]] = []
    used: dict[str, float] = {}  # also of workers that have ended

    def finished(clip: Clip) -> None:
        used.update({process: processor_seconds(process) for process in workers_of_this_process()})
        times.append((time.perf_counter(), sum(used.values())))

    label(base, count, workers, LabelOptions(grid=GRID), finished)
    (start, before), (end, after) = times[workers - 1], times[-1]
    return (count - workers) / (end - start), (after - before) / (count - workers)


def speed(base: Path, count: int = 17, rounds: int = 3) -> None:
    """A busy machine gives the two workers less than two cores: then the processor time per clip says more."""
    ratios, work = [], []
    for _ in range(rounds):
        (one, seconds), (two, both) = rates(base, count, 1), rates(base, count, 2)
        ratios.append(two / one)
        work.append(both / seconds)
        print(f"one worker {one:.2f} clips/s, two {two:.2f}; processor time per clip {seconds:.2f} and {both:.2f} s")
        print(f"ratio {ratios[-1]:.2f}, processor time of two {work[-1]:.2f} times that of one", flush=True)
    print(f"medians: ratio {statistics.median(ratios):.2f}, processor time {statistics.median(work):.2f}")


def workers_of_this_process() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def processor_seconds(process: str) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(process: int | str) -> float:
    """MiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(base: Path, count: int = 500) -> None:
    done = 0

    def finished(clip: Clip) -> None:
        nonlocal done
        done += 1
        if done == 1 or done % 25 == 0:
            worker = max(map(resident, workers_of_this_process()))
            print(f"{done} clips: driver {resident('self'):.0f} MiB, worker {worker:.0f} MiB", flush=True)

    label(base, count, 1, LabelOptions(grid=2), finished)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        frames = 24 if sys.argv[1] == "speed" else 2
        with VideoWriter(Path(name) / "clip.mp4", 24) as writer:
            for frame in generate_clip(0, frames=frames, points=1).video:
                writer.write(frame)
        {"speed": speed, "memory": memory}[sys.argv[1]](Path(name), *map(int, sys.argv[2:]))
