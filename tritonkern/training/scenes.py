"""Scenes to train on: a moving camera, planes in perspective, articulated objects, and what happens to the picture.

The layers, their rendering and their exact tracks are those of `tritonkern.training.synthetic`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tritonkern.training.synthetic import Clip, Layer, Motion, Movement, render, true_tracks
from tritonkern.training.textures import cut_out, procedural_texture

Texture = Callable[[np.random.Generator, int], Tensor]
_SIZE = 256
_NEAREST = 0.15
"""Smallest depth, relative to that of the centre, at which a point of a plane in perspective is placed."""


class PlanarMotion(Motion):
    """A `Motion` seen in perspective: v = matrix_t @ wave_t^-1(u - origin), screen = centre_t + v / (1 + tilt_t . v).

    `turn` is added to the rotation in every frame, in radians; `tilt` is the largest tilt, in 1 / pixels.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        frames: int,
        origin: Tensor,
        start: Tensor,
        speed: float,
        *,
        turn: float = 0.0,
        tilt: float = 6e-4,
    ):
        super().__init__(rng, frames, origin, start, speed)
        time = torch.arange(frames, dtype=torch.float64)
        # [T, 2], in 1 / pixels
        period, phase = (torch.from_numpy(rng.uniform(low, high, 2)) for low, high in ((15, 80), (0, 2 * math.pi)))
        self.tilt = (
            tilt * torch.from_numpy(rng.uniform(-1, 1, 2)) * (2 * math.pi * time[:, None] / period + phase).sin()
        )
        angle = turn * time
        roll = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2)
        self.matrix = roll @ self.matrix

    def inverse(self, screen: Tensor) -> Tensor:
        inner = (1,) * (screen.ndim - 2)
        centre, tilt = (x.to(screen).view(-1, *inner, 2) for x in (self.centre, self.tilt))
        away = screen - centre
        return super().inverse(centre + away / (1 - (tilt * away).sum(-1, keepdim=True)).clamp(min=_NEAREST))

    def forward(self, texture: Tensor) -> Tensor:
        flat = super().forward(texture) - self.centre[:, None]
        depth = 1 + (self.tilt[:, None] * flat).sum(-1, keepdim=True)
        return self.centre[:, None] + flat / depth.clamp(min=_NEAREST)


class JointMotion:
    """The motion `inner`, of a part, carried by the motion `outer`, of a body or of the camera."""

    def __init__(self, outer: Movement, inner: Movement):
        self.outer, self.inner = outer, inner

    def inverse(self, screen: Tensor) -> Tensor:
        """Texture coordinates `[T, ..., 2]` seen at screen positions `[T, ..., 2]`."""
        return self.inner.inverse(self.outer.inverse(screen))

    def forward(self, texture: Tensor) -> Tensor:
        """Screen positions `[T, N, 2]` of texture coordinates `[N, 2]` (float64)."""
        return self.outer.forward(self.inner.forward(texture))


def training_clip(
    seed: int | tuple[int, ...],
    *,
    frames: int = 24,
    points: int = 256,
    texture: Texture = procedural_texture,
    objects: tuple[int, int] = (2, 8),
) -> Clip:
    """One 256x256 clip to learn from, a pure function of its arguments.

    A background and `objects[0]` to `objects[1] - 1` objects with the surfaces of `texture(rng, size)`, each a plane
    that moves in perspective and may deform; half of the objects carry up to three parts that turn on them, and some
    are large or thin and hide others for long. A camera pans, zooms and in a third of the clips rolls, so that points
    leave the frame and come back. Gain, gamma, colour, shadows, blur, noise and JPEG compression change the picture
    after the tracks are known.
    """
    rng = np.random.default_rng(seed)
    speed = float(rng.uniform(0.15, 1.6))
    middle = torch.full((2,), _SIZE / 2, dtype=torch.float64)
    roll = rng.normal(0, 0.05) if rng.random() < 0.35 else 0.0
    camera = PlanarMotion(rng, frames, middle, middle, 0.7 * speed * rng.uniform(0, 1), turn=roll, tilt=2e-4)
    camera.deforms = False

    margin = 2 * _SIZE
    ground = F.pad(texture(rng, margin), (0, 0, 0, 0, 0, 1), value=1.0)
    centre = torch.full((2,), margin / 2, dtype=torch.float64)
    layers = [Layer(ground, JointMotion(camera, PlanarMotion(rng, frames, centre, middle, 0.4 * speed)))]
    for _ in range(int(rng.integers(*objects))):
        layers += _thing(rng, frames, camera, speed, texture)
    colour, shown = render(layers, frames, _SIZE)
    tracks, occluded = true_tracks(layers, shown, points, rng)
    return Clip(f"training-{seed}", disturb(colour, rng), tracks, occluded, shown.numpy())


def _thing(rng: np.random.Generator, frames: int, camera: Movement, speed: float, texture: Texture) -> list[Layer]:
    side = int(rng.uniform(0.2, 0.8) * _SIZE)
    start = torch.from_numpy(rng.uniform(0.05 * _SIZE, 0.95 * _SIZE, 2))
    body = JointMotion(camera, PlanarMotion(rng, frames, _middle(side), start, speed * rng.uniform(0.3, 1.5)))
    layers = [Layer(_sprite(rng, side, texture), body)]
    for _ in range(int(rng.integers(1, 4)) if rng.random() < 0.5 else 0):
        part = int(rng.uniform(0.3, 0.8) * side)
        # The part turns about a point near its upper edge, which is fixed to the body.
        pivot = torch.tensor([part / 2, 0.2 * part], dtype=torch.float64)
        place = torch.from_numpy(rng.uniform(0.25 * side, 0.75 * side, 2))
        joint = PlanarMotion(rng, frames, pivot, place, speed, turn=rng.normal(0, 0.03), tilt=0.0)
        joint.centre = place.expand(frames, 2)
        layers.append(Layer(_sprite(rng, part, texture), JointMotion(body, joint)))
    return layers


def partly_blurred(rng: np.random.Generator, size: int) -> Tensor:
    """A procedural texture, of which a part without sharp borders is blurred, and the contrast of all is lowered."""
    sharp = procedural_texture(rng, size)
    coarse = max(4, int(size / rng.uniform(4, 24)))

    def resize(image: Tensor, side: int) -> Tensor:
        return F.interpolate(image[None], size=(side, side), mode="bilinear", antialias=True, align_corners=False)[0]

    blurred = resize(resize(sharp, coarse), size)
    where = resize(torch.from_numpy(rng.normal(0, 1, (1, 6, 6))).float(), size)
    mixed = torch.lerp(sharp, blurred, (6 * (where + rng.uniform(-0.4, 0.4))).sigmoid())
    return (0.5 + rng.uniform(0.4, 1.0) * (mixed - 0.5)).clamp(0, 1)


def _middle(side: int) -> Tensor:
    return torch.full((2,), side / 2, dtype=torch.float64)


def _sprite(rng: np.random.Generator, side: int, texture: Texture) -> Tensor:
    opacity = cut_out(rng, side)
    if rng.random() < 0.25:
        # A bar, as of a fence or a pole
        across = torch.arange(side) + 0.5 - side / 2
        opacity = (rng.uniform(0.06, 0.2) * side - across.abs() + 0.5).clamp(0, 1).float().expand(side, side).clone()
        opacity[:, 0] = opacity[:, -1] = 0
    return torch.cat([texture(rng, side), opacity[None]])


def disturb(colour: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Frames `[T, 3, H, W]` in [0, 1] as a camera and a codec deliver them, uint8 `[T, H, W, 3]`."""
    frames, _, height, width = colour.shape
    time = torch.arange(frames)[:, None, None, None]

    def wave(size: float, shape: tuple[int, ...] = ()) -> Tensor:
        angle = 2 * math.pi * time / rng.uniform(12, 60) + torch.from_numpy(rng.uniform(0, 2 * math.pi, shape or 1))
        return (size * angle.sin()).float()

    if rng.random() < 0.5:
        colour = colour.clamp(1e-4, 1) ** (math.exp(rng.normal(0, 0.25)) * (1 + wave(rng.uniform(0, 0.2))))
    tint = torch.from_numpy(rng.normal(1, 0.05, (1, 3, 1, 1))).float()
    colour = colour * tint * (rng.uniform(0.75, 1.1) + wave(abs(rng.normal(0, 0.12)))) + rng.uniform(-0.08, 0.08)
    if rng.random() < 0.3:
        # A soft shadow that wanders over the scene, brighter or darker by up to 60 %
        coarse = torch.from_numpy(rng.normal(0, 1, (1, 1, 4, 4))).float()
        field = F.interpolate(coarse, size=(2 * height, 2 * width), mode="bicubic", align_corners=False)[0, 0]
        step = rng.uniform(-6, 6, 2)
        top, left = (
            (2 * s - s) / 2 + v * (time.flatten() - frames / 2) for s, v in zip((height, width), step, strict=True)
        )
        shade = torch.stack(
            [field[int(y) : int(y) + height, int(x) : int(x) + width] for y, x in zip(top, left, strict=True)]
        )
        colour = colour * (1 + rng.uniform(0.05, 0.3) * shade[:, None].clamp(-2, 2))
    if rng.random() < 0.5:
        colour = _blur(colour, float(rng.uniform(0.3, 1.4)))
    colour = colour + float(abs(rng.normal(0, 0.015))) * torch.from_numpy(
        rng.standard_normal(colour.shape, dtype=np.float32)
    )
    video = (colour.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    if rng.random() < 0.4:
        quality = int(rng.integers(25, 90))
        video = np.stack([_compress(frame, quality) for frame in video])
    return video


def _blur(colour: Tensor, sigma: float) -> Tensor:
    reach = torch.arange(-4, 5, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (reach / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(colour, (4, 4, 4, 4), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def _compress(frame: np.ndarray, quality: int) -> np.ndarray:
    packed = io.BytesIO()
    Image.fromarray(frame).save(packed, "JPEG", quality=quality)
    return np.asarray(Image.open(packed))
