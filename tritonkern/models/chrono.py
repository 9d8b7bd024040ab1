"""Chrono, the point tracker whose features attend along time (Kim et al., CVPR 2025)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonkern.functional._arguments import autocast_dtype
from tritonkern.models._streaming import Frames, StreamedTracker
from tritonkern.models.checkpoints import load_strict, read_state_dict
from tritonkern.models.dinov2 import DINOv2, DINOv2Config, infer_config
from tritonkern.models.matching import MatchingTracker
from tritonkern.nn import TemporalAdapter
from tritonkern.nn._plain import has_hooks

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Chrono(StreamedTracker, MatchingTracker):  # type: ignore[misc]  # as MatchingTracker
    """DINOv2 with a temporal adapter after every block but the last, and the matching head of `MatchingTracker`.

    Computes in the dtype of its weights, float32 unless converted, on every device. The published numbers were measured
    under `torch.autocast("cuda", torch.bfloat16)`; wrap the call in it for that speed and accuracy. On a GPU the
    features then have that dtype; their correlations are sums in float32, which the official code rounds.

    Args:
        variant: the backbone, a name of `DINOV2_CONFIGS` or a `DINOv2Config`. Published are "vits14" and "vitb14".
        hidden: channels inside the adapters.

    Weights are random; see `from_checkpoint`.
    """

    resolution = (256, 256)
    cells: int = 64
    """Rows and columns of the feature grid; frames are resized to `cells` patches a side (64 x 14 = 896 pixels)."""

    def __init__(self, variant: str | DINOv2Config = "vitb14", hidden: int = 128) -> None:
        super().__init__()
        self.dino = DINOv2(variant)
        config = self.dino.config
        self.adapter = nn.ModuleList(TemporalAdapter(config.dim, hidden) for _ in range(config.depth - 1))

    @classmethod
    def from_checkpoint(cls, path: str | Path, variant: str | DINOv2Config | None = None) -> Chrono:
        """The model of an official checkpoint, in evaluation mode on the CPU.

        Args:
            path: a Lightning checkpoint of the official code (`.ckpt`), or its tensors alone (.pth, .safetensors), with
                or without the prefix `model.`.
            variant: the backbone; None infers it from the shapes.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file cannot be read, or its keys or shapes are not exactly those of the model; the message
                lists what is missing, unexpected or of another shape.
        """
        state = read_state_dict(path)
        if variant is None:
            backbone = {key.removeprefix("dino."): value for key, value in state.items() if key.startswith("dino.")}
            if not backbone:
                raise ValueError(
                    f"{path} holds no Chrono weights: keys dino.*, adapter.* and occ_linear.* are needed, "
                    f"found {', '.join(list(state)[:4])}, ..."
                )
            variant = infer_config(backbone, str(path))
        first = state.get("adapter.0.conv1.weight")
        hidden = {} if first is None or first.ndim != 4 else {"hidden": first.shape[0]}
        with torch.device("meta"):
            model = cls(variant, **hidden)
        load_strict(model, state, str(path))
        return model.eval()

    def features(self, video: Tensor) -> Tensor:
        """Unit-norm features `[B, T, 64, 64, C]` of a video `[B, T, 256, 256, 3]` in [-1, 1].

        float32 (float64 for float64 weights); the dtype of autocast where that is on for a GPU.
        """
        return self.dino.with_hooks(self._features, video)

    def _features(self, video: Tensor) -> Tensor:
        batch, frames = video.shape[:2]
        dino, grid = self.dino, (self.cells, self.cells)
        tokens = 1 + dino.config.num_registers + self.cells**2
        last = len(dino.blocks) - 1
        embed = partial(self._embed, positions=dino.position_embedding(*grid))
        # From frame to token a few frames at a time: at 896 x 896 the images alone would be larger than the tokens.
        x = dino.per_frame(embed, dino.patch_embed, video.flatten(0, 1), tokens)
        (x,) = dino.run_blocks(x, video.shape[:2], grid, {last}, list(self.adapter), norm=False)
        return dino.per_frame(self._unit_features, dino.norm, x, tokens).unflatten(0, (batch, frames))

    def _stages(self) -> list[Callable[[Frames], Any]]:
        if has_hooks(self.dino):
            raise ValueError("step needs a backbone without hooks, which see whole clips; remove them from dino")

        def first(frame: Frames) -> Frames:
            positions = self.dino.position_embedding(self.cells, self.cells)
            return (self._embed(frame[0].flatten(0, 1), positions).unflatten(0, frame[0].shape[:2]),)

        def block(number: int, frame: Frames) -> Frames:
            return (self.dino.blocks[number](frame[0].flatten(0, 1)).unflatten(0, frame[0].shape[:2]),)

        def last(frame: Frames) -> Tensor:
            tokens = block(-1, frame)[0]
            return self._unit_features(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])

        middle = [partial(block, number) for number in range(1, len(self.adapter))]
        return [lambda frame: block(0, first(frame)), *middle, last] if self.adapter else [lambda x: last(first(x))]

    def _adapters(self) -> list[tuple[TemporalAdapter, tuple[int, int]]]:
        return [(cast(TemporalAdapter, adapter), (self.cells, self.cells)) for adapter in self.adapter]

    def _embed(self, frames: Tensor, positions: Tensor) -> Tensor:
        """Frames `[N, 256, 256, 3]` in [-1, 1] -> what enters the first block of DINOv2."""
        frames = frames.to(positions.dtype)
        mean, std = (_channels(values, frames) for values in (IMAGENET_MEAN, IMAGENET_STD))
        images = (((frames + 1) / 2 - mean) / std).movedim(-1, 1)
        size = self.cells * self.dino.config.patch_size
        return self.dino.embed(F.interpolate(images, size=(size, size), mode="bilinear"), positions)

    def _unit_features(self, x: Tensor) -> Tensor:
        """All tokens after the last block -> unit-norm features `[N, 64, 64, C]` of the patches."""
        tokens = self.dino.norm(x)[:, 1 + self.dino.config.num_registers :]
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).unflatten(1, (self.cells, self.cells))
        unit = tokens / tokens.square().sum(-1, keepdim=True).clamp(min=1e-6).sqrt()
        # A GPU multiplies 16-bit features on its matrix units; their products and sums stay float32. The CPU gains
        # nothing from them.
        return unit.to(autocast_dtype(unit)) if unit.is_cuda else unit


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    """One number per channel, in the dtype and on the device of `like`.

    Not a buffer, which a checkpoint without it could not restore on the meta device; and not copied from the CPU, which
    a CUDA graph could not record.
    """
    return torch.stack([like.new_full((), value) for value in values])
