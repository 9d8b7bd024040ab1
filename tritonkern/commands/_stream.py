"""`tritonkern track --stream`: tracks of a source that is live, written while it lasts."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from tritonkern.commands._terminal import Stages, print_path
from tritonkern.files import ENDING

if TYPE_CHECKING:
    import numpy as np

    from tritonkern.tracking.live import LiveFrames
    from tritonkern.tracking.queries import QueryName


def parse_size(text: str | None) -> tuple[int, int] | None:
    """640x480 -> (640, 480)."""
    found = None if text is None else re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if text is not None and found is None:
        raise ValueError(f"--raw-size must be WIDTHxHEIGHT, such as 640x480, got {text!r}")
    return None if found is None else (int(found[1]), int(found[2]))


def track_stream(
    source: str,
    out: Path,
    stale: Sequence[Path],
    *,
    grid: int | None,
    queries: Path | None,
    query_frame: int,
    model: str,
    weights: Sequence[Path] | None,
    device: str | None,
    max_frames: int | None,
    stride: int,
    min_confidence: float,
    lookahead: int,
    drop: bool,
    buffer: int,
    raw_size: tuple[int, int] | None,
) -> None:
    """Write `tracks.csv` in the folder `out`, or Parquet files in one that ends in .parquet, frame by frame, until the
    source ends or Ctrl-C. `stale` are results of an earlier run, which are removed."""
    from tritonkern.tracking import PointTracker
    from tritonkern.tracking.growing_files import GrowingCsv, GrowingParquet
    from tritonkern.tracking.live import LiveFrames
    from tritonkern.tracking.queries import check_queries, open_queries

    rows, name = (None, None) if queries is None else open_queries(queries)
    if rows is not None:
        rows = check_queries(rows, (1 << 24, 1 << 24), name=name)
    tracker = PointTracker(model, weights, device)
    stream = tracker.stream(
        lookahead=lookahead,
        max_points=1 << 20,
        max_sources=1 if rows is None else len(set(rows[:, 0])),
        min_confidence=min_confidence,
    )
    path = out if out.suffix == ".parquet" else out / "tracks.csv"
    given: dict[int, Any] = {}
    done, waiting = 0, []
    file: GrowingCsv | GrowingParquet | None = None
    failure: Exception | None = None
    frames = LiveFrames(source, drop=drop, buffer=buffer, raw_size=raw_size)
    start = time.perf_counter()
    with Stages() as stages, _stopped_by_signals(frames), ExitStack() as files:
        try:
            for frame in frames:
                if frame.number % stride:
                    continue
                number = frame.number // stride
                if file is None:  # a source that cannot be read and wrong points leave an earlier file as it is
                    size = frame.image.shape[1], frame.image.shape[0]
                    given = _by_frame(_grid(grid, size, query_frame) if rows is None else rows, size, name)
                    file = GrowingCsv(path) if path is not out else GrowingParquet(path)
                    files.enter_context(file)
                    for old in stale:
                        old.unlink(missing_ok=True)
                for t in [t for t in given if t <= number]:
                    stream.add(given.pop(t))
                result = stream.step(frame.image)
                waiting.append((number, frame.seconds))
                if result is not None:
                    file.append(result, *waiting.pop(0))
                done += 1
                stages("tracking", done, None)
                if done == max_frames:
                    frames.stop()
        except (ValueError, OSError) as error:
            if not done:
                raise
            failure = error
        if file is not None:  # whatever ended the stream, the frames that wait for others are written
            for result in stream.finish():
                file.append(result, *waiting.pop(0))
    if failure is not None:
        raise ValueError(f"{failure}; the tracks of the {done} frames before are in {path}") from failure
    if not done:
        raise ValueError(f"{frames.name} holds no video frame")
    if given:
        raise ValueError(f"the points of frame {min(given)} were never tracked: {frames.name} has {done} frames")
    print_path(path)
    per_frame = 1000 * (time.perf_counter() - start) / done
    typer.echo(f"{done} frames, {frames.dropped} dropped; {per_frame:.1f} ms per frame on {tracker.device}")


def _by_frame(rows: np.ndarray, size: tuple[int, int], name: QueryName | None) -> dict[int, np.ndarray]:
    from tritonkern.tracking.queries import check_queries

    rows = check_queries(rows, size, name=name)
    return {int(t): rows[rows[:, 0] == t, 1:] for t in sorted(set(rows[:, 0]))}


def _grid(grid: int | None, size: tuple[int, int], frame: int) -> np.ndarray:
    from tritonkern.tracking.queries import DEFAULT_GRID, grid_queries

    return grid_queries(DEFAULT_GRID if grid is None else grid, size, frame)


@contextmanager
def _stopped_by_signals(frames: LiveFrames) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the stream, with the frames that still wait; the second one the program."""

    def stop(number: int, frame: FrameType | None) -> None:
        frames.stop()
        signal.signal(number, before[number])

    numbers = [n for n in (signal.SIGINT, *ENDING) if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        frames.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
