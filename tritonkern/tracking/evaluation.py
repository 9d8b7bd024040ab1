"""Running a tracker over a data set and scoring it with the TAP-Vid metrics."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np
import torch

from tritonkern.files import atomic_path
from tritonkern.models.tracker import Tracker
from tritonkern.tracking.bins import Bins, TrackScores, mean_of_bins, mean_step, reappearances
from tritonkern.tracking.metrics import QUERY_MODES, mean_metrics, tapvid_metrics, track_metrics
from tritonkern.tracking.predictor import VISIBLE, Progress
from tritonkern.tracking.raster import resized
from tritonkern.tracking.results import visible_points
from tritonkern.tracking.tapvid import TapVidClip, tapvid_queries


@dataclass(frozen=True)
class Evaluation:
    """Scores of one tracker in one query mode, as `tapvid_metrics` names them, in percent.

    `mean` is the data set's score; `videos` has (clip name, scores) in the order of the data set. `seconds_per_frame`
    is the time of features and tracks over the number of frames. `peak_memory` is the largest resident memory of the
    process in MiB while the tracker ran, PyTorch and the clips included; NaN where the system does not tell (it is read
    from Linux's /proc).
    """

    mode: str
    mean: dict[str, float]
    videos: list[tuple[str, dict[str, float]]]
    seconds_per_frame: float = field(default=math.nan, compare=False)
    peak_memory: float = field(default=math.nan, compare=False)
    bins: Bins = field(default_factory=dict)


def query_modes(mode: str) -> tuple[str, ...]:
    """The query modes that `mode` ("first", "strided" or "both") names; `ValueError` for any other name."""
    if mode not in (*QUERY_MODES, "both"):
        raise ValueError(f'mode must be "first", "strided" or "both", got {mode!r}')
    return QUERY_MODES if mode == "both" else (mode,)


def evaluate(
    model: Tracker,
    dataset: Iterable[TapVidClip],
    mode: str = "both",
    *,
    bins: bool = False,
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """Scores `model` on every clip of `dataset`.

    Each clip is held only while it is scored, its features are computed once for both modes, and all its queries are
    asked together, as the answers of a matching tracker do not depend on each other. The model runs in evaluation mode
    under `torch.inference_mode` on the device of its parameters, and gets its training flag back. Nothing is random.

    Args:
        model: a tracker. Where its `resolution` is not that of the clips (256, 256), frames are resized.
        dataset: the clips, from `read_tapvid` or generated.
        mode: "first", "strided" or "both".
        bins: also average by motion and reappearance, track by track (`tritonkern.tracking.bins`).
        progress: called as `progress("evaluating", clips done, clips in all or None)` after each clip.

    Returns:
        `Evaluation` by query mode.

    Raises:
        ValueError: unknown mode, or no clip.
    """
    modes = query_modes(mode)
    videos: dict[str, list[tuple[str, dict[str, float]]]] = {name: [] for name in modes}
    total = len(dataset) if isinstance(dataset, Sized) else None
    tracks: dict[str, list[TrackScores]] = {name: [] for name in modes}
    seconds, frames = dict.fromkeys(modes, 0.0), 0
    was_training = model.training
    model.eval()
    _forget_peak()
    try:
        for done, clip in enumerate(dataset, start=1):
            frames += len(clip.video)
            for name, (scores, taken, of_tracks) in _score(model, clip, modes, bins).items():
                videos[name].append((clip.name, scores))
                seconds[name] += taken
                tracks[name] += of_tracks
            if progress is not None:
                progress("evaluating", done, total)
    finally:
        model.train(was_training)
    if not videos[modes[0]]:
        raise ValueError("dataset holds no clip")
    peak = _peak_memory()
    return {
        name: Evaluation(
            name,
            mean_metrics(scores for _, scores in rows),
            rows,
            seconds[name] / frames,
            peak,
            mean_of_bins(tracks[name]) if bins else {},
        )
        for name, rows in videos.items()
    }


def jump_share(tracks: np.ndarray, visibility: np.ndarray, size: tuple[int, int], distance: float = 12.0) -> float:
    """The share of tracks that jump while they are visible.

    A track jumps if it is visible in two frames in a row and its positions in them are more than `distance` pixels of a
    256x256 raster apart. What is that fast on screen counts as a jump, too.

    Args:
        tracks: `[N, T, 2]` xy in pixels of the video.
        visibility: `[N, T]` bool.
        size: (width, height) of the video in pixels.
        distance: in pixels of the raster.

    Returns:
        From 0 to 1, NaN where there is no track.
    """
    step = np.diff(tracks, axis=1) * (256 / np.asarray(size, dtype=np.float64))
    jumps = (np.linalg.norm(step, axis=-1) > distance) & visibility[:, 1:] & visibility[:, :-1]
    return float(jumps.any(axis=1).mean()) if len(jumps) else math.nan


def save_scores(path: str | PathLike[str], scores: Mapping[str, Mapping[str, Mapping[str, Evaluation]]]) -> None:
    """Writes evaluations by data set, tracker and query mode as JSON, complete or not at all; NaN becomes null.

    The layout is `{set: {tracker: {mode: {"mean": {metric: percent}, "seconds_per_frame": ..., "peak_memory": ...,
    "videos": [{"name": ..., metric: percent}]}}}}`, and with bins also `"motion"` and `"reappearance"`, each
    `{bin: {"tracks": ..., metric: percent}}`.
    """

    def defined(values: Mapping[str, float]) -> dict[str, float | None]:
        return {metric: None if math.isnan(value) else value for metric, value in values.items()}

    def row(evaluation: Evaluation) -> dict[str, object]:
        return {
            "mean": defined(evaluation.mean),
            **defined({name: getattr(evaluation, name) for name in ("seconds_per_frame", "peak_memory")}),
            **{kind: {name: defined(row) for name, row in rows.items()} for kind, rows in evaluation.bins.items()},
            "videos": [{"name": name, **defined(values)} for name, values in evaluation.videos],
        }

    content = {
        title: {
            tracker: {mode: row(evaluation) for mode, evaluation in modes.items()}
            for tracker, modes in trackers.items()
        }
        for title, trackers in scores.items()
    }
    with atomic_path(path) as part:
        part.write_text(json.dumps(content, indent=1))


@torch.inference_mode()
def _score(
    model: Tracker, clip: TapVidClip, modes: tuple[str, ...], bins: bool
) -> dict[str, tuple[dict[str, float], float, list[TrackScores]]]:
    """Scores, seconds and, for bins, what is known of the tracks, by mode."""
    height, width = clip.video.shape[1:3]
    frames, scale = clip.video, np.ones(2)
    if (height, width) != model.resolution:
        frames = np.stack([resized(frame, model.resolution) for frame in clip.video])
        scale = np.array(model.resolution) / (height, width)  # y, x
    device = next(model.parameters()).device
    # [1, T, H, W, 3]
    video = torch.from_numpy(frames)[None].to(device).float() / 255 * 2 - 1
    start = time.perf_counter()
    features = model.features(video)
    encoding = time.perf_counter() - start
    results = {}
    for mode in modes:
        queries, tracks = tapvid_queries(clip, mode)
        points = torch.from_numpy(queries * [1, *scale])[None].to(device, torch.float32)
        start = time.perf_counter()
        output = model.track(features, points)
        positions, confidence = output.tracks[0].double().cpu().numpy(), output.confidence[0].cpu().numpy()
        seconds = encoding + time.perf_counter() - start
        visible = visible_points(positions, confidence, VISIBLE, model.resolution[::-1])
        occluded, truth = clip.occluded[tracks], clip.points[tracks]
        arguments = queries[:, 0], occluded, truth, ~visible, positions / scale[::-1], mode
        of_tracks = [
            TrackScores(mean_step(truth, occluded, (width, height)), reappearances(occluded), track_metrics(*arguments))
        ]
        results[mode] = tapvid_metrics(*arguments), seconds, of_tracks if bins else []
    return results


def _forget_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> float:
    """MiB since `_forget_peak`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), math.nan)
