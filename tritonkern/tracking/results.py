"""The result of tracking: files of it, and conversions for the programs that display or analyse it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from tritonkern.files import atomic_path

_FIELDS = ("tracks", "visibility", "confidence", "queries", "fps", "size")


@dataclass(frozen=True)
class PointTracks:
    """Points followed through a video.

    Positions are `(x, y)` in pixels of the original video with the raster convention: the frame spans
    `[0, width] x [0, height]`, and the centre of its first pixel is `(0.5, 0.5)`. Where a video has non-square pixels,
    these are the stored pixels, not those of the stretched picture.

    Attributes:
        tracks: `[N, T, 2]` float32, x and y of every point in every frame.
        visibility: `[N, T]` bool, whether the point is visible there: `confidence >= min_confidence` (0.5 by default).
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
        """Write one line for each point and frame: `point,t,x,y,visible,confidence` (visible is 0 or 1)."""
        with atomic_path(path) as part, open(part, "wb") as file:
            file.write(b"point,t,x,y,visible,confidence\n")
            for point in range(len(self.tracks)):
                rows = zip(
                    self.tracks[point].tolist(),
                    self.visibility[point].tolist(),
                    self.confidence[point].tolist(),
                    strict=True,
                )
                lines = (
                    f"{point},{t},{x:.3f},{y:.3f},{visible:d},{confidence:.3f}\n"
                    for t, ((x, y), visible, confidence) in enumerate(rows)
                )
                file.write("".join(lines).encode())

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
        """A `pandas.DataFrame` with the columns of `save_csv`, one row for each point and frame."""
        pandas = _optional("pandas", "pandas")
        point, t = np.indices(self.visibility.shape)
        columns: dict[str, Any] = {"point": point, "t": t, "x": self.tracks[..., 0], "y": self.tracks[..., 1]}
        columns |= {"visible": self.visibility, "confidence": self.confidence}
        return pandas.DataFrame({name: values.ravel() for name, values in columns.items()})

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
