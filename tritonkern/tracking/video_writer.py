"""Frames into an mp4 that plays everywhere."""

import os
from contextlib import suppress
from fractions import Fraction
from os import PathLike
from pathlib import Path
from types import TracebackType

import av
import numpy as np


class VideoWriter:
    """Writes RGB frames as H.264 in mp4, in the pixel format (yuv420p, BT.709) that every player and browser shows.

    An odd width or height grows by one repeated column or row, as that pixel format needs even sizes.

    Args:
        path: the file to write, whatever its suffix.
        fps: frames per second.
        pixel_aspect: width over height of a pixel when the frame is displayed.
        crf: constant rate factor of x264; smaller files and less quality above 18.

    Raises:
        OSError: the file cannot be written, for instance because the disk is full.
    """

    def __init__(
        self, path: str | PathLike[str], fps: float, pixel_aspect: Fraction = Fraction(1), crf: int = 18
    ) -> None:
        self._descriptor: int | None = None
        name = str(Path(path).absolute())
        try:
            name.encode()
        except UnicodeEncodeError:
            # PyAV only takes names that are valid UTF-8. FFmpeg opens the file twice, to move its index to the front.
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            name = f"/proc/self/fd/{self._descriptor}"
        self._container = av.open(name, "w", format="mp4", options={"movflags": "+faststart"})
        self._rate = Fraction(fps).limit_denominator(100_000)
        self._pixel_aspect = pixel_aspect
        self._crf = str(crf)
        self._stream: av.VideoStream | None = None

    def write(self, frame: np.ndarray) -> None:
        """Append one uint8 RGB frame `[H, W, 3]`; all frames have the size of the first."""
        height, width = frame.shape[:2]
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._stream is None:
            self._stream = self._open_stream(frame.shape[1], frame.shape[0])
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = picture.reformat(
            format="yuv420p", dst_colorspace="itu709", src_color_range="JPEG", dst_color_range="MPEG"
        )
        self._container.mux(self._stream.encode(picture))

    def _open_stream(self, width: int, height: int) -> av.VideoStream:
        stream = self._container.add_stream("libx264", rate=self._rate, options={"crf": self._crf, "preset": "fast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.sample_aspect_ratio = self._pixel_aspect
        # 1 is BT.709 in the tables of H.273, and the limited ("MPEG") range.
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        return stream

    def close(self) -> None:
        """Flush the encoder and finish the file."""
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        self._close_descriptor()

    def _close_descriptor(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            with suppress(av.FFmpegError):
                self._container.close()
            self._close_descriptor()
