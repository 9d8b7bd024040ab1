"""Scores by how far points move and how often they come back, as DiTracker reports them on ITTO-MOSE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

MOTION = (0.005, 0.015, 0.05)
"""Limits between the bins of `mean_step`, in diagonals of the raster; a limit itself is in the upper bin."""
REAPPEARANCE = (1, 3)
"""Limits between the bins of `reappearances`."""
_NAMES = {
    "motion": ("below 0.005", "0.005 to 0.015", "0.015 to 0.05", "0.05 and above"),
    "reappearance": ("0", "1 or 2", "3 and more"),
}
BIN_METRICS = ("delta_avg", "AJ", "OA")
Bins = dict[str, dict[str, dict[str, float]]]
"""By "motion" and "reappearance", then by the name of the bin: its number of tracks and its `BIN_METRICS`."""


def mean_step(points: np.ndarray, occluded: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Mean distance between consecutive frames in both of which a point is visible, `[N]` float64.

    Args:
        points: `[N, T, 2]` xy in pixels.
        occluded: `[N, T]` bool.
        size: (width, height) of the raster.

    Returns:
        In diagonals of the raster; 0 where there is no such pair of frames.
    """
    step = np.linalg.norm(np.diff(points.astype(np.float64), axis=1), axis=-1) / np.hypot(*size)
    both = ~occluded[:, 1:] & ~occluded[:, :-1]
    return np.where(both, step, 0).sum(axis=1) / np.maximum(both.sum(axis=1), 1)


def reappearances(occluded: np.ndarray) -> np.ndarray:
    """How often a point `[N, T]` is hidden in one frame and visible in the next, `[N]`."""
    return (occluded[:, :-1] & ~occluded[:, 1:]).sum(axis=1)


class TrackScores(NamedTuple):
    """What `mean_of_bins` needs to know of the tracks of one clip."""

    step: np.ndarray
    """[n] by `mean_step`."""
    reappearances: np.ndarray
    """[n] by `reappearances`."""
    metrics: Mapping[str, np.ndarray]
    """[n] each, by `tritonkern.tracking.metrics.track_metrics`."""


def mean_of_bins(clips: Sequence[TrackScores]) -> Bins:
    """Means over the tracks of a bin, of all clips together: every track weighs the same.

    A track whose metric is NaN is left out of the mean of that metric. A bin without tracks has NaN.
    """
    values = {
        "motion": np.digitize(np.concatenate([clip.step for clip in clips]), MOTION),
        "reappearance": np.digitize(np.concatenate([clip.reappearances for clip in clips]), REAPPEARANCE),
    }
    metrics = {name: np.concatenate([clip.metrics[name] for clip in clips]) for name in BIN_METRICS}
    result: Bins = {}
    for kind, number in values.items():
        result[kind] = {}
        for index, title in enumerate(_NAMES[kind]):
            rows = number == index
            result[kind][title] = {"tracks": float(rows.sum())}
            for name, of_tracks in metrics.items():
                defined = of_tracks[rows & ~np.isnan(of_tracks)]
                result[kind][title][name] = float(defined.mean()) if defined.size else float("nan")
    return result
