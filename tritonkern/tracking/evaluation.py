"""Running a tracker over a data set and scoring it with the TAP-Vid metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from os import PathLike

import torch

from tritonkern.files import atomic_path
from tritonkern.models.matching import MatchingTracker, TrackerOutput
from tritonkern.tracking.metrics import QUERY_MODES, mean_metrics, tapvid_metrics
from tritonkern.tracking.predictor import Progress
from tritonkern.tracking.tapvid import TapVidClip, tapvid_queries


@dataclass(frozen=True)
class Evaluation:
    """Scores of one tracker in one query mode, as `tapvid_metrics` names them, in percent.

    `mean` is the data set's score; `videos` has (clip name, scores) in the order of the data set.
    """

    mode: str
    mean: dict[str, float]
    videos: list[tuple[str, dict[str, float]]]


class StandingStill(MatchingTracker):
    """The tracker that predicts no motion: every point stays where it was asked for, and is always visible.

    What a data set gives it is the score that takes no tracking at all.
    """

    resolution = (256, 256)

    def features(self, video: torch.Tensor) -> torch.Tensor:
        """The number of frames, in the shape of features `[B, T, 1, 1, 1]`; nothing is looked at."""
        return video.new_ones(*video.shape[:2], 1, 1, 1)

    def track(self, features: torch.Tensor, queries: torch.Tensor) -> TrackerOutput:
        """The queries' positions in every frame."""
        tracks = queries[:, :, None, [2, 1]].expand(-1, -1, features.shape[1], -1)
        certain = torch.full_like(tracks[..., 0], -torch.inf)
        return TrackerOutput(tracks, certain, certain)


def query_modes(mode: str) -> tuple[str, ...]:
    """The query modes that `mode` ("first", "strided" or "both") names; `ValueError` for any other name."""
    if mode not in (*QUERY_MODES, "both"):
        raise ValueError(f'mode must be "first", "strided" or "both", got {mode!r}')
    return QUERY_MODES if mode == "both" else (mode,)


def evaluate(
    model: MatchingTracker,
    dataset: Iterable[TapVidClip],
    mode: str = "both",
    *,
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """Scores `model` on every clip of `dataset`.

    Each clip is held only while it is scored, its features are computed once for both modes, and all its queries are
    asked together, as the answers of a matching tracker do not depend on each other. The model runs in evaluation mode
    under `torch.inference_mode` on the device of its parameters, and gets its training flag back. Nothing is random.

    Args:
        model: a tracker whose `resolution` is that of the clips (256, 256).
        dataset: the clips, from `read_tapvid` or generated.
        mode: "first", "strided" or "both".
        progress: called as `progress("evaluating", clips done, clips in all or None)` after each clip.

    Returns:
        `Evaluation` by query mode.

    Raises:
        ValueError: unknown mode, no clip, or a clip that is not at the model's resolution.
    """
    modes = query_modes(mode)
    videos: dict[str, list[tuple[str, dict[str, float]]]] = {name: [] for name in modes}
    total = len(dataset) if isinstance(dataset, Sized) else None
    was_training = model.training
    model.eval()
    try:
        for done, clip in enumerate(dataset, start=1):
            for name, scores in _score(model, clip, modes).items():
                videos[name].append((clip.name, scores))
            if progress is not None:
                progress("evaluating", done, total)
    finally:
        model.train(was_training)
    if not videos[modes[0]]:
        raise ValueError("dataset holds no clip")
    return {name: Evaluation(name, mean_metrics(scores for _, scores in rows), rows) for name, rows in videos.items()}


def save_scores(path: str | PathLike[str], scores: Mapping[str, Mapping[str, Evaluation]]) -> None:
    """Writes evaluations by tracker and query mode as JSON, complete or not at all; NaN becomes null.

    The layout is `{tracker: {mode: {"mean": {metric: percent}, "videos": [{"name": ..., metric: percent}]}}}`.
    """

    def defined(values: Mapping[str, float]) -> dict[str, float | None]:
        return {metric: None if math.isnan(value) else value for metric, value in values.items()}

    content = {
        tracker: {
            mode: {
                "mean": defined(evaluation.mean),
                "videos": [{"name": name, **defined(values)} for name, values in evaluation.videos],
            }
            for mode, evaluation in modes.items()
        }
        for tracker, modes in scores.items()
    }
    with atomic_path(path) as part:
        part.write_text(json.dumps(content, indent=1))


@torch.inference_mode()
def _score(model: MatchingTracker, clip: TapVidClip, modes: tuple[str, ...]) -> dict[str, dict[str, float]]:
    if clip.video.shape[1:] != (*model.resolution, 3):
        raise ValueError(
            f"clip {clip.name!r} must be [T, {model.resolution[0]}, {model.resolution[1]}, 3] for this model, "
            f"got {list(clip.video.shape)}"
        )
    device = model.occ_linear.weight.device
    # [1, T, H, W, 3]
    video = torch.from_numpy(clip.video)[None].to(device).float() / 255 * 2 - 1
    features = model.features(video)
    scores = {}
    for mode in modes:
        queries, tracks = tapvid_queries(clip, mode)
        output = model.track(features, torch.from_numpy(queries)[None].to(device, torch.float32))
        scores[mode] = tapvid_metrics(
            queries[:, 0],
            clip.occluded[tracks],
            clip.points[tracks],
            (~output.visible[0]).cpu().numpy(),
            output.tracks[0].double().cpu().numpy(),
            mode,
        )
    return scores
