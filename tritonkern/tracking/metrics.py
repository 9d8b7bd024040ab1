"""The TAP-Vid metrics: position accuracy, Jaccard and occlusion accuracy of point tracks.

Doersch et al., "TAP-Vid: A Benchmark for Tracking Any Point in a Video", NeurIPS 2022 Datasets and Benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

QUERY_MODES = ("first", "strided")
THRESHOLDS = (1, 2, 4, 8, 16)


def tapvid_metrics(
    query_frames: np.ndarray,
    occluded: np.ndarray,
    points: np.ndarray,
    predicted_occluded: np.ndarray,
    predicted_points: np.ndarray,
    mode: str,
) -> dict[str, float]:
    """Scores the tracks of one video, in percent.

    Let E be the evaluated (query, frame) pairs: `t > query frame` in mode "first", `t != query frame` in mode
    "strided". With v the true and u the predicted visibility, and w_x = (squared distance < x^2) in pixels of a
    256x256 raster, all sums running over E:

        delta_x   = sum v w_x / sum v                                     delta_avg = mean over x in 1, 2, 4, 8, 16
        jaccard_x = sum v u w_x / (sum v + sum u (not v or not w_x))      AJ        = mean over x
        OA        = sum [u = v] / |E|

    delta ignores the predicted visibility. A metric whose denominator is 0 is NaN: delta when no evaluated point is
    visible, AJ when none is predicted visible either, OA when nothing is evaluated. A predicted point that is NaN is
    wrong at every threshold.

    Args:
        query_frames: [N] frame of each query, rounded to the nearest frame.
        occluded: [N, T] bool, the truth.
        points: [N, T, 2] xy in pixels of the 256x256 raster, the truth; read only where not occluded.
        predicted_occluded: [N, T] bool.
        predicted_points: [N, T, 2] xy in the same pixels.
        mode: "first" or "strided".

    Returns:
        {"delta_avg", "AJ", "OA", "delta_1" ... "delta_16", "jaccard_1" ... "jaccard_16"}, each 0 to 100 or NaN.

    Raises:
        ValueError, TypeError: an unknown mode, shapes that do not fit together, visibilities that are not bool, or a
            query frame outside the video.
    """
    counts = _counts(query_frames, occluded, points, predicted_occluded, predicted_points, mode)
    return {name: float(value) for name, value in _percentages(*(count.sum(axis=-1) for count in counts)).items()}


def track_metrics(
    query_frames: np.ndarray,
    occluded: np.ndarray,
    points: np.ndarray,
    predicted_occluded: np.ndarray,
    predicted_points: np.ndarray,
    mode: str,
) -> dict[str, np.ndarray]:
    """`tapvid_metrics` of every query by itself: each metric is `[N]`, NaN where its denominator is 0."""
    return _percentages(*_counts(query_frames, occluded, points, predicted_occluded, predicted_points, mode))


def _counts(
    query_frames: np.ndarray,
    occluded: np.ndarray,
    points: np.ndarray,
    predicted_occluded: np.ndarray,
    predicted_points: np.ndarray,
    mode: str,
) -> tuple[np.ndarray, ...]:
    """The arguments of `_percentages` for every query, their last axis N."""
    query_frames = _checked(query_frames, occluded, points, predicted_occluded, predicted_points, mode)
    frames = np.arange(occluded.shape[1])
    after_query = frames - query_frames[:, None]
    evaluated = after_query > 0 if mode == "first" else after_query != 0

    visible = ~occluded & evaluated
    predicted_visible = ~predicted_occluded & evaluated
    squared_distance = np.square(predicted_points.astype(np.float64) - points).sum(axis=-1)
    # [threshold, N, T]
    within = squared_distance < np.square(np.array(THRESHOLDS, dtype=np.float64))[:, None, None]
    agreeing = (predicted_occluded == occluded) & evaluated
    counted = (
        visible,
        visible & within,
        visible & predicted_visible & within,
        predicted_visible & ~(visible & within),
        agreeing,
        evaluated,
    )
    return tuple(x.sum(axis=-1) for x in counted)


def _percentages(
    visible: np.ndarray,
    correct: np.ndarray,
    true_positives: np.ndarray,
    false_positives: np.ndarray,
    agreeing: np.ndarray,
    evaluated: np.ndarray,
) -> dict[str, np.ndarray]:
    """The metrics of numbers of frames; `correct` and both `positives` have the thresholds in front."""
    delta = _percent(correct, visible)
    jaccard = _percent(true_positives, visible + false_positives)
    return {
        "delta_avg": delta.mean(axis=0),
        "AJ": jaccard.mean(axis=0),
        "OA": _percent(agreeing, evaluated),
        **{f"delta_{x}": value for x, value in zip(THRESHOLDS, delta, strict=True)},
        **{f"jaccard_{x}": value for x, value in zip(THRESHOLDS, jaccard, strict=True)},
    }


def mean_metrics(videos: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Score of a data set: the plain mean over its videos of each metric of `tapvid_metrics`.

    Every video weighs the same, however many points it has. A video in which a metric is NaN is left out of that
    metric's mean; a metric that is NaN in every video stays NaN.

    Raises:
        ValueError: there is no video.
    """
    rows = list(videos)
    if not rows:
        raise ValueError("videos is empty: there is nothing to average")
    means = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        values = values[~np.isnan(values)]
        means[name] = float(values.mean()) if values.size else float("nan")
    return means


def _percent(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    nothing = np.full(numerator.shape, np.nan)
    return np.divide(100.0 * numerator, denominator, out=nothing, where=denominator > 0)


def _checked(
    query_frames: np.ndarray,
    occluded: np.ndarray,
    points: np.ndarray,
    predicted_occluded: np.ndarray,
    predicted_points: np.ndarray,
    mode: str,
) -> np.ndarray:
    """Validates the arguments of `tapvid_metrics`; returns the query frames as integers."""
    if mode not in QUERY_MODES:
        raise ValueError(f'mode must be "first" or "strided", got {mode!r}')
    if occluded.ndim != 2:
        raise ValueError(f"occluded must have shape [N, T], got {list(occluded.shape)}")
    n, t = occluded.shape
    expected = {
        "query_frames": (query_frames, (n,)),
        "points": (points, (n, t, 2)),
        "predicted_occluded": (predicted_occluded, (n, t)),
        "predicted_points": (predicted_points, (n, t, 2)),
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)} to fit occluded {[n, t]}, got {list(array.shape)}")
    for name, array in {"occluded": occluded, "predicted_occluded": predicted_occluded}.items():
        if array.dtype != np.bool_:
            raise TypeError(f"{name} must be bool (threshold logits first), got {array.dtype}")
    rounded = np.round(query_frames).astype(np.int64)
    if n and not (0 <= rounded.min() and rounded.max() < t):
        raise ValueError(f"query_frames must lie in 0..{t - 1}, got {rounded.min()}..{rounded.max()}")
    return rounded
