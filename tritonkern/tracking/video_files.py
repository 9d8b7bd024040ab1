"""Frames of a video file that FFmpeg reads, decoded one at a time.

Frames are 8-bit RGB. Grey and RGB samples of 16 bits are converted as those of image files, with one scale for the
whole clip (`tritonkern.tracking.image_files`). FFmpeg converts all others, whose formats state their bits.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from tritonkern.tracking.image_files import bits_of, over_black


class VideoFile:
    """A video file, or a seekable binary file object with its contents.

    Attributes:
        name: what error messages call the video.
        frame_count: number of frames that the container announces, None where it does not. For MP4 and MOV it is the
            number that an edit list leaves.
        fps: frames per second: what the container announces until frames have been read; after that, what their time
            stamps say where these contradict it (recordings of a browser or a phone often announce nonsense).
        pixel_aspect: width over height of a pixel when the frame is displayed.
    """

    def __init__(self, name: str, source: Path | BinaryIO) -> None:
        self.name = name
        # An absolute path can be mistaken neither for a URL ("a:b.mp4") nor for an option.
        self._source = source.absolute() if isinstance(source, Path) else source
        self._times: tuple[float, float, int] | None = None  # first, last, and how many
        with self._open() as (_, stream):
            rate = stream.average_rate or stream.guessed_rate
            self._announced_fps = float(rate) if rate else None
            self.frame_count = _announced_frames(stream)
            aspect = stream.sample_aspect_ratio
            self.pixel_aspect = Fraction(aspect) if aspect else Fraction(1)
        self._turned = False
        self._bits: int | None = None

    @property
    def fps(self) -> float | None:
        announced = self._announced_fps
        first, last, count = self._times or (0.0, 0.0, 0)
        if last > first:
            measured = (count - 1) / (last - first)
            if announced is None or abs(announced - measured) > 0.01 * measured:
                return measured
        return announced

    def count(self, limit: int) -> int:
        """Number of frames, at most `limit`, without decoding: the number of packets, which is never smaller.

        A file that is damaged before that counts as `limit`: reading it reports the damage.
        """
        count = 0
        with self._open() as (container, stream):
            try:
                for packet in container.demux(stream):
                    # The last packet is empty; an edit list discards others.
                    count += packet.size > 0 and not packet.is_discard
                    if count == limit:
                        break
            except av.FFmpegError:
                return limit
        return count

    def frames(self) -> Iterator[np.ndarray]:
        """uint8 RGB `[H, W, 3]`, as displayed: rotation metadata is applied."""
        with self._open() as (container, stream):
            stream.thread_type = "AUTO"
            self._times = None
            index = 0
            decoded = container.decode(stream)
            while True:
                try:
                    frame = next(decoded, None)
                    if frame is None:
                        break
                    if frame.time is not None:
                        first, _, count = self._times or (frame.time, frame.time, 0)
                        self._times = first, frame.time, count + 1
                    picture = self._rgb(frame)
                # Damaged bytes: FFmpeg's errors, and PyAV's own about sizes and formats that make no sense.
                except Exception as error:
                    remedy = f"track the part before it with --max-frames {index}" if index else "is the file complete?"
                    raise ValueError(
                        f"frame {index} of {self.name} cannot be decoded ({_reason(error)}): {remedy}"
                    ) from error
                yield picture
                index += 1
            if self.frame_count is not None and index < self.frame_count:
                # Reported at the level of the loop over `VideoReader.frames()`.
                warnings.warn(
                    f"{self.name} announces {self.frame_count} frames and ends after {index}: is the file complete?",
                    RuntimeWarning,
                    stacklevel=4,
                )

    @contextmanager
    def _open(self) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
        with ExitStack() as stack:
            try:
                container = stack.enter_context(av.open(self._file(stack), "r", metadata_errors="ignore"))
            except Exception as error:
                raise ValueError(
                    f"{self.name} cannot be read as a video ({_reason(error)}): give a complete video"
                ) from error
            # The cover picture of a music file poses as a video stream.
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            # FFmpeg would play a text file as the screen of a terminal.
            if container.format.name == "tty":
                raise ValueError(f"{self.name} is text: give a video, or a folder of images")
            if not streams:
                raise ValueError(f"{self.name} has no video stream: give a file with pictures, not only sound")
            if streams[0].codec_context is None:
                raise ValueError(f"{self.name} has a video stream in a format that this FFmpeg cannot decode")
            yield container, streams[0]

    def _file(self, stack: ExitStack) -> str | BinaryIO:
        if not isinstance(self._source, Path):
            self._source.seek(0)
            return self._source
        name = str(self._source)
        try:
            name.encode()
        except UnicodeEncodeError:
            # PyAV only takes names that are valid UTF-8.
            return stack.enter_context(open(self._source, "rb"))
        return name

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        if _is_deep(frame):
            if self._bits is None:
                self._bits = bits_of(self.name, self._largest_sample())
            image: np.ndarray = (_deep_samples(frame) >> (self._bits - 8)).astype(np.uint8)
        elif any(component.is_alpha for component in frame.format.components):
            image = over_black(frame.to_ndarray(format="rgba"))
        else:
            image = frame.to_ndarray(format="rgb24")
        # `rotation` counts counter-clockwise, as rot90 does.
        quarters = round(frame.rotation / 90) % 4
        if quarters % 2 and not self._turned:
            self.pixel_aspect, self._turned = 1 / self.pixel_aspect, True
        return np.rot90(image, quarters)

    def _largest_sample(self) -> int:
        """Read the clip once; a frame that cannot be decoded ends it, which `frames` reports."""
        largest = 0
        with self._open() as (container, stream), suppress(av.FFmpegError):
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if _is_deep(frame):
                    largest = max(largest, int(_deep_samples(frame).max()))
        return largest


def _is_deep(frame: av.VideoFrame) -> bool:
    """Whether it is grey or RGB of 16 bits: the format of whatever has more than 8, scaled or not."""
    components = frame.format.components
    integers = "f16" not in frame.format.name
    return integers and components[0].bits == 16 and (frame.format.is_rgb or len(components) < 3)


def _deep_samples(frame: av.VideoFrame) -> np.ndarray:
    """uint16 RGB `[H, W, 3]`."""
    components = frame.format.components
    if len(components) == 1:
        return np.repeat(frame.to_ndarray(format="gray16le")[..., None], 3, axis=-1)
    if len(components) == 3:
        return frame.to_ndarray(format="rgb48le")
    return over_black(frame.to_ndarray(format="rgba64le"))


def _announced_frames(stream: av.VideoStream) -> int | None:
    # The index of an MP4 or MOV has the edit list applied; the number in its header counts what this cuts off, too.
    if stream.frames and "mp4" in stream.container.format.name and stream.index_entries:
        return sum(not entry.is_discard for entry in stream.index_entries)
    return stream.frames or None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
