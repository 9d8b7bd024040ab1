"""Frames that are in memory: an array or tensor of them, or a list."""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from PIL import Image

from tritonkern.tracking.image_files import samples_of

_NEEDED = "uint8 RGB frames [T, H, W, 3] or [T, 3, H, W]"


class FramesInMemory:
    """A uint8 video `[T, H, W, 3]` or `[T, 3, H, W]` (NumPy or torch, any strides), or a list of frames.

    A frame of a list is a uint8 array or tensor `[H, W, 3]` or `[3, H, W]`, or a `PIL.Image` of 8 bits, whose EXIF
    orientation is applied and whose transparent parts are black. The channels are on the last axis if that has length
    3. Nothing is copied but one frame at a time.

    Raises:
        ValueError: another shape or dtype; the message says what is needed.
    """

    fps = None
    pixel_aspect = Fraction(1)

    def __init__(self, video: Any) -> None:
        self.name = "the array `video`"
        if isinstance(video, (np.ndarray, torch.Tensor)):
            self._frames: Any = video
            dtype, shape = str(video.dtype).removeprefix("torch."), list(video.shape)
            if isinstance(video, torch.Tensor) and (video.is_meta or video.layout != torch.strided):
                raise ValueError(
                    f"`video` must be {_NEEDED}, dense and with data, got {video.layout} on {video.device}"
                )
            if len(shape) == 5:
                raise ValueError(f"`video` must be one video, {_NEEDED}, got shape {shape}: give video[0]")
            if len(shape) != 4 or 3 not in (shape[1], shape[3]) or dtype != "uint8" or 0 in shape[1:]:
                hint = "; convert with (video * 255).round() if it is in 0..1" if "float" in dtype else ""
                raise ValueError(f"`video` must be {_NEEDED}, got {dtype} of shape {shape}{hint}")
        else:
            self.name = "the list `video`"
            self._frames = list(video)
        self.frame_count = len(self._frames)

    def count(self, limit: int) -> int:
        """Number of frames, at most `limit`."""
        return min(self.frame_count, limit)

    def frames(self) -> Iterator[np.ndarray]:
        """uint8 RGB `[H, W, 3]`."""
        for index in range(self.frame_count):
            yield self._frame(index)

    def _frame(self, index: int) -> np.ndarray:
        frame = self._frames[index]
        if isinstance(frame, Image.Image):
            samples = samples_of(frame)
            if samples.dtype != np.uint8:
                raise ValueError(
                    f"frame {index} of {self.name} is an image of mode {frame.mode}: convert it to 8 bits, or give the "
                    "path of a folder of images"
                )
            return samples
        if isinstance(frame, torch.Tensor) and frame.layout == torch.strided and not frame.is_meta:
            frame = frame.detach().cpu().numpy()
        if not isinstance(frame, np.ndarray):
            raise ValueError(
                f"frame {index} of {self.name} is a {type(frame).__name__}: give arrays, tensors or PIL images, or the "
                "path of a folder of images"
            )
        if frame.ndim != 3 or 3 not in (frame.shape[0], frame.shape[2]) or frame.dtype != np.uint8 or not frame.size:
            raise ValueError(
                f"frame {index} of {self.name} must be uint8 RGB [H, W, 3] or [3, H, W], got {frame.dtype} of shape "
                f"{list(frame.shape)}"
            )
        return frame if frame.shape[2] == 3 else frame.transpose(1, 2, 0)
