"""Clips to evaluate on, whose textures are photographs that training never sees (scikit-image's own).

They need `scikit-image` (`pip install ".[eval]"`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from tritonkern.training.scenes import disturb, training_clip
from tritonkern.training.synthetic import Clip, generate_clip
from tritonkern.training.textures import photograph_crops


def photo_clips(
    count: int = 20, *, frames: int = 24, size: int = 256, points: int = 256, seed: int = 2026, speed: float = 0.75
) -> Iterator[Clip]:
    """Layers of photographs that move and deform. Each shows a random crop of a photograph."""
    crop = photograph_crops()
    for index in range(count):
        clip = generate_clip((seed, index), frames=frames, size=size, points=points, speed=speed, texture=crop)
        yield replace(clip, name=f"photographs-{index:02d}")


def relit_clips(count: int = 8, *, seed: int = 2027) -> Iterator[Clip]:
    """`photo_clips` with the photometric changes of training: gain, gamma, colour, shadow, blur, noise, compression."""
    for index, clip in enumerate(photo_clips(count, seed=seed)):
        colour = torch.from_numpy(clip.video).permute(0, 3, 1, 2).float() / 255
        video = disturb(colour, np.random.default_rng((seed, index)))
        yield replace(clip, name=f"relit-{index:02d}", video=video)


def crowded_clips(count: int = 8, *, seed: int = 2028) -> Iterator[Clip]:
    """Ten to fourteen articulated objects of photographs under a moving camera, which hide each other for long."""
    crop = photograph_crops()
    for index in range(count):
        yield replace(training_clip((seed, index), texture=crop, objects=(10, 15)), name=f"crowded-{index:02d}")


def long_clips(count: int = 2, *, seed: int = 2029) -> Iterator[Clip]:
    """`photo_clips` of 300 frames, with few points: queries in every fifth frame make two thousand of them."""
    for index, clip in enumerate(photo_clips(count, frames=300, points=32, seed=seed)):
        yield replace(clip, name=f"long-{index:02d}")


SETS: dict[str, Callable[[], Iterator[Clip]]] = {
    "photographs": photo_clips,
    "changing light, blur, noise, compression": relit_clips,
    "many occlusions": crowded_clips,
    "300 frames": long_clips,
}
