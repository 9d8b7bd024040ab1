"""Peak memory of `tritonkern track` on a file: `python benchmarks/track_memory.py MODEL FRAMES [GRID]`.

The video has 160x120 pixels and is generated. The command runs in a process of its own, whose resident memory (all, and
without the pages of mapped files) is read from /proc. It also prints when the first tracks were on the disk.

MODEL is a name, or colours: a tracker with the spans of nano, whose features are mean colours, so that ten thousand
frames take a minute.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from tritonkern.models.matching import MatchingTracker
from tritonkern.tracking import VideoWriter, predictor


class Colours(MatchingTracker):
    resolution, span, context = (256, 256), 112, 24

    def features(self, video: Tensor) -> Tensor:
        cells = F.avg_pool2d(video.flatten(0, 1).movedim(-1, 1), 8).movedim(1, -1)
        return F.normalize(cells, dim=-1).unflatten(0, video.shape[:2])


def write_video(path: Path, frames: int) -> None:
    """Smooth noise under a camera that wanders about."""
    random = np.random.default_rng(0)
    small = random.integers(0, 255, (40, 48, 3), dtype=np.uint8)
    picture = small.repeat(8, 0).repeat(8, 1)
    with VideoWriter(path, 24) as writer:
        for t in range(frames):
            x, y = round(100 + 80 * np.sin(t / 40)), round(90 + 70 * np.sin(t / 31))
            writer.write(np.ascontiguousarray(picture[y : y + 120, x : x + 160]))


def memory(process: int) -> dict[str, int]:
    """KiB by name."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmHWM", "RssAnon"))}


def main(model: str, frames: int, grid: int = 10) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_video(folder / "video.mp4", frames)
        options = ["--model", model, "--grid", str(grid), "--out", str(folder / "out"), "--no-report"]
        command = [sys.executable, __file__, "track", str(folder / "video.mp4"), *options]
        start = time.perf_counter()
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE)
        most: dict[str, int] = {}
        first = None
        while process.poll() is None:
            most = {name: max(size, most.get(name, 0)) for name, size in memory(process.pid).items()} or most
            if first is None and any(path.stat().st_size > 100 for path in folder.glob("out/.*.part")):
                first = time.perf_counter() - start
            time.sleep(0.1)
        assert process.returncode == 0 and process.stdout is not None
        seconds, sizes = time.perf_counter() - start, {name: size / 1024 for name, size in most.items()}
        print(
            f"{model}, {frames} frames, {grid * grid} points: peak {sizes['VmHWM']:.0f} MiB, of which at most", end=" "
        )
        print(f"{sizes['RssAnon']:.0f} are not files; first tracks after {first:.0f} of {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "track":
        from tritonkern.cli import main as command_line

        build = predictor.build_model
        predictor.build_model = lambda name, weights=None: Colours() if name == "colours" else build(name, weights)
        command_line()
    main(sys.argv[1], *map(int, sys.argv[2:]))
