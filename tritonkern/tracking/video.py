"""Frames out of any video that PyAV reads (or a folder of images), and frames into an mp4 that plays everywhere.

Everything streams: one full-size frame is alive at a time, whatever the length of the clip.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from os import PathLike
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from PIL import Image, ImageOps

DEFAULT_FPS = 24.0
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class VideoReader:
    """A video that can be read from the start any number of times.

    Args:
        source: a video file, a folder of equally large images (played in natural order: `2.png` before `10.png`),
            one image, or uint8 frames `[T, H, W, 3]` in RGB.

    Attributes:
        name: what error messages call this video.
        size: `(width, height)` in pixels, as displayed: rotation metadata is applied to the frames.
        frame_count: number of frames that the source announces, None where it does not. Only a hint for progress bars:
            containers are often wrong about it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the source is not a video, cannot be decoded or holds no frame.
    """

    name: str
    size: tuple[int, int]
    frame_count: int | None

    def __init__(self, source: str | PathLike[str] | np.ndarray) -> None:
        self._images: list[Path] = []
        self._array: np.ndarray | None = None
        self._announced_fps: float | None = None
        self._times: list[float] = []
        if isinstance(source, np.ndarray):
            self._open_array(source)
        else:
            self._open_path(Path(source))
        first = next(self._decode(), None)
        if first is None:
            raise ValueError(f"{self.name} holds no video frame: give a video with at least one frame")
        self.size = (first.shape[1], first.shape[0])

    def _open_array(self, array: np.ndarray) -> None:
        self.name = "the array `video`"
        if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8:
            raise ValueError(
                f"`video` must be uint8 RGB frames [T, H, W, 3], got {array.dtype} of shape {list(array.shape)}"
            )
        self._array = array
        self.frame_count = len(array)

    def _open_path(self, path: Path) -> None:
        self.name = str(path)
        # An absolute path can be mistaken neither for a URL ("a:b.mp4") nor for an option.
        self._path = path.absolute()
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: give the path of a video or of a folder of images")
        if path.is_dir():
            names = (p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
            self._images = sorted(names, key=_natural_order)
            if not self._images:
                raise ValueError(f"{path} holds no image: a folder of frames needs files such as 0001.png or 0001.jpg")
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            self._images = [path]
        self.frame_count = len(self._images) or None

    @property
    def fps(self) -> float:
        """Frames per second, averaged over the clip where it varies; 24 for images, which carry no time.

        The container's own figure counts until frames have been read; after that, where their time stamps contradict it
        (recordings of a browser or a phone often announce nonsense), the time stamps do.
        """
        announced = self._announced_fps
        if len(self._times) > 1 and self._times[-1] > self._times[0]:
            measured = (len(self._times) - 1) / (self._times[-1] - self._times[0])
            if announced is None or abs(announced - measured) > 0.01 * measured:
                return measured
        return announced or DEFAULT_FPS

    def frames(self, max_frames: int | None = None) -> Iterator[np.ndarray]:
        """Decode from the start: uint8 RGB frames `[H, W, 3]`, at most `max_frames` of them.

        A file that ends before the number of frames that it announces gives a `RuntimeWarning`.

        Raises:
            ValueError: a frame cannot be decoded, or has another size than the first one.
        """
        _check_max_frames(max_frames)
        for index, frame in enumerate(self._decode()):
            if (frame.shape[1], frame.shape[0]) != self.size:
                raise ValueError(
                    f"frame {index} of {self.name} is {frame.shape[1]}x{frame.shape[0]} where the first one is "
                    f"{self.size[0]}x{self.size[1]}: all frames must have one size"
                )
            yield frame
            if index + 1 == max_frames:
                return

    def count_frames(self, max_frames: int) -> int:
        """Number of frames, at most `max_frames`, without decoding: of a video file its packets, which are never fewer.

        A file that is damaged before that counts as `max_frames`: reading it says where.
        """
        _check_max_frames(max_frames)
        if self._array is not None or self._images:
            return min(len(self._images if self._array is None else self._array), max_frames)
        count = 0
        with self._open_stream() as (container, stream):
            try:
                for packet in container.demux(stream):
                    count += packet.size > 0  # the last one is empty
                    if count == max_frames:
                        break
            except av.FFmpegError:
                return max_frames
        return count

    def _decode(self) -> Iterator[np.ndarray]:
        if self._array is not None:
            yield from self._array
        elif self._images:
            yield from map(_read_image, self._images)
        else:
            yield from self._decode_file()

    @contextmanager
    def _open_stream(self) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
        try:
            container = av.open(str(self._path))
        except (av.FFmpegError, OSError) as error:
            raise ValueError(
                f"{self.name} cannot be read as a video ({error.strerror}): give a complete video"
            ) from error
        with container:
            # The cover picture of a music file poses as a video stream.
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            # FFmpeg would play a text file as the screen of a terminal.
            if container.format.name == "tty":
                raise ValueError(f"{self.name} is text: give a video, or a folder of images")
            if not streams:
                raise ValueError(f"{self.name} has no video stream: give a file with pictures, not only sound")
            yield container, streams[0]

    def _decode_file(self) -> Iterator[np.ndarray]:
        with self._open_stream() as (container, stream):
            stream.thread_type = "AUTO"
            rate = stream.average_rate or stream.guessed_rate
            self._announced_fps = float(rate) if rate else None
            self.frame_count = stream.frames or None
            self._times = []
            index = 0
            try:
                for frame in container.decode(stream):
                    if frame.time is not None:
                        self._times.append(frame.time)
                    yield _rgb(frame)
                    index += 1
            except av.FFmpegError as error:
                remedy = f"track the part before it with --max-frames {index}" if index else "is the file complete?"
                raise ValueError(
                    f"frame {index} of {self.name} cannot be decoded ({error.strerror}): {remedy}"
                ) from error
            if index < stream.frames:
                # At the level of the loop over `frames()`.
                warnings.warn(
                    f"{self.name} announces {stream.frames} frames and ends after {index}: is the file complete?",
                    RuntimeWarning,
                    stacklevel=4,
                )


class VideoWriter:
    """Writes RGB frames as H.264 in mp4, in the pixel format (yuv420p, BT.709) that every player and browser shows.

    An odd width or height grows by one repeated column or row, as that pixel format needs even sizes.

    Args:
        path: the file to write, whatever its suffix.
        fps: frames per second.

    Raises:
        OSError: the file cannot be written, for instance because the disk is full.
    """

    def __init__(self, path: str | PathLike[str], fps: float) -> None:
        self._container = av.open(str(Path(path).absolute()), "w", format="mp4", options={"movflags": "+faststart"})
        self._rate = Fraction(fps).limit_denominator(100_000)
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
        stream = self._container.add_stream("libx264", rate=self._rate, options={"crf": "18", "preset": "fast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        # 1 is BT.709 in the tables of H.273, and the limited ("MPEG") range.
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        return stream

    def close(self) -> None:
        """Flush the encoder and finish the file."""
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()

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


def _check_max_frames(max_frames: int | None) -> None:
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, got {max_frames}")


def _natural_order(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    if any(component.is_alpha for component in frame.format.components):
        image = _over_black(frame.to_ndarray(format="rgba"))
    else:
        image = frame.to_ndarray(format="rgb24")
    # `rotation` counts counter-clockwise, as does rot90.
    return np.rot90(image, round(frame.rotation / 90) % 4)


def _read_image(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.has_transparency_data:
                return _over_black(np.asarray(image.convert("RGBA")))
            return np.asarray(image.convert("RGB"))
    # Pillow's answers to damage; the size in a damaged header is often gigantic.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): is it complete?") from error


def _over_black(rgba: np.ndarray) -> np.ndarray:
    # Where a picture is transparent its colours are whatever the encoder left there.
    rgb, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
    return ((rgb * alpha + 127) // 255).astype(np.uint8)
