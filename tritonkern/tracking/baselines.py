"""Trackers to compare with: standing still, two classical ones of OpenCV, and mixtures with a matching tracker.

Each is a `MatchingTracker`, so that `evaluate` scores it like a network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from tritonkern._optional import how_to_install
from tritonkern.models import build_model
from tritonkern.models.matching import MatchingTracker, TrackerOutput

CLOSED = 1.0
"""Pixels between a point and where the flow there and back leads, from which on the point counts as lost."""
CYCLE = 6.0
"""The same for matches, which are less precise."""

Advance = Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]
"""Points [n, 2] in one frame, the frame, and the next (or the one before) -> points there, and which are not lost."""


class StandingStill(MatchingTracker):
    """The tracker that predicts no motion: every point stays where it was asked for, and is always visible.

    What a data set gives it is the score that takes no tracking at all.
    """

    resolution = (256, 256)

    def features(self, video: Tensor) -> Tensor:
        """The number of frames, in the shape of features `[B, T, 1, 1, 1]`; nothing is computed."""
        return video.new_ones(*video.shape[:2], 1, 1, 1)

    def track(self, features: Tensor, queries: Tensor) -> TrackerOutput:
        """The queries' positions in every frame."""
        tracks = queries[:, :, None, [2, 1]].expand(-1, -1, features.shape[1], -1)
        return _output(tracks, torch.ones_like(tracks[..., 0], dtype=torch.bool))


class LucasKanade(MatchingTracker):
    """OpenCV's pyramidal Lucas-Kanade, 21x21 windows, three levels above the image, from frame to frame.

    A point is lost for good once the way back ends `CLOSED` pixels or more from where it started. Bouguet, "Pyramidal
    Implementation of the Lucas Kanade Feature Tracker", 2000.
    """

    resolution = (256, 256)

    def features(self, video: Tensor) -> Tensor:
        """Grey frames, uint8 `[B, T, H, W, 1]`."""
        return torch.from_numpy(np.stack([_grey(frames) for frames in video]))[..., None]

    def track(self, features: Tensor, queries: Tensor) -> TrackerOutput:
        """`features` as the method of this name returns them."""
        return _stacked([self._track(frames[..., 0].numpy(), q) for frames, q in zip(features, queries, strict=True)])

    def _track(self, frames: np.ndarray, queries: Tensor) -> tuple[Tensor, Tensor]:
        cv2 = _opencv()

        def advance(points: np.ndarray, now: int, then: int) -> tuple[np.ndarray, np.ndarray]:
            # OpenCV's pixel i has its centre at i.
            start = (points - 0.5).astype(np.float32).reshape(-1, 1, 2)
            options = {"winSize": (21, 21), "maxLevel": 3}
            moved, found, _ = cv2.calcOpticalFlowPyrLK(frames[now], frames[then], start, None, **options)
            back, returned, _ = cv2.calcOpticalFlowPyrLK(frames[then], frames[now], moved, None, **options)
            closed = np.linalg.norm(back - start, axis=-1)[:, 0] < CLOSED
            return moved[:, 0] + 0.5, closed & (found[:, 0] == 1) & (returned[:, 0] == 1)

        return _chain(advance, queries, frames.shape)


class DenseFlow(MatchingTracker):
    """OpenCV's DIS optical flow (medium preset), chained from frame to frame.

    A point is lost for good once the way back ends `CLOSED` pixels or more from where it started, or it leaves the
    frame. Kroeger et al., "Fast Optical Flow using Dense Inverse Search", ECCV 2016.
    """

    resolution = (256, 256)

    def features(self, video: Tensor) -> Tensor:
        """The flow to the next frame and to the one before, in pixels, float32 `[B, T, H, W, 4]`."""
        return torch.stack([self._flows(_grey(frames)) for frames in video])

    def _flows(self, frames: np.ndarray) -> Tensor:
        flow = _opencv().DISOpticalFlow_create(_opencv().DISOPTICAL_FLOW_PRESET_MEDIUM)
        flows = np.zeros((*frames.shape, 4), dtype=np.float32)
        for now in range(len(frames) - 1):
            flows[now, ..., :2] = flow.calc(frames[now], frames[now + 1], None)
            flows[now + 1, ..., 2:] = flow.calc(frames[now + 1], frames[now], None)
        return torch.from_numpy(flows)

    def track(self, features: Tensor, queries: Tensor) -> TrackerOutput:
        """`features` as the method of this name returns them."""
        return _stacked([self._track(flows.numpy(), q) for flows, q in zip(features, queries, strict=True)])

    def _track(self, flows: np.ndarray, queries: Tensor) -> tuple[Tensor, Tensor]:
        cv2 = _opencv()
        height, width = flows.shape[1:3]

        def flow(points: np.ndarray, frame: int, direction: int) -> np.ndarray:
            field = np.ascontiguousarray(flows[frame, ..., :2] if direction > 0 else flows[frame, ..., 2:])
            x, y = (points - 0.5).astype(np.float32).T
            return cv2.remap(field, x[:, None], y[:, None], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[:, 0]

        def advance(points: np.ndarray, now: int, then: int) -> tuple[np.ndarray, np.ndarray]:
            moved = points + flow(points, now, then - now)
            closed = np.linalg.norm(moved + flow(moved, then, now - then) - points, axis=-1) < CLOSED
            return moved, closed & (moved >= 0).all(-1) & (moved < (width, height)).all(-1)

        return _chain(advance, queries, flows.shape)


class CycleChecked(MatchingTracker):
    """A matching tracker whose points count as visible only where their match leads back to the query.

    The feature at the position found is matched in the frame of the query; it must end within `CYCLE` pixels.
    """

    def __init__(self, matcher: MatchingTracker):
        self.resolution = matcher.resolution
        super().__init__()
        self.matcher = matcher

    def features(self, video: Tensor) -> Tensor:
        """Those of the matching tracker."""
        return self.matcher.features(video)

    def track(self, features: Tensor, queries: Tensor) -> TrackerOutput:
        """`features` as the method of this name returns them."""
        output = self.matcher.track(features, queries)
        back = self.matcher.way_back(features, queries, output.tracks)
        closed = (back - queries[:, :, None, [2, 1]]).norm(dim=-1) < CYCLE
        return _output(output.tracks, output.visible & closed)


class FlowThenMatches(MatchingTracker):
    """Dense flow while it is consistent, and after that the matches of a `CycleChecked` tracker."""

    def __init__(self, matcher: MatchingTracker):
        self.resolution = matcher.resolution
        super().__init__()
        self.flow, self.matches = DenseFlow(), CycleChecked(matcher)

    def features(self, video: Tensor) -> Tensor:
        """Those of the matching tracker `[B, T, h, w, C]`, and the flows of the pixels of a cell as 64 channels."""
        features = self.matches.features(video)
        ratio = self.resolution[0] // features.shape[2]
        flows = rearrange(self.flow.features(video), "b t (h r) (w s) c -> b t h w (r s c)", r=ratio, s=ratio)
        return torch.cat([features, flows.to(features)], -1)

    def track(self, features: Tensor, queries: Tensor) -> TrackerOutput:
        """`features` as the method of this name returns them."""
        ratio = self.resolution[0] // features.shape[2]
        features, flows = features.split([features.shape[-1] - 4 * ratio**2, 4 * ratio**2], -1)
        flows = rearrange(flows, "b t h w (r s c) -> b t (h r) (w s) c", r=ratio, s=ratio)
        by_flow = self.flow.track(flows.float().cpu().contiguous(), queries.cpu())
        matched = self.matches.track(features, queries)
        tracks = torch.where(
            by_flow.visible[..., None].to(matched.tracks.device), by_flow.tracks.to(matched.tracks), matched.tracks
        )
        return _output(tracks, by_flow.visible.to(tracks.device) | matched.visible)


def baselines(device: torch.device | str = "cpu") -> dict[str, MatchingTracker]:
    """The trackers to compare with, by name."""
    chrono = cast(MatchingTracker, build_model("chrono-nano")).to(device)
    trackers: dict[str, MatchingTracker] = {
        "standing still": StandingStill(),
        "Lucas-Kanade": LucasKanade(),
        "DIS flow": DenseFlow(),
        "chrono-nano": chrono,
        "chrono-nano, cycle closed": CycleChecked(chrono),
        "DIS flow, then chrono-nano": FlowThenMatches(chrono),
    }
    return {name: tracker.to(device) for name, tracker in trackers.items()}


def _chain(advance: Advance, queries: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Tracks `[N, T, 2]` of `queries` `[N, 3]` (t, y, x), by `advance` both ways in time; where they are not lost."""
    frames = shape[0]
    own = queries[:, 0].round().long().numpy()
    place = queries[:, [2, 1]].double().numpy()
    tracks = np.repeat(place[:, None], frames, axis=1)
    kept = np.zeros(tracks.shape[:2], dtype=bool)
    kept[np.arange(len(own)), own] = True
    for direction, order in ((1, range(frames - 1)), (-1, range(frames - 1, 0, -1))):
        for now in order:
            then = now + direction
            started = own <= now if direction > 0 else own >= now
            tracks[started, then] = tracks[started, now]
            going = np.flatnonzero(started & kept[:, now])
            if len(going):
                tracks[going, then], kept[going, then] = advance(tracks[going, now], now, then)
    return torch.from_numpy(tracks).float(), torch.from_numpy(kept)


def _output(tracks: Tensor, visible: Tensor) -> TrackerOutput:
    certain = torch.full_like(tracks[..., 0], -torch.inf)
    return TrackerOutput(tracks, torch.where(visible, certain, -certain), certain)


def _stacked(clips: list[tuple[Tensor, Tensor]]) -> TrackerOutput:
    tracks, kept = (torch.stack(x) for x in zip(*clips, strict=True))
    return _output(tracks, kept)


def _grey(frames: Tensor) -> np.ndarray:
    """uint8 `[T, H, W]` of `[T, H, W, 3]` in [-1, 1]."""
    cv2 = _opencv()
    pixels = ((frames.cpu().float() + 1) * 127.5).round().to(torch.uint8).numpy()
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in pixels])


def _opencv() -> Any:
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the classical trackers need OpenCV: {how_to_install('eval')}", name="cv2"
        ) from error
    return cv2
