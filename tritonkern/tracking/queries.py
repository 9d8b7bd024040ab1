"""Which points to follow: a grid, or a file of points. Queries are float64 `[N, 3]`: t (frame), x, y (pixels).

Pixels are those of the original video in the raster convention: the frame spans `[0, width] x [0, height]`, and the
centre of the first pixel is (0.5, 0.5).
"""

import csv
import math
from os import PathLike
from pathlib import Path

import numpy as np

_HEADER = ["t", "x", "y"]


def grid_queries(grid: int, size: tuple[int, int], frame: int = 0) -> np.ndarray:
    """`grid x grid` points over a frame of `size` (width, height), row by row, width/64 away from its borders.

    A grid of 1 is the centre of the frame.
    """
    if grid < 1:
        raise ValueError(f"grid must be at least 1, got {grid}")
    width, height = size
    if grid == 1:
        return np.array([[frame, width / 2, height / 2]])
    margin = min(width / 64, height / 2)
    y, x = np.meshgrid(
        np.linspace(margin, height - margin, grid), np.linspace(margin, width - margin, grid), indexing="ij"
    )
    return np.stack([np.full(x.size, float(frame)), x.ravel(), y.ravel()], axis=1)


def read_queries(path: str | PathLike[str]) -> np.ndarray:
    """Read the queries `[N, 3]` (t, x, y) of a file.

    A `.csv` has one query in a line, and may begin with the line `t,x,y`. A `.npz` has them in the array `queries`, so
    that a tracks.npz written by this package can be given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a .csv or .npz file with t,x,y of each point")
    readers = {".csv": _read_csv, ".npz": _read_npz}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} is neither .csv nor .npz: write the queries as lines of t,x,y in a .csv")
    return readers[path.suffix.lower()](path)


def _read_csv(path: Path) -> np.ndarray:
    rows: list[tuple[float, float, float]] = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            for cells in lines:
                cells = [cell.strip() for cell in cells]
                if not any(cells) or (not rows and [cell.lower() for cell in cells] == _HEADER):
                    continue
                try:
                    t, x, y = map(float, cells)
                except ValueError:
                    raise ValueError(
                        f"{path}, line {lines.line_num}: needs three numbers t,x,y, got {','.join(cells)!r}"
                    ) from None
                rows.append((t, x, y))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a text file of lines t,x,y: {error}") from error
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def _read_npz(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                return archive["queries"]
        # Damaged bytes make NumPy fail with nearly any exception class (zlib.error, NotImplementedError, OSError).
        except Exception as error:
            raise ValueError(f"{path} does not hold an array named queries with t, x, y in each row") from error


def check_queries(queries: np.ndarray, size: tuple[int, int], frame_count: int | None = None) -> np.ndarray:
    """Queries as float64 `[N, 3]`, each inside the frame and the clip, whose end is not checked without `frame_count`.

    Raises:
        ValueError: the shape is another, or a query lies outside; the message names the first such query.
    """
    queries = np.asarray(queries)
    if queries.ndim != 2 or queries.shape[1] != 3 or not np.issubdtype(queries.dtype, np.number):
        raise ValueError(
            f"queries must be numbers [N, 3] with rows t, x, y, got {queries.dtype} of shape {list(queries.shape)}"
        )
    if len(queries) == 0:
        raise ValueError("there is no query: give at least one point t,x,y")
    queries = queries.astype(np.float64)
    width, height = size
    for number, (t, x, y) in enumerate(queries.tolist(), start=1):
        name = f"query {number} of {len(queries)} (t={t:g}, x={x:g}, y={y:g})"
        if not 0 <= t < (math.inf if frame_count is None else frame_count):
            until = "or more" if frame_count is None else f"to {frame_count - 1}"
            raise ValueError(f"{name} lies outside the clip: t must be 0 {until}, a frame that is read")
        if t != int(t):
            raise ValueError(f"{name} lies between frames: t must be a whole number")
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(f"{name} lies outside the frame: x must be 0 to {width} and y 0 to {height}")
    return queries
