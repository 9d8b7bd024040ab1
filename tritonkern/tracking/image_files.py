"""Frames of image files: a folder of stills, or one file that may hold a sequence (APNG, WebP, AVIF, TIFF stack).

Frames are 8-bit RGB. Files with more bits per sample are converted with one scale for the whole clip: a float sample
must be in 0..1 and is multiplied by 255; an integer sample of b bits loses its b - 8 lowest bits, where b is the
smallest of 8, 10, 12, 14 and 16 that holds every sample of the clip. Where b is not 16 a `UserWarning` states it.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from PIL import ExifTags, Image

SUFFIXES = frozenset({".apng", ".avif", ".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# Formats of which FFmpeg reads the first frame alone, or not all bits: PNG, TIFF (also of more than 4 GB), WebP, AVIF.
_SEQUENCE = re.compile(rb"\x89PNG|II[*+]\0|MM\0[*+]|RIFF....WEBP|....ftypavi[fs]", re.DOTALL)
_STILL = re.compile(rb"BM|\xff\xd8\xff|P[1-6]\s")
_BITS = (8, 10, 12, 14, 16)


class _Refused(ValueError):
    """The file can be decoded, but its frames would be wrong."""


class ImageFiles:
    """The frames of image files; see the module for bits per sample.

    Attributes:
        name: what error messages call the clip.
        frame_count: number of frames.
        fps: frames per second of an animation that states durations, else None.
        pixel_aspect: 1, as pixels of images are taken as square.
    """

    pixel_aspect = Fraction(1)

    def __init__(self, name: str, files: Sequence[Path | BinaryIO]) -> None:
        self.name = name
        self._files = files
        self._bits: int | None = None
        self.fps: float | None = None
        self.frame_count = len(files)
        if len(files) == 1:
            with _readable(name, files[0]) as image:
                self.frame_count = _page_count(image) - _first_page(image)

    @classmethod
    def in_folder(cls, folder: Path) -> "ImageFiles":
        """The images of a folder in natural order: `2.png` before `10.png`."""
        names: list[Any] = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
        if not names:
            raise ValueError(f"{folder} holds no image: a folder of frames needs files such as 0001.png or 0001.jpg")
        names.sort(key=_natural_order)
        return cls(str(folder), names)

    def count(self, limit: int) -> int:
        """Number of frames, at most `limit`."""
        return min(self.frame_count, limit)

    def frames(self) -> Iterator[np.ndarray]:
        """uint8 RGB `[H, W, 3]`, one frame at a time."""
        for samples in self._samples():
            yield samples if samples.dtype == np.uint8 else self._to_8_bits(samples)

    def _samples(self) -> Iterator[np.ndarray]:
        """uint8 RGB frames as they are; deep ones as `[H, W]` or `[H, W, 3]` of another dtype."""
        single = len(self._files) == 1
        for file in self._files:
            name = self.name if single else str(file)
            with _readable(name, file) as image:
                first, pages = _first_page(image), _page_count(image)
                if pages - first > 1 and not single:
                    raise _Refused(
                        f"{name} holds {pages - first} frames: every file of a folder must hold one; give the file "
                        "itself, or unpack it"
                    )
                milliseconds = 0.0
                for page in range(first, pages):
                    image.seek(page)
                    yield _decode(image, file, name, alone=pages == 1)
                    # Known once the frame is decoded. The last duration ends the clip and starts no frame.
                    if page < pages - 1:
                        milliseconds += float(image.info.get("duration") or 0)
                if single and milliseconds > 0:
                    self.fps = 1000 * (pages - first - 1) / milliseconds

    def _to_8_bits(self, samples: np.ndarray) -> np.ndarray:
        if self._bits is None:
            self._bits = self._find_bits()
        if samples.dtype.kind == "f":
            grey = np.rint(samples * 255).astype(np.uint8)
        else:
            grey = (samples >> (self._bits - 8)).astype(np.uint8)
        return grey if grey.ndim == 3 else np.repeat(grey[..., None], 3, axis=-1)

    def _find_bits(self) -> int:
        """Read the clip once for the range of its samples. Floats in 0..1 have 8 bits after multiplication."""
        ranges: dict[str, tuple[float, float]] = {}
        for samples in self._samples():
            if samples.dtype != np.uint8:
                kind = "float" if samples.dtype.kind == "f" else "integer"
                low, high = ranges.get(kind, (np.inf, -np.inf))
                # A NaN stays, so that the comparisons below refuse it.
                ranges[kind] = (min(samples.min().item(), low), max(samples.max().item(), high))
                if np.isnan(samples).any():
                    ranges[kind] = (np.nan, np.nan)
        if len(ranges) > 1:
            raise _Refused(f"{self.name} mixes float and integer samples: convert all of them to 8 bits")
        ((kind, (low, high)),) = ranges.items()
        if kind == "float":
            if not (low >= 0 and high <= 1):
                raise _Refused(
                    f"{self.name} has float samples from {low:g} to {high:g}, and only 0..1 has an agreed brightness: "
                    "convert them to 0..1 or to 8 bits"
                )
            return 8
        if low < 0 or high > 65535:
            raise _Refused(
                f"{self.name} has integer samples from {low:g} to {high:g}: convert them to 8 or 16 bits without sign"
            )
        return bits_of(self.name, int(high))


def bits_of(name: str, largest: int) -> int:
    """The bits per sample of a clip whose largest sample is this; a warning states them where they are not 16."""
    bits = next(b for b in _BITS if largest < 1 << b)
    if bits < 16:
        warnings.warn(
            f"{name} has samples of more than 8 bits whose largest is {largest}: they are read as {bits}-bit samples, "
            f"so that {(1 << bits) - 1} becomes 255",
            UserWarning,
            stacklevel=3,
        )
    return bits


def is_image(head: bytes) -> bool:
    """Whether a file that starts with `head` (12 bytes or more) is an image for `ImageFiles`."""
    return bool(_SEQUENCE.match(head) or _STILL.match(head))


def is_sequence(path: Path) -> bool:
    """Whether the contents, whatever the name, are in a format that must be read by `ImageFiles`."""
    with open(path, "rb") as file:
        return _SEQUENCE.match(file.read(16)) is not None


class _readable:
    """Open an image; whatever Pillow raises about its contents becomes a `ValueError` that names the file."""

    def __init__(self, name: str, file: Path | BinaryIO) -> None:
        self._name, self._file = name, file

    def __enter__(self) -> Image.Image:
        self._opened: Any = None
        try:
            # Given a path, Pillow maps uncompressed TIFF files, and shears those that EXIF data turn by 90 degrees.
            self._opened = open(self._file, "rb") if isinstance(self._file, Path) else self._file
            self._opened.seek(0)
            return Image.open(self._opened)
        except Exception as error:
            self._close()
            raise self._unreadable(error) from error

    def _close(self) -> None:
        if isinstance(self._file, Path) and self._opened is not None:
            self._opened.close()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._close()
        # Damaged bytes make Pillow fail with nearly any exception class (SyntaxError, struct.error, OSError).
        if isinstance(error, Exception) and not isinstance(error, _Refused):
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ValueError:
        reason = str(error) or type(error).__name__
        return ValueError(f"{self._name} cannot be read as an image ({reason}): is it complete?")


def _page_count(image: Image.Image) -> int:
    # The further pictures of an MPO file, which cameras call .jpg, are previews or the other eye's.
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def _first_page(image: Image.Image) -> int:
    # An APNG may start with a picture for programs that show no animations.
    return 1 if image.info.get("default_image") else 0


def _decode(image: Any, file: Path | BinaryIO, name: str, *, alone: bool) -> np.ndarray:
    raw_mode = image.tile[0].args if image.tile else None
    if isinstance(raw_mode, tuple):
        raw_mode = raw_mode[0]
    if isinstance(raw_mode, str) and ";16" in raw_mode and not image.mode.startswith("I"):
        # Pillow drops the low byte of 16-bit colours.
        if not alone:
            raise _Refused(f"{name} holds several pages of 16-bit colours: convert them to 8 bits")
        return turned(_decode_deep_colours(file), image)
    return samples_of(image)


def samples_of(image: Image.Image) -> np.ndarray:
    """uint8 RGB `[H, W, 3]` of an image, turned as its EXIF data say; the samples `[H, W]` of one of more bits."""
    if image.mode == "F" or image.mode.startswith("I"):
        return turned(np.asarray(image), image)
    if image.has_transparency_data:
        return turned(over_black(np.asarray(image.convert("RGBA"))), image)
    return turned(np.asarray(image.convert("RGB")), image)


_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 3),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: np.rot90,
}
"""What the EXIF orientations ask for."""


def turned(samples: np.ndarray, image: Image.Image) -> np.ndarray:
    """Samples `[H, W, ...]` of `image`, turned as its EXIF data say."""
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return samples if turn is None else turn(samples)


def _decode_deep_colours(file: Path | BinaryIO) -> np.ndarray:
    """uint16 RGB `[H, W, 3]`, as stored."""
    opened = open(file, "rb") if isinstance(file, Path) else file
    try:
        opened.seek(0)
        with av.open(opened, "r") as container:
            frame = next(container.decode(video=0))
            return over_black(frame.to_ndarray(format="rgba64le"))
    finally:
        if opened is not file:
            opened.close()


def over_black(rgba: np.ndarray) -> np.ndarray:
    """Unsigned integers RGBA `[H, W, 4]` over black. Where a picture is transparent its colours are arbitrary."""
    white = np.iinfo(rgba.dtype).max
    rgb, alpha = rgba[..., :3].astype(np.uint64), rgba[..., 3:].astype(np.uint64)
    return ((rgb * alpha + white // 2) // white).astype(rgba.dtype)


def _natural_order(path: Any) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]
