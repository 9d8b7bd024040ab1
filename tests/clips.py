"""Tiny videos that the tests of tracking make for themselves, and a tracker that needs no training."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tritonkern.models.matching import MatchingTracker
from tritonkern.tracking import VideoWriter


class ColourTracker(MatchingTracker):
    """Matches the colour of 4x4-pixel cells; sees a point wherever its colour is found almost exactly."""

    resolution = (64, 64)

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            # Visible from a similarity of 0.9 on.
            self.occ_linear.weight.copy_(torch.tensor([[0.0, -100.0, 0.0], [0.0, 0.0, 0.0]]))
            self.occ_linear.bias.copy_(torch.tensor([90.0, -50.0]))

    def features(self, video: Tensor) -> Tensor:
        cells = F.avg_pool2d(video.flatten(0, 1).movedim(-1, 1), 4).movedim(1, -1)
        return F.normalize(cells, dim=-1).unflatten(0, video.shape[:2])


def square_clip(frames: int = 8, size: tuple[int, int] = (96, 64), step: int = 4) -> np.ndarray:
    """A red 16x16 square that moves `step` pixels right a frame over blue: uint8 `[T, H, W, 3]`.

    The centre of the square in frame t is (16 + step * t, height / 2).
    """
    width, height = size
    clip = np.zeros((frames, height, width, 3), dtype=np.uint8)
    clip[..., 2] = 255
    for t in range(frames):
        clip[t, height // 2 - 8 : height // 2 + 8, 8 + step * t : 24 + step * t] = (255, 0, 0)
    return clip


def write_clip(
    path: Path,
    clip: np.ndarray,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv444p",
    rate: int = 10,
    times: list[int] | None = None,
) -> Path:
    """Encode uint8 `[T, H, W, 3 or 4]`; `times` are the frames' time stamps in milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], pix_fmt
        if codec == "libx264":
            stream.options = {"crf": "5"}
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for index, image in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(image, format="rgba" if image.shape[2] == 4 else "rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_cut_clip(path: Path) -> Path:
    """An mp4 of 20 frames that was cut in the middle, its index at the front: the frames before the cut play."""
    with VideoWriter(path, 10) as writer:
        for frame in np.random.default_rng(0).integers(0, 255, (20, 64, 96, 3), dtype=np.uint8):
            writer.write(frame)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def rotate_display(path: Path) -> Path:
    """Mark an mp4 as to be shown a quarter turn clockwise, as a phone does, by its track header's matrix."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    data[matrix : matrix + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def write_sound(path: Path) -> Path:
    """A file with an audio stream only."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
