"""Counts the tracks that jump while they are reported visible: `python examples/jumps.py video.mp4 ...`

A grid of 14 x 14 points of the first frame is tracked through each video by every model. A jump is more than 12 pixels
of a 256x256 raster from one frame to the next; see `tritonkern.tracking.evaluation.jump_share`.
"""

import sys

from tritonkern.tracking import PointTracker
from tritonkern.tracking.evaluation import jump_share

MODELS = ("nano", "chrono-nano")


def main(paths: list[str]) -> None:
    trackers = {model: PointTracker(model) for model in MODELS}
    for path in paths:
        for model, tracker in trackers.items():
            result = tracker(path, grid=14)
            share = jump_share(result.tracks, result.visibility, result.size)
            print(f"{path}: {model}: {share:.1%} of the tracks jump, {result.visibility.mean():.1%} visible")


if __name__ == "__main__":
    main(sys.argv[1:])
