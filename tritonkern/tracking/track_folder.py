"""Reading clips with tracks from a folder of NumPy files and videos, as the data of DiffTrack are stored."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path

import numpy as np

from tritonkern.tracking.tapvid import TapVidClip
from tritonkern.tracking.video import VideoReader


def read_track_folder(folder: str | PathLike[str]) -> Iterator[TapVidClip]:
    """Clips of a folder with ``tracks/NNN.npy``, ``visibility/NNN.npy`` and a video ``videos/NNN.*`` for each.

    Tracks are float `[1, T, N, 2]` or `[T, N, 2]` (x, y) in pixels of the video, visibility bool `[1, T, N]` or
    `[T, N]`; a video may have more frames.

    Raises:
        FileNotFoundError: no tracks, or a video or a visibility is missing.
        ValueError: arrays that do not fit, or a video that is too short.
    """
    folder = Path(folder)
    files = sorted((folder / "tracks").glob("*.npy"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no tracks/NNN.npy")
    for file in files:
        points, visible = _array(file), _array(folder / "visibility" / file.name)
        if points.ndim != 3 or points.shape[2] != 2 or points.dtype.kind != "f":
            raise ValueError(f"{file} must hold float [1, T, N, 2], got {points.dtype} {list(points.shape)}")
        if visible.shape != points.shape[:2] or visible.dtype != np.bool_:
            raise ValueError(
                f"visibility of {file} must be bool [1, {points.shape[0]}, {points.shape[1]}], "
                f"got {visible.dtype} {list(visible.shape)}"
            )
        video = next(iter(sorted((folder / "videos").glob(f"{file.stem}.*"))), None)
        if video is None:
            raise FileNotFoundError(f"{folder / 'videos'} holds no video {file.stem}.* for {file}")
        frames = [frame for frame, _ in zip(VideoReader(video).frames(), points, strict=False)]
        if len(frames) < len(points):
            raise ValueError(f"{video} must have {len(points)} frames for {file}, got {len(frames)}")
        yield TapVidClip(
            file.stem, np.stack(frames), points.transpose(1, 0, 2).astype(np.float64), ~visible.transpose(1, 0)
        )


def _array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is no readable NumPy file: {error}") from error
    return array[0] if array.shape[:1] == (1,) else array
