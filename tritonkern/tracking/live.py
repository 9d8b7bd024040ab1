"""Frames of a source that is live, and a file of tracks that is whole while it grows."""

from __future__ import annotations

import os
import queue
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np

from tritonkern.tracking.stream import StreamOutput
from tritonkern.tracking.video import VideoReader

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_POLL = 0.1
"""Seconds after which a thread that waits looks whether it should stop."""


class LiveFrame(NamedTuple):
    """A frame as it arrived."""

    number: int
    """In the source, counted from 0; those that were dropped count."""
    seconds: float
    """Since the first frame."""
    image: np.ndarray
    """uint8 RGB `[H, W, 3]`."""


class LiveFrames:
    """Iterate over the frames of a file, camera, pipe or network address while they arrive.

    A thread reads them into a buffer. When the buffer is full the thread waits, which a file and a pipe do not mind, or
    drops the oldest frame of the buffer and counts it.

    Args:
        source: a path that `VideoReader` reads; a camera, such as `/dev/video0`; an address that FFmpeg opens, such as
            `rtsp://...`; or "-", standard input, with any container that FFmpeg reads without seeking.
        drop: whether frames are dropped when the buffer is full.
        buffer: frames in the buffer, at most.
        raw_size: (width, height) of the frames of a pipe that holds raw RGB of 8 bits, without a container.

    Attributes:
        dropped: how many frames were.
        read: how many frames the source has given.

    Raises:
        FileNotFoundError, ValueError: no such source, or one that cannot be decoded; the latter also while iterating.
    """

    def __init__(
        self, source: str, *, drop: bool = False, buffer: int = 64, raw_size: tuple[int, int] | None = None
    ) -> None:
        if buffer < 1:
            raise ValueError(f"buffer must be 1 frame or more, got {buffer}")
        if raw_size is not None and source != "-":
            raise ValueError("raw_size goes with standard input, the source -")
        self.name = "standard input" if source == "-" else source
        self._drop, self._raw_size, self._source = drop, raw_size, source
        self.dropped = self.read = 0
        self._queue: queue.Queue[LiveFrame | BaseException | None] = queue.Queue(buffer)
        self._stopped = threading.Event()
        live = source == "-" or source.startswith("/dev/") or _URL.match(source)
        self._reader = None if live else VideoReader(source)
        self._thread = threading.Thread(target=self._fill, name="tritonkern-frames", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Read no more; iterating ends after the frame under way."""
        self._stopped.set()

    def __iter__(self) -> Iterator[LiveFrame]:
        while not self._stopped.is_set():
            try:
                found = self._queue.get(timeout=_POLL)
            except queue.Empty:
                continue
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            yield found

    def _fill(self) -> None:
        try:
            for frame in self._frames():
                self.read += 1
                self._put(frame, self._drop)
                if self._stopped.is_set():
                    return
            self._put(None, False)
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            known = isinstance(error, (ValueError, OSError)) and not isinstance(error, av.FFmpegError)
            self._put(error if known else ValueError(f"{self.name} cannot be read as a video ({reason})"), False)

    def _put(self, item: LiveFrame | BaseException | None, drop: bool) -> None:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, block=not drop, timeout=None if drop else _POLL)
                return
            except queue.Full:
                if drop:
                    try:
                        self._queue.get_nowait()
                        self.dropped += 1
                    except queue.Empty:
                        pass

    def _frames(self) -> Iterator[LiveFrame]:
        if self._reader is not None:
            for number, image in enumerate(self._reader.frames()):
                yield LiveFrame(number, number / self._reader.fps, image)
        elif self._raw_size is not None:
            yield from self._raw_frames(*self._raw_size)
        else:
            yield from self._decoded()

    def _raw_frames(self, width: int, height: int) -> Iterator[LiveFrame]:
        size, number = width * height * 3, 0
        with _standard_input() as pipe:
            while True:
                data = bytearray()
                while len(data) < size and (part := pipe.read(size - len(data))):
                    data += part
                if len(data) < size:
                    return
                yield LiveFrame(number, float(number), np.frombuffer(data, np.uint8).reshape(height, width, 3))
                number += 1

    def _decoded(self) -> Iterator[LiveFrame]:
        options: dict[str, Any] = {}
        if self._source.startswith("/dev/"):
            options = {"format": "v4l2"}
        elif self._source != "-":
            options = {"timeout": (10.0, 30.0)}
            if self._source.startswith("rtsp"):
                options["options"] = {"rtsp_transport": "tcp"}
        file: Any = _standard_input() if self._source == "-" else self._source
        first = None
        with av.open(file, "r", metadata_errors="ignore", **options) as container:
            if not container.streams.video:
                raise ValueError(f"{self.name} has no video stream")
            for number, frame in enumerate(container.decode(container.streams.video[0])):
                seconds = float(number) if frame.time is None else frame.time
                first = seconds if first is None else first
                image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
                yield LiveFrame(number, seconds - first, image)


def _standard_input() -> BinaryIO:
    # A file of its own: at the end of the program nobody waits for the lock of `sys.stdin` while a thread reads.
    return open(os.dup(sys.stdin.fileno()), "rb", buffering=0)


HEADER = b"point,t,x,y,visible,confidence,seconds_from_the_start_of_stream\n"


class GrowingCsv:
    """A CSV file of tracks that is complete after every line, however the program ends, `kill -9` included.

    One line for each point and frame: `point,t,x,y,visible,confidence,seconds_from_the_start_of_stream`, where point
    is the id. All lines have 64 bytes, numbers with leading zeros: the system copies what is written page by page, and
    no line is in two pages.

    Raises:
        OSError: the file cannot be written; the lines before stay.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._size = 0
        self._write(HEADER)

    def append(self, out: StreamOutput, number: int, seconds: float) -> None:
        """The points of one frame, which has this number and time in the source."""
        rows = zip(out.ids.tolist(), out.xy.tolist(), out.visible.tolist(), out.confidence.tolist(), strict=True)
        lines = (
            f"{point:07d},{number:09d},{x:010.3f},{y:010.3f},{visible:d},{confidence:.3f},{seconds:015.3f}\n"
            for point, (x, y), visible, confidence in rows
        )
        text = "".join(lines).encode()
        if len(text) != len(HEADER) * len(out.ids):
            raise ValueError("a number has too many digits for the file: restart the stream")
        self._write(text)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)

    def __enter__(self) -> GrowingCsv:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
