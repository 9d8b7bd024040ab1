"""A clip at the resolution of a model, in memory while it is short and then on disk."""

from __future__ import annotations

import tempfile
from types import TracebackType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_IN_MEMORY = 16 << 20
"""Bytes up to which a clip stays in memory: 85 frames of 256 x 256 pixels."""


class Raster:
    """Frames uint8 `[H, W, 3]`; those of long clips are in a temporary file, removed at the end of `with`.

    `len(raster)` and `raster[start:stop]`, a tensor uint8 `[stop - start, H, W, 3]`, are as of a tensor.
    """

    def __init__(self, resolution: tuple[int, int]) -> None:
        self._shape = (*resolution, 3)
        self._size = 3 * resolution[0] * resolution[1]
        self._frames = 0
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY, prefix="tritonkern-")

    def append(self, frame: np.ndarray) -> None:
        try:
            self._file.write(np.asarray(frame, dtype=np.uint8).reshape(self._shape).tobytes())
        except OSError as error:
            raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from error
        self._frames += 1

    def __len__(self) -> int:
        return self._frames

    def __getitem__(self, frames: slice) -> Tensor:
        start, stop, step = frames.indices(self._frames)
        if step != 1:
            raise ValueError(f"frames must follow each other, got a step of {step}")
        self._file.seek(start * self._size)
        data = bytearray(self._file.read((stop - start) * self._size))
        self._file.seek(0, 2)
        return torch.frombuffer(data, dtype=torch.uint8).view(-1, *self._shape)

    def __enter__(self) -> Raster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def resized(frame: np.ndarray, resolution: tuple[int, int]) -> np.ndarray:
    """Bilinear with antialiasing, on the raster convention: position x becomes x * W_model / W, without a shift."""
    # PyTorch warns about arrays that are read-only or have negative strides; these are copied.
    image = torch.from_numpy(np.require(frame, requirements=["C", "W"])).permute(2, 0, 1)[None]
    result = F.interpolate(image, size=resolution, mode="bilinear", antialias=True, align_corners=False)
    return result[0].permute(1, 2, 0).numpy()
