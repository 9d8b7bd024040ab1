"""One reader for every kind of video: files, folders of images, arrays, tensors, lists and file objects."""

import io
import numbers
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice
from os import PathLike, fspath
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

import numpy as np
import torch

from tritonkern.tracking import image_files
from tritonkern.tracking.frames_in_memory import FramesInMemory
from tritonkern.tracking.image_files import ImageFiles
from tritonkern.tracking.video_files import VideoFile

DEFAULT_FPS = 24.0
VideoSource: TypeAlias = str | PathLike[str] | np.ndarray | torch.Tensor | Sequence[Any] | BinaryIO


class _Source(Protocol):
    name: str

    @property
    def frame_count(self) -> int | None: ...

    @property
    def fps(self) -> float | None: ...

    @property
    def pixel_aspect(self) -> Fraction: ...

    def count(self, limit: int) -> int: ...

    def frames(self) -> Iterator[np.ndarray]: ...


class VideoReader:
    """A video that can be read from the start any number of times. One full-size frame is held at a time.

    Args:
        source: one of

            - a video file that FFmpeg reads;
            - a folder of equally large images, read in natural order (`2.png` before `10.png`);
            - a list of paths of image files, read in its order;
            - an image file: all frames of an APNG, WebP, AVIF or TIFF file, or one still
              (more than 8 bits per sample: `tritonkern.tracking.image_files`);
            - an open binary file object with the contents of a video or image file, such as `io.BytesIO`;
            - uint8 RGB frames `[T, H, W, 3]` or `[T, 3, H, W]` as a NumPy array or a torch tensor;
            - a list of uint8 RGB frames `[H, W, 3]` or `[3, H, W]`, or of `PIL.Image`.
        stride: read every `stride`-th frame. Frames are then counted as read: frame 1 is frame `stride` of the source.

    Attributes:
        name: what error messages call this video.
        size: `(width, height)` in pixels, with rotation metadata applied. Pixels are those that are stored: where they
            are not square (`pixel_aspect`), the picture that a player shows is wider or narrower.
        pixel_aspect: width over height of a pixel when the frame is displayed.
        frame_count: number of frames that the source announces, None where it does not. Containers can be wrong.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the source is not a video, cannot be decoded, holds no frame, or is a URL.
    """

    def __init__(self, source: VideoSource, stride: int = 1) -> None:
        self._stride = whole_number("stride", stride)
        self._source = _open(source)
        self.name = self._source.name
        first = next(self._source.frames(), None)
        if first is None:
            raise ValueError(f"{self.name} holds no video frame: give a video with at least one frame")
        self.size = (first.shape[1], first.shape[0])

    @property
    def pixel_aspect(self) -> Fraction:
        return self._source.pixel_aspect

    @property
    def frame_count(self) -> int | None:
        count = self._source.frame_count
        return None if count is None else -(-count // self._stride)

    @property
    def fps(self) -> float:
        """Frames per second, averaged over the clip where it varies; 24 for images and arrays without a time.

        After the frames have been read, their time stamps decide where the container's figure contradicts them.
        """
        return (self._source.fps or DEFAULT_FPS) / self._stride

    def frames(self, max_frames: int | None = None) -> Iterator[np.ndarray]:
        """Decode from the start: uint8 RGB frames `[H, W, 3]`, at most `max_frames` of them.

        A file that ends before the number of frames that it announces gives a `RuntimeWarning`.

        Raises:
            TypeError, ValueError: `max_frames` is not a whole number of 1 or more.
            ValueError: a frame cannot be decoded, or has another size than the first one.
        """
        limit = None if max_frames is None else whole_number("max_frames", max_frames)
        for index, frame in enumerate(islice(self._source.frames(), 0, None, self._stride)):
            if (frame.shape[1], frame.shape[0]) != self.size:
                raise ValueError(
                    f"frame {index * self._stride} of {self.name} is {frame.shape[1]}x{frame.shape[0]} where the first "
                    f"one is {self.size[0]}x{self.size[1]}: all frames must have one size"
                )
            yield frame
            if index + 1 == limit:
                return

    def count_frames(self, max_frames: int) -> int:
        """Number of frames, at most `max_frames`, without decoding. A damaged file counts as `max_frames`."""
        limit = whole_number("max_frames", max_frames)
        return min(-(-self._source.count(limit * self._stride) // self._stride), limit)


def _open(source: Any) -> _Source:
    if isinstance(source, (list, tuple)) and source and all(isinstance(item, (str, PathLike)) for item in source):
        return ImageFiles(f"the list of {len(source)} image files", [Path(item) for item in source])
    if isinstance(source, (np.ndarray, torch.Tensor, list, tuple)):
        return FramesInMemory(source)
    if isinstance(source, (str, PathLike)):
        return _open_path(fspath(source))
    if hasattr(source, "read") and hasattr(source, "seek"):
        return _open_file_object(source)
    raise TypeError(
        "video must be a path, a NumPy array, a torch tensor, a list of frames or a binary file object, got "
        f"{type(source).__name__}"
    )


def _open_path(name: str) -> _Source:
    path = Path(name)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", name) and not path.exists():
        raise ValueError(f"{name} is a URL: download the video first, and give the path of the file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give the path of a video or of a folder of images")
    if path.is_dir():
        return ImageFiles.in_folder(path)
    if not path.is_file():
        raise ValueError(f"{name} is a pipe or a device, which cannot be read twice: save the video to a file")
    if path.suffix.lower() in image_files.SUFFIXES or image_files.is_sequence(path):
        return ImageFiles(name, [path])
    return VideoFile(name, path)


def _open_file_object(file: BinaryIO) -> _Source:
    name = getattr(file, "name", None)
    name = name if isinstance(name, str) else f"the {type(file).__name__} `video`"
    if isinstance(file, io.TextIOBase):
        raise ValueError(f"{name} is open as text: open it in binary mode ('rb')")
    if not file.seekable():
        raise ValueError(f"{name} cannot be read twice: give io.BytesIO(file.read()), or save it to a file")
    file.seek(0)
    head = file.read(16)
    return ImageFiles(name, [file]) if image_files.is_image(head) else VideoFile(name, file)


def whole_number(name: str, value: Any) -> int:
    """`value` of the argument `name`, which must be a whole number of 1 or more."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)
