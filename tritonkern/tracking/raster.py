"""A clip at the resolution of a model, on disk: memory does not grow with its length."""

from __future__ import annotations

import tempfile
from types import TracebackType

import numpy as np
import torch
from torch import Tensor


class Raster:
    """Frames uint8 `[H, W, 3]` in a temporary file (in `TMPDIR`), which is gone when this object is closed.

    `len(raster)` and `raster[start:stop]`, a tensor uint8 `[stop - start, H, W, 3]`, are as of a tensor.
    """

    def __init__(self, resolution: tuple[int, int]) -> None:
        self._shape = (*resolution, 3)
        self._frames = 0
        self._file = tempfile.TemporaryFile(prefix="tritonkern-")

    def append(self, frame: np.ndarray) -> None:
        try:
            self._file.write(np.ascontiguousarray(frame, dtype=np.uint8).reshape(self._shape).data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from error
        self._frames += 1

    def __len__(self) -> int:
        return self._frames

    def __getitem__(self, frames: slice) -> Tensor:
        start, stop, step = frames.indices(self._frames)
        if step != 1:
            raise ValueError(f"frames must follow each other, got a step of {step}")
        size = int(np.prod(self._shape))
        clip = torch.empty(max(0, stop - start), *self._shape, dtype=torch.uint8)
        self._file.seek(start * size)
        self._file.readinto(clip.numpy().data)  # type: ignore[attr-defined]
        return clip

    def __enter__(self) -> Raster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
