"""Tracks a grid of points in a scene of moving photographs. `make demo` runs this."""

import subprocess
import sys
from pathlib import Path

from tritonkern.files import atomic_path
from tritonkern.tracking.video_writer import VideoWriter
from tritonkern.training import photo_clips

OUT = Path("demo")


def main() -> None:
    OUT.mkdir(exist_ok=True)
    (scene,) = photo_clips(1, frames=48, size=448, points=1, seed=0)
    with atomic_path(OUT / "scene.mp4") as part, VideoWriter(part, fps=12.0) as writer:
        for frame in scene.video:
            writer.write(frame)
    track = [sys.executable, "-m", "tritonkern.cli", "track"]
    subprocess.run([*track, str(OUT / "scene.mp4"), "--grid", "14", "--out", str(OUT)], check=True)
    print(OUT / "overlay.mp4")


if __name__ == "__main__":
    main()
