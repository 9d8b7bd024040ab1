"""Tracks that arrive span by span, in temporary files once there is more than one span."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import IO, Any

import numpy as np

from tritonkern.tracking.results import PER_FRAME, PointTracks

_IN_MEMORY = 64 << 20
"""Bytes up to which tracks are read back into memory: 100 points in 50,000 frames."""


class StoredTracks:
    """`PointTracks` of a clip, put together from those of its spans.

    Results that stayed in memory while a clip is tracked would be allocated in gaps between the large blocks of the
    model, which the allocator could then not use again: with nano this took 0.2 MB per frame.
    """

    def __init__(self) -> None:
        self._waiting: list[PointTracks] = []
        self._bytes = self._frames = 0
        self._files: dict[str, IO[bytes]] = {}

    def append(self, span: PointTracks) -> None:
        """The frames that follow."""
        self._waiting.append(span)
        self._frames += span.visibility.shape[1]
        self._bytes += sum(getattr(span, name).nbytes for name in PER_FRAME)
        if len(self._waiting) > 1 or self._files:
            self._write()

    def tracks(self) -> PointTracks:
        """All frames, with the frame rate of the last span.

        The arrays of long clips are maps of files without a name, which the system removes together with the arrays;
        changes of them stay in memory.
        """
        last = self._waiting[-1]
        arrays: dict[str, Any] = {}
        for name, file in self._files.items():
            like = getattr(last, name)
            shape = (self._frames, *np.delete(like.shape, 1))
            # Frames come first in the file, which can thus be appended to.
            if self._bytes > _IN_MEMORY:
                arrays[name] = np.asarray(np.memmap(file, like.dtype, "c", shape=shape)).swapaxes(0, 1)
            else:
                file.seek(0)
                arrays[name] = np.ascontiguousarray(np.fromfile(file, like.dtype).reshape(shape).swapaxes(0, 1))
        return replace(last, **arrays)

    def _write(self) -> None:
        try:
            if not self._files:
                self._files = {name: tempfile.TemporaryFile(prefix="tritonkern-") for name in PER_FRAME}
            for span in self._waiting:
                for name, file in self._files.items():
                    file.write(np.ascontiguousarray(getattr(span, name).swapaxes(0, 1)))
                    file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from error
        self._waiting = [self._waiting[-1].frames(0, 0)]
