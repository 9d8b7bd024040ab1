"""Videos of moving, deforming, occluding textured layers, with exact tracks.

A clip is a background and a few cut-out sprites. Each layer carries a texture and a motion: a smooth
similarity-plus-shear path and a travelling-wave deformation. Rendering asks, for each pixel, which texture coordinate
lies there (`Motion.inverse`, closed form); a track asks where a texture coordinate went (`Motion.forward`, the fixed
point of the same map), so tracks are exact to float precision and never estimated from the picture.

Coordinates are xy in pixels, and the centre of pixel i is at i + 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tritonkern.training.textures import cut_out, procedural_texture

WAVES = 3


@dataclass(frozen=True)
class Clip:
    """One clip with its true tracks.

    `video` uint8 `[T, H, W, 3]`; `points` float32 `[N, T, 2]` xy in pixels; `occluded` bool `[N, T]` (outside the
    frame counts as occluded); `depth` uint8 `[T, H, W]`, the layer that shows (0 is the background, larger is
    nearer).
    """

    name: str
    video: np.ndarray
    points: np.ndarray
    occluded: np.ndarray
    depth: np.ndarray


class Motion:
    """Where the texture of a layer is in each frame: texture -> screen is `matrix_t @ wave_t^-1(u - origin) +
    centre_t`.
    """

    def __init__(self, rng: np.random.Generator, frames: int, origin: Tensor, start: Tensor, speed: float):
        time = torch.arange(frames, dtype=torch.float64)

        def path(drift: float, swing: float) -> Tensor:
            """A smooth random curve that starts at zero: `drift` per frame and swings of about `swing`."""
            periods = torch.from_numpy(rng.uniform(12.0, 60.0, 3))
            phases = torch.from_numpy(rng.uniform(0.0, 2 * math.pi, 3))
            sizes = torch.from_numpy(rng.normal(0.0, swing / 2, 3))
            angle = 2 * math.pi * time[:, None] / periods + phases
            curve = (sizes * angle.sin()).sum(-1) + rng.normal(0.0, drift) * time
            return curve - curve[0]

        def limited(curve: Tensor, limit: float) -> Tensor:
            return limit * torch.tanh(curve / limit)

        turn = path(0.02 * speed, 0.2 * speed) + rng.uniform(-0.3, 0.3)
        zoom = limited(path(0.008 * speed, 0.1 * speed), 0.5) + rng.uniform(-0.2, 0.2)
        shear = limited(path(0.0, 0.08 * speed), 0.3)
        sway = torch.stack([path(2.0 * speed, 16.0 * speed) for _ in range(2)], -1)
        cos, sin, scale = turn.cos(), turn.sin(), zoom.exp()
        rotation = torch.stack([cos, -sin, sin, cos], -1).view(frames, 2, 2)
        slant = torch.eye(2, dtype=torch.float64).repeat(frames, 1, 1)
        slant[:, 0, 1] = shear
        self.matrix = scale[:, None, None] * rotation @ slant
        self.centre = start + limited(sway, 160.0)
        self.origin = origin
        # Wavelength and amplitude keep the slope of the wave field under one half, which makes `forward` a contraction.
        lengths = torch.from_numpy(rng.uniform(70.0, 200.0, WAVES))
        heading = torch.from_numpy(rng.uniform(0.0, 2 * math.pi, WAVES))
        self.wave_vector = torch.stack([heading.cos(), heading.sin()], -1) * (2 * math.pi / lengths)[:, None]
        push = torch.from_numpy(rng.uniform(0.0, 2 * math.pi, WAVES))
        amplitude = torch.from_numpy(rng.uniform(0.0, 0.15, WAVES)) * lengths / (2 * math.pi) * (rng.random() < 0.6)
        self.wave_push = torch.stack([push.cos(), push.sin()], -1) * amplitude[:, None]
        self.wave_phase = torch.from_numpy(rng.uniform(0.0, 2 * math.pi, WAVES)) + time[:, None] * torch.from_numpy(
            rng.normal(0.0, 0.25 * speed, WAVES)
        )
        self.deforms = bool(amplitude.any())

    def wave(self, local: Tensor) -> Tensor:
        """Displacement `[T, ..., 2]` of layer coordinates `[T, ..., 2]`."""
        inner = (1,) * (local.ndim - 2)
        shift = torch.zeros_like(local)
        for k in range(WAVES):
            angle = local @ self.wave_vector[k].to(local) + self.wave_phase[:, k].to(local).view(-1, *inner)
            shift += angle.sin()[..., None] * self.wave_push[k].to(local)
        return shift

    def inverse(self, screen: Tensor) -> Tensor:
        """Texture coordinates `[T, ..., 2]` seen at screen positions `[T, ..., 2]`."""
        inner = (1,) * (screen.ndim - 2)
        away = screen - self.centre.to(screen).view(-1, *inner, 2)
        inverse = torch.linalg.inv(self.matrix).to(screen)
        local = (away.flatten(1, -2) @ inverse.transpose(1, 2)).view_as(away)
        if self.deforms:
            local = local + self.wave(local)
        return local + self.origin.to(screen)

    def forward(self, texture: Tensor) -> Tensor:
        """Screen positions `[T, N, 2]` of texture coordinates `[N, 2]` (float64)."""
        target = (texture - self.origin).expand(len(self.centre), -1, -1)
        local = target
        if self.deforms:
            for _ in range(40):
                local = target - self.wave(local)
        return local @ self.matrix.transpose(1, 2) + self.centre[:, None]


class Movement(Protocol):
    """What a layer needs of its motion: the two maps of `Motion`."""

    def inverse(self, screen: Tensor) -> Tensor: ...

    def forward(self, texture: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Layer:
    """`texture` float32 `[4, h, w]`: red, green, blue in [0, 1] and opacity; `motion` as above."""

    texture: Tensor
    motion: Movement

    def look_up(self, coordinates: Tensor) -> Tensor:
        """The texture at `[T, a, b, 2]` texture coordinates, `[T, 4, a, b]`. A background repeats itself mirrored."""
        height, width = self.texture.shape[1:]
        grid = coordinates.float() * torch.tensor([2.0 / width, 2.0 / height]) - 1
        padding = "reflection" if bool((self.texture[3] == 1).all()) else "zeros"
        texture = self.texture.expand(len(grid), -1, -1, -1)
        return F.grid_sample(texture, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def render(layers: list[Layer], frames: int, size: int) -> tuple[Tensor, Tensor]:
    """Paint `layers` back to front. Returns colour `[T, 3, size, size]` in [0, 1] and the layer that shows `[T, size,
    size]`.
    """
    centres = torch.arange(size) + 0.5
    screen = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).expand(frames, -1, -1, -1)
    colour = torch.zeros(frames, 3, size, size)
    shown = torch.zeros(frames, size, size, dtype=torch.uint8)
    for index, layer in enumerate(layers):
        seen = layer.look_up(layer.motion.inverse(screen))
        opacity = seen[:, 3:]
        colour = colour + opacity * (seen[:, :3] - colour)
        shown[opacity[:, 0] > 0.5] = index
    return colour, shown


def true_tracks(
    layers: list[Layer], shown: Tensor, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """`count` points that show in a random frame each, followed through the clip: points `[N, T, 2]`, occluded `[N,
    T]`.
    """
    frames, size = shown.shape[:2]
    start = torch.from_numpy(rng.integers(0, frames, count))
    place = torch.from_numpy(rng.uniform(0.0, size, (count, 2)))
    owner = shown[start, place[:, 1].long(), place[:, 0].long()]
    points = torch.zeros(count, frames, 2, dtype=torch.float64)
    occluded = torch.zeros(count, frames, dtype=torch.bool)
    for index, layer in enumerate(layers):
        mine = (owner == index).nonzero()[:, 0]
        if not len(mine):
            continue
        seen_everywhere = layer.motion.inverse(place[mine].expand(frames, -1, -1))
        texture = seen_everywhere[start[mine], torch.arange(len(mine))]
        screen = layer.motion.forward(texture)
        points[mine] = screen.transpose(0, 1)
        hidden = ((screen < 0) | (screen >= size)).any(-1)
        for nearer in layers[index + 1 :]:
            cover = nearer.look_up(nearer.motion.inverse(screen)[:, :, None])[:, 3, :, 0]
            hidden |= cover > 0.5
        occluded[mine] = hidden.transpose(0, 1)
    return points.float().numpy(), occluded.numpy()


def generate_clip(
    seed: int | tuple[int, ...],
    *,
    frames: int = 12,
    size: int = 256,
    points: int = 256,
    speed: float = 1.0,
    texture: Callable[[np.random.Generator, int], Tensor] = procedural_texture,
) -> Clip:
    """One clip, a pure function of its arguments.

    `texture(rng, size)` paints float32 `[3, size, size]` in [0, 1]; `speed` 1 moves layers by about 2 pixels a frame
    plus swings of 16 pixels. Brightness drifts, and sensor noise is added after the tracks are known.
    """
    rng = np.random.default_rng(seed)
    middle = torch.full((2,), size / 2, dtype=torch.float64)
    margin = size + size // 2
    ground = F.pad(texture(rng, margin), (0, 0, 0, 0, 0, 1), value=1.0)
    layers = [
        Layer(ground, Motion(rng, frames, torch.full((2,), margin / 2, dtype=torch.float64), middle, 0.7 * speed))
    ]
    for _ in range(int(rng.integers(2, 6))):
        side = int(rng.uniform(0.25, 0.75) * size)
        sprite = torch.cat([texture(rng, side), cut_out(rng, side)[None]])
        start = torch.from_numpy(rng.uniform(0.1 * size, 0.9 * size, 2))
        layers.append(Layer(sprite, Motion(rng, frames, torch.full((2,), side / 2, dtype=torch.float64), start, speed)))
    colour, shown = render(layers, frames, size)
    tracks, occluded = true_tracks(layers, shown, points, rng)

    time = torch.arange(frames)[:, None, None, None]
    gain = 1 + rng.normal(0, 0.1) * (2 * math.pi * time / rng.uniform(15, 60) + rng.uniform(0, 6)).sin()
    noise = torch.from_numpy(rng.standard_normal(colour.shape, dtype=np.float32)) * float(rng.uniform(0, 0.02))
    colour = (colour * gain * rng.uniform(0.8, 1.1) + rng.uniform(-0.05, 0.05) + noise).clamp(0, 1)
    video = (colour * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return Clip(f"synthetic-{seed}", video, tracks, occluded, shown.numpy())
