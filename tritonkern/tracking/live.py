"""Frames of a source that is live."""

from __future__ import annotations

import os
import queue
import re
import stat
import sys
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np

from tritonkern.tracking.video import VideoReader

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_POLL = 0.1
"""Seconds after which a thread that waits looks whether it should stop."""


class LiveFrame(NamedTuple):
    """A frame as it arrived."""

    number: int
    """In the source, counted from 0; those that were dropped count."""
    seconds: float
    """Since the first frame; the number of the frame where the source has no times, as raw frames have none."""
    image: np.ndarray
    """uint8 RGB `[H, W, 3]`."""


class LiveFrames:
    """Iterate over the frames of a file, camera, pipe or network address while they arrive.

    A thread reads them into a buffer. When the buffer is full the thread waits, which a file and a pipe do not mind, or
    drops the oldest frame of the buffer and counts it.

    Args:
        source: a path that `VideoReader` reads; a camera, such as `/dev/video0`; an address that FFmpeg opens, such as
            `rtsp://...`; or a named pipe or "-", standard input, with any container that FFmpeg reads without seeking.
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
        self._pipe = source == "-" or os.path.exists(source) and stat.S_ISFIFO(os.stat(source).st_mode)
        if raw_size is not None and not self._pipe:
            raise ValueError("raw_size goes with standard input, the source -, or a named pipe")
        self.name = "standard input" if source == "-" else source
        self._drop, self._raw_size, self._source = drop, raw_size, source
        self.dropped = self.read = 0
        self._queue: queue.Queue[LiveFrame | BaseException | None] = queue.Queue(buffer)
        self._stopped = threading.Event()
        live = self._pipe or source.startswith("/dev/") or _URL.match(source)
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
            what = f"broke off after {self.read} frames" if self.read else "cannot be read as a video"
            self._put(error if known else ValueError(f"{self.name} {what} ({reason})"), False)

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
        with self._opened() as pipe:
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
        if self._pipe:
            pass
        elif self._source.startswith("/dev/"):
            options = {"format": "v4l2"}
        else:
            options = {"timeout": (10.0, 30.0)}
            if self._source.startswith("rtsp"):
                options["options"] = {"rtsp_transport": "tcp"}
        file: Any = self._opened() if self._pipe else self._source
        first = None
        with av.open(file, "r", metadata_errors="ignore", **options) as container:
            if not container.streams.video:
                raise ValueError(f"{self.name} has no video stream")
            for number, frame in enumerate(container.decode(container.streams.video[0])):
                seconds = float(number) if frame.time is None else frame.time
                first = seconds if first is None else first
                image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
                yield LiveFrame(number, seconds - first, image)

    def _opened(self) -> BinaryIO:
        """The pipe."""
        # A file of its own: at the end of the program nobody waits for the lock of `sys.stdin` while a thread reads.
        return open(os.dup(sys.stdin.fileno()) if self._source == "-" else self._source, "rb", buffering=0)
