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


def parse_size(text: str | None) -> tuple[int, int] | None:
    """640x480 -> (640, 480)."""
    found = None if text is None else re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if text is not None and found is None:
        raise ValueError(f"--raw-size must be WIDTHxHEIGHT, such as 640x480, got {text!r}")
    return None if found is None else (int(found[1]), int(found[2]))


def track_stream(
    source: str,
    folder: Path,
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
    """Write `tracks.csv` in `folder` frame by frame, until the source ends or Ctrl-C."""
    from tritonkern.tracking import PointTracker
    from tritonkern.tracking.live import GrowingCsv, LiveFrames

    given = None if queries is None else _queries_by_frame(queries)
    tracker = PointTracker(model, weights, device)
    stream = tracker.stream(lookahead=lookahead, max_points=1 << 20, min_confidence=min_confidence)
    path, done, waiting = folder / "tracks.csv", 0, []
    file: GrowingCsv | None = None
    frames = LiveFrames(source, drop=drop, buffer=buffer, raw_size=raw_size)
    start = time.perf_counter()
    with Stages() as stages, _stopped_by_signals(frames), ExitStack() as files:
        for frame in frames:
            if frame.number % stride:
                continue
            if file is None:  # a source that cannot be read leaves an earlier file as it is
                file = files.enter_context(GrowingCsv(path))
            number = frame.number // stride
            if given is None:
                size = frame.image.shape[1], frame.image.shape[0]
                given = _grid_by_frame(grid, size, query_frame)
            for t in [t for t in given if t <= number]:
                stream.add(given.pop(t))
            out = stream.step(frame.image)
            waiting.append((number, frame.seconds))
            if out is not None:
                file.append(out, *waiting.pop(0))
            done += 1
            stages("tracking", done, None)
            if done == max_frames:
                frames.stop()
        if file is not None:
            for out in stream.finish():
                file.append(out, *waiting.pop(0))
    if given:
        raise ValueError(f"the points of frame {min(given)} were never tracked: {frames.name} has {done} frames")
    if not done:
        raise ValueError(f"{frames.name} holds no video frame")
    print_path(path)
    per_frame = 1000 * (time.perf_counter() - start) / done
    typer.echo(f"{done} frames, {frames.dropped} dropped; {per_frame:.1f} ms per frame on {tracker.device}")


def _queries_by_frame(path: Path) -> dict[int, np.ndarray]:
    from tritonkern.tracking.queries import check_queries, open_queries

    rows, name = open_queries(path)
    big = 1 << 24
    rows = check_queries(rows, (big, big), name=name)
    return {int(t): rows[rows[:, 0] == t, 1:] for t in sorted(set(rows[:, 0]))}


def _grid_by_frame(grid: int | None, size: tuple[int, int], frame: int) -> dict[int, Any]:
    from tritonkern.tracking.queries import DEFAULT_GRID, grid_queries

    return {frame: grid_queries(DEFAULT_GRID if grid is None else grid, size)[:, 1:]}


@contextmanager
def _stopped_by_signals(frames: LiveFrames) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the stream, with the frames that still wait; the second one the program."""

    def stop(number: int, frame: FrameType | None) -> None:
        frames.stop()
        signal.signal(number, before[number])

    numbers = [n for n in (signal.SIGINT, *ENDING) if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        frames.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
