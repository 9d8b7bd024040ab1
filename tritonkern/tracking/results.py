"""The result of tracking: files of it, and conversions for the programs that display or analyse it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np

from tritonkern.files import atomic_path

_FIELDS = ("tracks", "visibility", "confidence", "queries", "fps", "size")
PER_FRAME = ("tracks", "visibility", "confidence")
CSV_HEADER = b"point,t,x,y,visible,confidence\n"


def visible_points(
    tracks: np.ndarray, confidence: np.ndarray, min_confidence: float, size: tuple[int, int]
) -> np.ndarray:
    """Which points are visible: those whose confidence is `min_confidence` or more and whose position is in the frame.

    A camera does not see what is outside its frame, and the ground truth of TAP-Vid marks such points as hidden.

    Args:
        tracks: `[..., 2]` (x, y).
        confidence: `[...]` in 0..1.
        size: (width, height) of the frame, in the unit of `tracks`; its borders belong to it.
    """
    inside = ((tracks >= 0) & (tracks <= np.asarray(size))).all(axis=-1)
    visible: np.ndarray = (confidence >= min_confidence) & inside
    return visible


@dataclass(frozen=True)
class PointTracks:
    """Points followed through a video.

    Positions are `(x, y)` in pixels of the original video with the raster convention: the frame spans
    `[0, width] x [0, height]`, and the centre of its first pixel is `(0.5, 0.5)`. Where a video has non-square pixels,
    these are the stored pixels, not those of the stretched picture.

    Attributes:
        tracks: `[N, T, 2]` float32, x and y of every point in every frame.
        visibility: `[N, T]` bool, whether the point is visible there: `confidence >= min_confidence` (0.5 by default),
            and the position is inside the frame.
        confidence: `[N, T]` float32 in 0..1. The model's probability that the point is visible and that its predicted
            position is right: `(1 - sigmoid(occlusion)) * (1 - sigmoid(expected_distance))`, where "right" is within
            8 pixels of the 256x256 raster for "nano" and 6 for "chrono-nano". Of trackers that match every frame on its
            own it is 0 where the match does not lead back to the query (`tritonkern.tracking.spans.track_in_spans`). It
            is 1 in the query's own frame.
        queries: `[N, 3]` float32, t (frame), x, y of where each point was picked.
        fps: frames per second of the video.
        size: `(width, height)` of the video in pixels.
    """

    tracks: np.ndarray
    visibility: np.ndarray
    confidence: np.ndarray
    queries: np.ndarray
    fps: float
    size: tuple[int, int]

    def save_npz(self, path: str | PathLike[str]) -> None:
        """Write every field under its own name."""
        with atomic_path(path) as part, open(part, "wb") as file:
            fields = {name: getattr(self, name) for name in _FIELDS}
            np.savez(file, **fields | {"fps": np.float64(self.fps), "size": np.array(self.size)})

    def save_csv(self, path: str | PathLike[str]) -> None:
        """Write one line for each frame and point: `point,t,x,y,visible,confidence` (visible is 0 or 1)."""
        with atomic_path(path) as part, open(part, "wb") as file:
            file.write(CSV_HEADER)
            for lines in self.csv_lines():
                file.write(lines)

    def csv_lines(self, first_frame: int = 0) -> Iterator[bytes]:
        """The lines of `save_csv`, frame by frame; the frames are counted from `first_frame`."""
        for t in range(self.visibility.shape[1]):
            rows = zip(
                self.tracks[:, t].tolist(), self.visibility[:, t].tolist(), self.confidence[:, t].tolist(), strict=True
            )
            lines = (
                f"{point},{first_frame + t},{x:.3f},{y:.3f},{visible:d},{confidence:.3f}\n"
                for point, ((x, y), visible, confidence) in enumerate(rows)
            )
            yield "".join(lines).encode()

    def frames(self, first: int, last: int) -> PointTracks:
        """The same points in frames `first` to `last - 1`. The arrays are views, and `queries` stay as they are."""
        parts = {name: getattr(self, name)[:, first:last] for name in PER_FRAME}
        return replace(self, **parts)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> PointTracks:
        """Read what `save_npz` wrote.

        Raises:
            OSError: the file cannot be opened.
            ValueError: it is not a tracks file, or is damaged.
        """
        with open(path, "rb") as file:
            try:
                with np.load(file, allow_pickle=False) as archive:
                    fields = {name: archive[name] for name in _FIELDS}
                width, height = fields["size"].tolist()
                fps = float(fields["fps"])
                n, t = fields["visibility"].shape
                shapes = {"tracks": (n, t, 2), "confidence": (n, t), "queries": (n, 3)}
                fitting = all(fields[name].shape == shape for name, shape in shapes.items())
            # Damaged bytes make NumPy fail with nearly any exception class (zlib.error, NotImplementedError, OSError).
            except Exception as error:
                raise ValueError(f"{path} is not a tracks file: it needs the arrays {', '.join(_FIELDS)}") from error
        if not fitting:
            raise ValueError(f"{path} is not a tracks file: the shapes of its arrays do not fit together")
        arrays = {name: fields[name] for name in ("tracks", "visibility", "confidence", "queries")}
        return cls(**arrays, fps=fps, size=(width, height))

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with the columns and the order of `save_csv`, one row for each frame and point."""
        pandas = _optional("pandas", "pandas")
        point, t = np.indices(self.visibility.shape)
        columns: dict[str, Any] = {"point": point, "t": t, "x": self.tracks[..., 0], "y": self.tracks[..., 1]}
        columns |= {"visible": self.visibility, "confidence": self.confidence}
        return pandas.DataFrame({name: values.T.ravel() for name, values in columns.items()})

    def to_napari(self) -> tuple[np.ndarray, dict[str, Any], str]:
        """A layer for napari, `viewer.add_layer(napari.layers.Layer.create(*tracks.to_napari()))`; needs no napari.

        Returns:
            Rows `[N * T, 4]` (point, t, y, x) with napari's pixel centres at whole numbers; the layer's options with
            `visible` and `confidence` as features; and the kind of layer, "tracks".
        """
        point, t = np.indices(self.visibility.shape)
        x, y = np.moveaxis(self.tracks, -1, 0) - 0.5
        data = np.stack([point, t, y, x], axis=-1).reshape(-1, 4)
        features = {"visible": self.visibility.ravel(), "confidence": self.confidence.ravel()}
        return data, {"name": "tracks", "features": features}, "tracks"

    def to_supervision(self) -> list[Any]:
        """A `supervision.Detections` for each frame: boxes without extent around the visible points.

        `tracker_id` is the point's number, so `supervision.TraceAnnotator` draws the paths.
        """
        supervision = _optional("supervision", "supervision")
        frames = []
        for t in range(self.visibility.shape[1]):
            points = np.flatnonzero(self.visibility[:, t])
            position = self.tracks[points, t]
            frames.append(
                supervision.Detections(
                    xyxy=np.concatenate([position, position], axis=1),
                    confidence=self.confidence[points, t],
                    class_id=np.zeros(len(points), dtype=int),
                    tracker_id=points,
                )
            )
        return frames

    def to_rerun(self, entity: str = "tracks") -> None:
        """Log the visible points of every frame to the current recording of rerun, on the timeline "frame"."""
        rerun = _optional("rerun", "rerun-sdk")
        from tritonkern.tracking.overlay import point_colours

        colours = point_colours(self.queries)
        for t in range(self.visibility.shape[1]):
            rerun.set_time("frame", sequence=t)
            points = np.flatnonzero(self.visibility[:, t])
            # A keypoint id needs a class.
            ids = {"class_ids": np.zeros(len(points), dtype=int), "keypoint_ids": points}
            rerun.log(entity, rerun.Points2D(self.tracks[points, t], colors=colours[points], **ids))


def _optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"this needs the package {package}: pip install {package}", name=module) from error
