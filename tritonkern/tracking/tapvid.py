"""The TAP-Vid data sets: reading the published pickles, and the queries that the benchmark asks.

Doersch et al., "TAP-Vid: A Benchmark for Tracking Any Point in a Video", NeurIPS 2022 Datasets and Benchmarks. DAVIS is
one dict of videos by name, RGB-Stacking one list of videos, Kinetics a folder of ten lists whose frames are JPEG bytes,
and RoboTAP (Vecerik et al., 2023) a folder of dicts. A video is a dict of `video` (uint8 `[T, H, W, 3]`, or T JPEG
files), `points` (float `[N, T, 2]`, xy as fractions of width and height) and `occluded` (bool `[N, T]`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tritonkern.tracking.metrics import QUERY_MODES
from tritonkern.tracking.restricted_pickle import load_arrays

RESOLUTION = (256, 256)
"""(height, width) of the raster on which the benchmark measures pixels."""
QUERY_STRIDE = 5
"""Frames between the query frames of mode "strided"."""


@dataclass(frozen=True)
class TapVidClip:
    """One annotated video on the benchmark's 256x256 raster (pixel i has its centre at i + 0.5).

    `video` uint8 `[T, 256, 256, 3]` RGB; `points` float `[N, T, 2]` xy in pixels, meaningless where occluded;
    `occluded` bool `[N, T]`.
    """

    name: str
    video: np.ndarray
    points: np.ndarray
    occluded: np.ndarray


def read_tapvid(path: str | Path) -> Iterator[TapVidClip]:
    """Reads TAP-Vid videos one at a time: DAVIS, RGB-Stacking, Kinetics and RoboTAP pickles.

    A pickle has to be in memory as a whole before its first video can be used; its videos are let go one by one as they
    are read, and the shards of a folder are loaded one after another, by name. Frames are resized to 256x256 with
    Pillow's Lanczos filter, which is what mediapy did for the published scores.

    Args:
        path: a `.pkl` file, or a folder of them. Files that ask for more than arrays are refused (`load_arrays`).

    Yields:
        `TapVidClip` in the file's order, named by the dict's key, or by file and position (`tapvid_rgb_stacking[3]`)
        where the file holds a list.

    Raises:
        FileNotFoundError: no such file, or no `.pkl` in the folder.
        ValueError: the file or a video in it is not in the format; the message names file, video and field.
    """
    path = Path(path)
    files = sorted(path.glob("*.pkl")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(
            f"{path}: the folder holds no .pkl file; give the folder into which TAP-Vid was unpacked"
        )
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; give a TAP-Vid pickle or a folder of its shards")
        content = load_arrays(file)
        if isinstance(content, dict):
            examples = [(str(name), example) for name, example in content.items()]
        elif isinstance(content, list):
            examples = [(f"{file.stem}[{index}]", example) for index, example in enumerate(content)]
        else:
            raise ValueError(f"{file}: must hold a dict or a list of videos, got {type(content).__name__}")
        if not examples:
            raise ValueError(f"{file}: holds no video")
        del content
        examples.reverse()
        while examples:
            yield _clip(file, *examples.pop())


def tapvid_queries(clip: TapVidClip, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """The queries that the benchmark asks about a clip.

    Mode "first" asks each track at its first visible frame; tracks that are never visible are dropped. Mode "strided"
    asks at every fifth frame for each point visible there, so that a track is asked several times.

    Returns:
        queries: `[n, 3]` float64 rows (t, y, x), t in frames, y and x in pixels.
        tracks: `[n]` int64, the track of `clip` that each query is on; answers belong to `clip.points[tracks]`.

    Raises:
        ValueError: unknown mode.
    """
    visible = ~clip.occluded
    if mode == "first":
        tracks = np.flatnonzero(visible.any(axis=1))
        frames = visible[tracks].argmax(axis=1)
    elif mode == "strided":
        frames, tracks = np.nonzero(visible.T[::QUERY_STRIDE])
        frames = frames * QUERY_STRIDE
    else:
        raise ValueError(f"mode must be one of {', '.join(QUERY_MODES)}, got {mode!r}")
    x, y = clip.points[tracks, frames].T
    return np.stack([frames, y, x], axis=-1).astype(np.float64), tracks


def _clip(file: Path, name: str, example: Any) -> TapVidClip:
    where = f"{file}, video {name!r}"
    if not isinstance(example, Mapping):
        raise ValueError(f"{where}: must be a dict of video, points and occluded, got {type(example).__name__}")
    for field in ("video", "points", "occluded"):
        if field not in example:
            raise ValueError(f"{where}: field {field!r} is missing, found {sorted(map(str, example))}")

    video = np.stack([_frame(f"{where}, field 'video', frame {t}", f) for t, f in enumerate(_frames(where, example))])
    occluded, points = example["occluded"], example["points"]
    for field, array in {"occluded": occluded, "points": points}.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{where}, field {field!r}: must be an array, got {type(array).__name__}")
    # Plain arrays: those of the unpickler refuse to be filled again.
    occluded, points = np.asarray(occluded), np.asarray(points)
    if occluded.dtype != np.bool_:
        raise ValueError(f"{where}, field 'occluded': must be bool, got {occluded.dtype}")
    if occluded.ndim != 2 or occluded.shape[1] != len(video):
        raise ValueError(
            f"{where}, field 'occluded': must have shape [N, {len(video)}] to fit 'video', got {list(occluded.shape)}"
        )
    if not np.issubdtype(points.dtype, np.floating):
        raise ValueError(f"{where}, field 'points': must be floating point, got {points.dtype}")
    if points.shape != (*occluded.shape, 2):
        raise ValueError(
            f"{where}, field 'points': must have shape {[*occluded.shape, 2]} to fit 'occluded', "
            f"got {list(points.shape)}"
        )
    visible = points[~occluded]
    if not np.isfinite(visible).all():
        raise ValueError(f"{where}, field 'points': a visible point is not finite")
    # Annotators click a little outside the frame at times; pixel coordinates are tens and hundreds.
    if visible.size and np.abs(visible).max() > 2:
        raise ValueError(
            f"{where}, field 'points': must be fractions of width and height, but a visible point reaches "
            f"{np.abs(visible).max():g}; divide pixels by (width, height)"
        )
    height, width = RESOLUTION
    return TapVidClip(name, video, points.astype(np.float64) * (width, height), occluded)


def _frames(where: str, example: Mapping) -> Any:
    frames = example["video"]
    if not isinstance(frames, (np.ndarray, list, tuple)):
        raise ValueError(
            f"{where}, field 'video': must be uint8 [T, H, W, 3] or a list of JPEG files, got {type(frames).__name__}"
        )
    if isinstance(frames, np.ndarray) and frames.ndim == 0 or len(frames) == 0:
        raise ValueError(f"{where}, field 'video': holds no frame")
    return frames


def _frame(where: str, frame: Any) -> np.ndarray:
    """One frame, JPEG bytes or uint8 [H, W, 3], on the benchmark's raster."""
    if isinstance(frame, bytes):
        try:
            image = Image.open(io.BytesIO(frame)).convert("RGB")
        # Damaged bytes make Pillow fail with nearly any exception class (SyntaxError, struct.error, OSError).
        except Exception as error:
            raise ValueError(f"{where}: the JPEG bytes cannot be decoded ({error})") from error
    else:
        if not isinstance(frame, np.ndarray):
            raise ValueError(f"{where}: must be uint8 [H, W, 3] or JPEG bytes, got {type(frame).__name__}")
        pixels = np.asarray(frame)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise ValueError(f"{where}: must be uint8 [H, W, 3] or JPEG bytes, got {pixels.dtype} {list(pixels.shape)}")
        image = Image.fromarray(np.ascontiguousarray(pixels))
    height, width = RESOLUTION
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
