"""difftrack-nano: a CogVideoX of pixels small enough to train on a CPU, tracked with as DiffTrack does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tritonkern.models.checkpoints import load_strict, read_state_dict
from tritonkern.models.cogvideox import CogVideoX
from tritonkern.models.difftrack import CLOSED, DiffTrack, Preset
from tritonkern.models.difftrack_folder import StraightPath

FRAMES = 8
"""Frames of the clips that it is trained on, and of a pass."""
PIXELS = (64, 64)
LAYERS = (1, 2, 3)
"""The layers that match; they were chosen on clips that neither training nor the table of the evaluation has."""
CONTRAST = 2.0
"""Factor on pixels in [-1, 1], whose standard deviation is then near that of the noise."""


def small_transformer(num_layers: int = 4) -> CogVideoX:
    """The first layers of the transformer of `DiffTrackNano`, with random weights."""
    return CogVideoX(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        time_embed_dim=128,
        text_embed_dim=8,
        num_layers=num_layers,
        sample_width=PIXELS[1],
        sample_height=PIXELS[0],
        sample_frames=4 * (FRAMES - 1) + 1,
        patch_size=4,
        max_text_seq_length=1,
        spatial_interpolation_scale=1.0,
    )


class DiffTrackNano(DiffTrack):
    """`DiffTrack` with a transformer that learned nothing but to denoise generated clips.

    It takes patches of 4 x 4 pixels of frames of 64 x 64, 16 x 16 cells; there is no VAE and no text.

    What a cell's queries and keys show changes with the place of a surface within the cell, so that a point that moved
    by half a cell is hard to find. Frames are therefore seen `oversampling` x `oversampling` times, displaced by parts
    of a cell, and the cells of all passes form one finer grid.

    Args:
        layers: whose queries and keys are matched, together.
        timesteps: the noise levels that the transformer is given, from 0 to 1000, a pass each; no noise is added.
        radius: of the soft-argmax, in cells of the finer grid.
        oversampling: passes along each axis, 1 or 2.
        by_features: match what the layers' attention returns instead of queries and keys, to compare with.
    """

    transformer: CogVideoX

    def __init__(
        self,
        layers: Sequence[int] = LAYERS,
        timesteps: Sequence[float] = (19.0,),
        radius: float | None = 2.5,
        oversampling: int = 2,
        by_features: bool = False,
    ) -> None:
        if oversampling not in (1, 2):
            raise ValueError(f"oversampling must be 1 or 2, by which the patch of 4 pixels divides, got {oversampling}")
        transformer = small_transformer()
        # The scale of one layer: channels of several are side by side. Features are not normalised.
        preset = Preset(tuple(layers), tuple(timesteps), None if by_features else 32**-0.5, FRAMES)
        super().__init__(transformer, preset=preset, scheduler=StraightPath(), pixels=PIXELS, radius=radius)
        self.by_features, self.oversampling = by_features, oversampling
        self.closed = CLOSED * oversampling

    def features(self, video: Tensor) -> Tensor:
        """Frames `[B, T, 64, 64, 3]` in [-2, 2] of `[B, T, H, W, 3]` in [-1, 1]."""
        return CONTRAST * super().features(video)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> DiffTrackNano:
        """The model with the weights that `tritonkern train --model difftrack-nano` wrote to `path`, in float32.

        Raises `FileNotFoundError` if there is no such file, `ValueError` if it does not hold this model's weights.
        """
        model = cls()
        load_strict(model.transformer, read_state_dict(path), str(path))
        return model.eval()

    def grid(self, latents: Tensor) -> tuple[int, int]:
        h, w = super().grid(latents)
        return self.oversampling * h, self.oversampling * w

    def query_key(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """As `DiffTrack.query_key`, of the finer grid; `by_features`: the same features `[1, T, S, 1, C]` twice."""
        n, patch = self.oversampling, self.transformer.patch_size
        (h, w), (height, width) = self.transformer.grid(latents), latents.shape[-2:]
        # The centres of the n cells that take the place of one, from its own.
        moves = [((2 * i + 1 - n) * patch) // (2 * n) for i in range(n)]
        wide = F.pad(latents[0], (patch,) * 4, mode="replicate")[None]
        seen = [
            self._pass(wide[..., patch + y : patch + y + height, patch + x : patch + x + width])
            for y in moves
            for x in moves
        ]
        query, key = (
            rearrange(torch.stack(x), "(i j) b t (h w) a c -> b t (h i w j) a c", i=n, h=h, w=w)
            for x in zip(*seen, strict=True)
        )
        return query, key

    def _pass(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        if not self.by_features:
            return super().query_key(latents)
        found: list[Tensor] = []
        blocks: list[Any] = [self.transformer.transformer_blocks[layer] for layer in self.preset.layers]
        handles = [
            block.attn1.to_out[0].register_forward_pre_hook(lambda _, args: found.append(args[0])) for block in blocks
        ]
        try:
            for timestep in self.preset.timesteps:
                self.transformer(latents, self.prompt.to(latents), latents.new_tensor([timestep]))
        finally:
            for handle in handles:
                handle.remove()
        features = torch.cat(found, -1)[:, self.prompt.shape[1] :].unflatten(1, (latents.shape[1], -1))[..., None, :]
        return features, features

    def ablations(self) -> dict[str, DiffTrackNano]:
        """What the evaluation compares this model with: the same matching its features, and without training."""
        make = partial(DiffTrackNano, self.preset.layers, self.preset.timesteps, self.radius, self.oversampling)
        features = make(by_features=True)
        features.transformer.load_state_dict(self.transformer.state_dict())
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            untrained = make()
        device = self.prompt.device
        return {
            "difftrack-nano, features": features.to(device).eval(),
            "difftrack-nano, untrained": untrained.to(device).eval(),
        }
