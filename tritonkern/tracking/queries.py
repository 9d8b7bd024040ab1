"""Which points to follow: a grid, or a file of points. Queries are float64 `[N, 3]`: t (frame), x, y (pixels).

Files and everything in `tritonkern.tracking` use the order t, x, y, as CoTracker does. Models in `tritonkern.models`
take (t, y, x), as TAPIR and Chrono do; `PointTracker` converts.

Pixels are those of the original video in the raster convention: the frame spans `[0, width] x [0, height]`, and the
centre of the first pixel is (0.5, 0.5).
"""

import csv
import re
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import numpy as np

DEFAULT_GRID = 10
_HEADER = ["t", "x", "y"]
# Not all that float() takes: it reads "1_0" as 10.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)

QueryName: TypeAlias = Callable[[int], str]
"""What error messages call the query of an index, for instance "points.csv, line 4"."""


def grid_queries(grid: int, size: tuple[int, int], frame: int = 0) -> np.ndarray:
    """`grid x grid` points over a frame of `size` (width, height), row by row, width/64 away from its borders.

    A grid of 1 is the centre of the frame.

    Raises:
        ValueError: `grid` is less than 1, or more than one point per pixel of the longer side (10 are always allowed).
    """
    width, height = size
    limit = max(DEFAULT_GRID, width, height)
    if not 1 <= grid <= limit:
        least = f"grid must be at least 1, got {grid}"
        most = f"grid must be at most {limit} for a frame of {width}x{height} (one point per pixel), got {grid}"
        raise ValueError(least if grid < 1 else most)
    if grid == 1:
        return np.array([[frame, width / 2, height / 2]])
    margin = min(width / 64, height / 2)
    y, x = np.meshgrid(
        np.linspace(margin, height - margin, grid), np.linspace(margin, width - margin, grid), indexing="ij"
    )
    return np.stack([np.full(x.size, float(frame)), x.ravel(), y.ravel()], axis=1)


def read_queries(path: str | PathLike[str]) -> np.ndarray:
    """Read the queries `[N, 3]` (t, x, y) of a file.

    A `.csv` has one query per line, and may begin with the line `t,x,y`. A `.npz` has them in the array `queries`, so
    that a tracks.npz written by this package can be given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else; the message names the line.
    """
    return open_queries(path)[0]


def open_queries(source: str | PathLike[str] | np.ndarray) -> tuple[np.ndarray, QueryName]:
    """Queries of a file or an array, not yet checked against a video, and how error messages name each of them."""
    if not isinstance(source, (str, PathLike)):
        rows = np.asarray(source)
        return rows, lambda index: f"query {index + 1} of {len(rows)}"
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a .csv or .npz file with t,x,y of each point")
    readers = {".csv": _read_csv, ".npz": _read_npz}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} is neither .csv nor .npz: write the queries as lines of t,x,y in a .csv")
    return readers[path.suffix.lower()](path)


def _read_csv(path: Path) -> tuple[np.ndarray, QueryName]:
    rows: list[list[float]] = []
    line_numbers: list[int] = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            for cells in lines:
                cells = [cell.strip() for cell in cells]
                if not any(cells) or (not rows and [cell.lower() for cell in cells] == _HEADER):
                    continue
                if len(cells) != 3 or not all(map(_NUMBER.fullmatch, cells)):
                    raise ValueError(
                        f"{path}, line {lines.line_num}: needs three numbers t,x,y, got {','.join(cells)[:80]!r}"
                    )
                rows.append([float(cell) for cell in cells])
                line_numbers.append(lines.line_num)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a text file of lines t,x,y: {error}") from error
    return np.array(rows, dtype=np.float64).reshape(-1, 3), lambda index: f"{path}, line {line_numbers[index]}"


def _read_npz(path: Path) -> tuple[np.ndarray, QueryName]:
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                rows = archive["queries"]
        # Damaged bytes make NumPy fail with nearly any exception class (zlib.error, NotImplementedError, OSError).
        except Exception as error:
            raise ValueError(f"{path} does not hold an array named queries with t, x, y in each row") from error
    _check_rows(rows, f"{path}: queries")
    return rows, lambda index: f"{path}, query {index + 1} of {len(rows)}"


def check_queries(
    queries: np.ndarray, size: tuple[int, int], frame_count: int | None = None, name: QueryName | None = None
) -> np.ndarray:
    """Queries as float64 `[N, 3]`, each inside the frame and the clip, whose end is not checked without `frame_count`.

    Raises:
        ValueError: the shape or dtype is another, or a query is outside; the message names the first such query.
    """
    if name is None:
        queries, name = open_queries(queries)
    _check_rows(queries, "queries")
    if len(queries) == 0:
        raise ValueError("there is no query: give at least one point t,x,y")
    queries = queries.astype(np.float64)
    t, x, y = queries.T
    width, height = size
    # Written so that NaN fails.
    in_clip = (t >= 0) & (t < (np.inf if frame_count is None else frame_count))
    whole = t == np.floor(t)
    in_frame = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
    wrong = np.flatnonzero(~(in_clip & whole & in_frame))
    if len(wrong):
        first = int(wrong[0])
        query = f"{name(first)} (t={t[first]:g}, x={x[first]:g}, y={y[first]:g})"
        if not in_clip[first]:
            until = "or more" if frame_count is None else f"to {frame_count - 1}"
            raise ValueError(f"{query} is outside the clip: t must be 0 {until}, a frame that is read")
        if not whole[first]:
            raise ValueError(f"{query} is between frames: t must be a whole number")
        raise ValueError(f"{query} is outside the frame: x must be 0 to {width} and y 0 to {height}")
    return queries


def _check_rows(queries: np.ndarray, name: str) -> None:
    if queries.ndim != 2 or queries.shape[1] != 3 or queries.dtype.kind not in "iuf":
        raise ValueError(
            f"{name} must be real numbers [N, 3] with rows t, x, y, got {queries.dtype} of shape {list(queries.shape)}"
        )
