"""A tracker for VOT toolkit's point tracking challenge: `python -m tritonkern.vot`, run in the folder of one sequence.

The entry of trackers.ini::

    [tritonkern]
    command = tritonkern.vot
    protocol = folderpython

The folder protocol (votchallenge/toolkit, vot/tracker/folder.py; stack vots2026/point). The toolkit writes

- ``frames_color.txt``: the path of one frame per line, relative ones to the folder;
- ``query_ID.txt`` for every point: its frame, counted from 0, in line 1, its position ``x,y`` in line 2; further lines
  ``key=value`` are properties, of which this tracker knows none;

and reads, with one line per frame,

- ``output_ID.txt``: ``x,y``, or ``0`` in the frames before the query;
- ``output_ID_visible.txt``: ``1`` or ``0``.

Positions are pixels of the frames. They are passed on as they are, like in TAPNext++'s entry of the challenge.
"""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Annotated

import numpy as np

from tritonkern._optional import how_to_install

try:
    import typer
except ModuleNotFoundError as _error:
    raise ModuleNotFoundError(
        f"tritonkern.vot needs the package {_error.name}: {how_to_install('track')}", name=_error.name
    ) from _error

from tritonkern.commands._terminal import one_line_errors
from tritonkern.files import atomic_paths
from tritonkern.tracking import PointTracker, PointTracks, VideoReader

_FRAMES = "frames_color.txt"


def track_sequence(folder: str | PathLike[str], tracker: PointTracker) -> PointTracks:
    """Track the points of a sequence in the folder protocol, and write its outputs.

    All outputs are written together: after an error those of an earlier run, if any, are as they were.

    Args:
        folder: the folder of the sequence.
        tracker: tracks all points of the sequence together.

    Returns:
        The tracks, in the order of the names of the query files.

    Raises:
        FileNotFoundError: there is no list of frames, no query, or a frame is missing.
        ValueError: a file holds something else than the protocol says; the message names the line.
    """
    folder = Path(folder)
    frames = _frames(folder)
    files = sorted(folder.glob("query_*.txt"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no query_ID.txt: run this in the folder of a sequence of VOT toolkit")
    queries = np.array([_query(file, len(frames)) for file in files])
    names = [file.stem.removeprefix("query_") for file in files]
    outputs = [folder / f"output_{name}{kind}.txt" for name in names for kind in ("", "_visible")]
    if len(set(outputs)) < len(outputs):
        raise ValueError(f"the queries {', '.join(names)} of {folder} would write one output twice: rename one of them")
    with atomic_paths(outputs) as parts:
        tracks = tracker(VideoReader(frames), queries=queries)
        for i, (start, _, _) in enumerate(queries.astype(int)):
            points = [f"{x:.3f},{y:.3f}" for x, y in tracks.tracks[i, start:].tolist()]
            visible = [f"{seen:d}" for seen in tracks.visibility[i, start:]]
            _write(parts[2 * i], ["0"] * start + points)
            _write(parts[2 * i + 1], ["0"] * start + visible)
    return tracks


def _frames(folder: Path) -> list[Path]:
    file = folder / _FRAMES
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {_FRAMES}: run this in the folder of a sequence of VOT toolkit")
    frames = [folder / line for line in _lines(file)]
    if not frames:
        raise ValueError(f"{file} names no frame: it must hold the path of one frame per line")
    for number, frame in enumerate(frames, start=1):
        if not frame.is_file():
            raise FileNotFoundError(f"{file} names {frame} as frame {number} of {len(frames)}, which does not exist")
    return frames


def _query(file: Path, count: int) -> tuple[int, float, float]:
    """Frame, x and y of a file query_ID.txt."""
    lines = _lines(file)
    if len(lines) < 2:
        raise ValueError(f"{file} must hold the query's frame in line 1 and x,y in line 2, got {len(lines)} lines")
    if not re.fullmatch(r"\d{1,9}", lines[0], re.ASCII) or int(lines[0]) >= count:
        raise ValueError(f"{file}, line 1: needs a frame from 0 to {count - 1}, got {lines[0][:80]!r}")
    try:
        x, y = (float(number) for number in lines[1].split(","))
    except ValueError:
        raise ValueError(
            f"{file}, line 2: needs a point x,y, got {lines[1][:80]!r}; this tracker follows points only"
        ) from None
    return int(lines[0]), x, y


def _lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file in UTF-8: {error}") from error


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _command(
    folder: Annotated[Path, typer.Argument(help="The folder of the sequence.")] = Path("."),
    model: Annotated[str, typer.Option(help="Name of the model; docs/models.md lists them.")] = "nano",
    weights: Annotated[
        list[Path] | None, typer.Option(help="Checkpoint of a model that ships without weights.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: cuda if there is one]")] = None,
) -> None:
    """Track the points of one sequence of VOT toolkit's folder protocol."""
    with one_line_errors():
        tracks = track_sequence(folder, PointTracker(model, weights, device))
        typer.echo("{} points, {} frames".format(*tracks.visibility.shape))


if __name__ == "__main__":
    typer.run(_command)
