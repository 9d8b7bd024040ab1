"""What tracking gives, and how it is kept in files that are either complete or not there."""

from dataclasses import dataclass
from os import PathLike

import numpy as np

from tritonkern.files import atomic_path

_FIELDS = ("tracks", "visibility", "queries", "fps", "size")


@dataclass(frozen=True)
class PointTracks:
    """Points followed through a video.

    Positions are `(x, y)` in pixels of the original video with the raster convention: the frame spans
    `[0, width] x [0, height]`, and the centre of its first pixel is `(0.5, 0.5)`.

    Attributes:
        tracks: `[N, T, 2]` float32, x and y of every point in every frame.
        visibility: `[N, T]` bool, whether the model sees the point there.
        queries: `[N, 3]` float32, t (frame), x, y of where each point was picked.
        fps: frames per second of the video.
        size: `(width, height)` of the video in pixels.
    """

    tracks: np.ndarray
    visibility: np.ndarray
    queries: np.ndarray
    fps: float
    size: tuple[int, int]

    def save_npz(self, path: str | PathLike[str]) -> None:
        """Write every field under its own name."""
        with atomic_path(path) as part, open(part, "wb") as file:
            np.savez(
                file,
                tracks=self.tracks,
                visibility=self.visibility,
                queries=self.queries,
                fps=np.float64(self.fps),
                size=np.array(self.size),
            )

    def save_csv(self, path: str | PathLike[str]) -> None:
        """Write one line for each point and frame: `point,t,x,y,visible` (visible is 0 or 1)."""
        with atomic_path(path) as part, open(part, "wb") as file:
            file.write(b"point,t,x,y,visible\n")
            for point, (track, visible) in enumerate(zip(self.tracks.tolist(), self.visibility.tolist(), strict=True)):
                lines = (
                    f"{point},{t},{x:.3f},{y:.3f},{seen:d}\n"
                    for t, ((x, y), seen) in enumerate(zip(track, visible, strict=True))
                )
                file.write("".join(lines).encode())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "PointTracks":
        """Read what `save_npz` wrote.

        Raises:
            OSError: the file cannot be opened.
            ValueError: it is not a tracks file, or is damaged.
        """
        with open(path, "rb") as file:
            try:
                with np.load(file, allow_pickle=False) as archive:
                    fields = {name: archive[name] for name in _FIELDS}
            # Damaged bytes make NumPy fail with nearly any exception class (zlib.error, NotImplementedError, OSError).
            except Exception as error:
                raise ValueError(f"{path} is not a tracks file: it needs the arrays {', '.join(_FIELDS)}") from error
        width, height = fields["size"].tolist()
        return cls(
            tracks=fields["tracks"],
            visibility=fields["visibility"],
            queries=fields["queries"],
            fps=float(fields["fps"]),
            size=(width, height),
        )
