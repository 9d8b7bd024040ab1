"""Surfaces for synthetic videos: procedural textures with the statistics of photographs, cut-out shapes, and
photographs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from tritonkern._optional import how_to_install

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins")


def coloured_noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise with a power spectrum of 1 / f^2a, as natural images have, in three correlated channels; `[size, size,
    3]`.
    """
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1 / size
    envelope = (frequency ** -rng.uniform(0.8, 1.6))[..., None]
    spectrum = np.fft.rfft2(rng.standard_normal((size, size, 3)), axes=(0, 1)) * envelope
    field = np.fft.irfft2(spectrum, s=(size, size), axes=(0, 1))
    field = (field - field.mean()) / field.std()
    return field @ rng.normal(0, 0.6, (3, 3)) + field[..., :1]


def dead_leaves(rng: np.random.Generator, size: int) -> np.ndarray:
    """Opaque shapes falling on each other, radii following a power law (Lee, Mumford & Huang, 2001); `[size, size,
    3]`.
    """
    smooth = 2
    picture = Image.new("RGB", (size * smooth, size * smooth), tuple(int(c) for c in rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(picture)
    base = rng.uniform(0, 255, 3)
    spread = rng.uniform(30, 120)
    for _ in range(int(rng.integers(60, 400))):
        radius = smooth * min(3.0 / math.sqrt(rng.uniform(0.0005, 1.0)), size / 3)
        x, y = rng.uniform(0, size * smooth, 2)
        colour = tuple(int(c) for c in np.clip(rng.normal(base, spread), 0, 255))
        kind = rng.random()
        if kind < 0.4:
            flat = rng.uniform(0.4, 1.0)
            draw.ellipse((x - radius, y - radius * flat, x + radius, y + radius * flat), fill=colour)
        elif kind < 0.85:
            corners = int(rng.integers(3, 7))
            angles = np.sort(rng.uniform(0, 2 * math.pi, corners))
            reach = radius * rng.uniform(0.5, 1.2, corners)
            draw.polygon(
                [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(reach, angles, strict=True)], fill=colour
            )
        else:
            angle = rng.uniform(0, 2 * math.pi)
            end = (x + 4 * radius * math.cos(angle), y + 4 * radius * math.sin(angle))
            draw.line([(x, y), end], fill=colour, width=max(1, int(radius / 6)))
    picture = picture.resize((size, size), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float64) / 255


def procedural_texture(rng: np.random.Generator, size: int) -> Tensor:
    """A random surface, float32 `[3, size, size]` in [0, 1]: dead leaves, coloured noise, or one shaded by the other.

    Half of them are painted smaller and enlarged: photographs are rarely sharp to the pixel.
    """
    painted = size if rng.random() < 0.5 else int(size / rng.uniform(1.0, 3.0))
    noise = coloured_noise(rng, painted)
    if rng.random() < 0.25:
        surface = 0.5 + rng.uniform(0.08, 0.2) * noise
    else:
        surface = dead_leaves(rng, painted) + rng.uniform(0.0, 0.12) * noise
    grey = surface.mean(-1, keepdims=True)
    surface = grey + rng.uniform(0.0, 1.0) * (surface - grey)
    surface = np.clip(surface * rng.uniform(0.5, 1.0) + rng.uniform(0.0, 0.25), 0, 1)
    texture = torch.from_numpy(surface.astype(np.float32)).permute(2, 0, 1).contiguous()
    if painted == size:
        return texture
    return F.interpolate(texture[None], size=(size, size), mode="bilinear", align_corners=False)[0]


def cut_out(rng: np.random.Generator, size: int) -> Tensor:
    """Opacity of a random star-shaped blob, float32 `[size, size]`, with an edge one pixel wide."""
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(axis, axis)
    angle = np.arctan2(y, x)
    reach = np.full_like(angle, 0.75)
    for k in range(1, 6):
        reach += rng.normal(0, 0.22 / k**1.2) * np.cos(k * angle + rng.uniform(0, 2 * math.pi))
    inside = (np.clip(reach, 0.25, 0.97) - np.hypot(x, y)) * size / 2
    return torch.from_numpy(np.clip(inside + 0.5, 0, 1).astype(np.float32))


def photographs() -> list[Tensor]:
    """The photographs that ship inside scikit-image, float32 `[3, h, w]` in [0, 1]."""
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError(f"photographs need scikit-image: {how_to_install('eval')}") from error
    pictures = []
    for name in PHOTOGRAPHS:
        picture = getattr(data, name)()
        if picture.ndim == 2:
            picture = np.repeat(picture[..., None], 3, axis=2)
        pictures.append(torch.from_numpy(picture.astype(np.float32) / 255).permute(2, 0, 1).contiguous())
    return pictures


def photograph_crops() -> Callable[[np.random.Generator, int], Tensor]:
    """A texture function `(rng, size)` like `procedural_texture`: a random square of one of the `photographs`."""
    pictures = photographs()

    def crop(rng: np.random.Generator, side: int) -> Tensor:
        picture = pictures[int(rng.integers(len(pictures)))]
        shortest = min(picture.shape[1:])
        cut = int(rng.uniform(0.6, 1.0) * shortest)
        top, left = (int(rng.integers(0, extent - cut + 1)) for extent in picture.shape[1:])
        window = picture[None, :, top : top + cut, left : left + cut]
        return F.interpolate(window, size=(side, side), mode="bilinear", antialias=True)[0]

    return crop
