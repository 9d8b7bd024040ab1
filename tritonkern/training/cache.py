"""Training clips kept on disk with the features of a frozen network, so that each is rendered and encoded once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tritonkern.files import atomic_path
from tritonkern.training.scenes import partly_blurred, training_clip
from tritonkern.training.textures import procedural_texture

CLIP_FRAMES = 24


@dataclass(frozen=True)
class EncodedClip:
    """Some frames of a clip: video uint8 `[T, H, W, 3]`, features float16 `[T, h, w, C]`, points `[N, T, 2]` xy in
    pixels, occluded bool `[N, T]`.
    """

    video: Tensor
    features: Tensor
    points: Tensor
    occluded: Tensor


class ClipCache:
    """Clip `i` of `training_clip((seed, i))`, from a file of `folder`, which is written if it is missing.

    From number `soft_from` on the surfaces are `partly_blurred`. The content of a file is a function of `seed`, its
    number, `soft_from` and `encode`; a folder belongs to one of each.
    """

    def __init__(self, folder: Path, seed: int, soft_from: int, encode: Callable[[Tensor], Tensor]):
        self.folder, self.seed, self.soft_from, self.encode = folder, seed, soft_from, encode

    def path(self, index: int) -> Path:
        return self.folder / f"{self.seed}-{index:05d}.safetensors"

    def ensure(self, index: int) -> Path:
        """The file of clip `index`, made now if there is none."""
        path = self.path(index)
        if not path.exists():
            texture = partly_blurred if index >= self.soft_from else procedural_texture
            clip = training_clip((self.seed, index), frames=CLIP_FRAMES, texture=texture)
            video = torch.from_numpy(clip.video)
            with torch.inference_mode():
                features = self.encode(video[None].float() / 127.5 - 1)[0]
            content = {
                "video": video,
                "features": features.half().contiguous(),
                "points": torch.from_numpy(clip.points),
                "occluded": torch.from_numpy(clip.occluded),
            }
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as part:
                save_file(content, part)
        return path

    def read(self, index: int, start: int, stop: int, step: int = 1) -> EncodedClip:
        """Every `step`-th frame from `start` up to `stop`."""
        with safe_open(self.ensure(index), "pt") as file:
            video, features = (file.get_slice(name)[start:stop][::step] for name in ("video", "features"))
            points, occluded = (file.get_tensor(name)[:, start:stop:step] for name in ("points", "occluded"))
        return EncodedClip(video, features, points, occluded)
