"""What DiTracker takes from a video diffusion transformer: maps of the queries and keys of one head.

"Repurposing Video Diffusion Transformers for Robust Point Tracking", 2025; github.com/cvlab-kaist/DiTracker.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tritonkern.models._latents import encode_together
from tritonkern.models.cogvideox import CogVideoX

CHUNK = 13
"""Frames that pass through the transformer together."""
TIMESTEP = 19.0
"""The last of the sampler's 50 steps."""


class DiTrackerEncoder(nn.Module):
    """Query and key maps of a video, by one head of one layer of CogVideoX-2B.

    ::

        frames --VAE, each alone--> latents --up to 13, or frame 0 and 13 others--> queries and keys of a head

    Up to 13 frames pass together, and frame t has the place t in time. Of a longer clip frames 0 to 12, 13 to 25 and so
    on pass behind a copy of frame 0, whose output is dropped: frame t then has the place 1 + t mod 13, which is one
    more than in a short clip. No noise is added, and the prompt is empty. Of the layer only the projections of the head
    are computed, and nothing behind them.

    Args:
        transformer: such as `CogVideoX.from_folder(folder)`, with adapters or without (`add_low_rank`). Not the 5B.
        vae: of diffusers; None for a transformer of pixels.
        layer, head: whose queries and keys are taken, from 0.
        prompt: `[1, L, text_dim]`, the embedding of the empty prompt; None for zeros. It is in no state dict.
        timestep: from 0 to 1000.
        sample: draw latents from the posterior, by `generator`, instead of taking its mean.
        generator: on the CPU or the device of the model; None for PyTorch's own.

    Raises:
        ValueError: a layer or head that the transformer does not have, a prompt or VAE of another width, or a 5B.
    """

    prompt: Tensor

    def __init__(
        self,
        transformer: CogVideoX,
        vae: Any = None,
        *,
        layer: int = 17,
        head: int = 2,
        prompt: Tensor | None = None,
        timestep: float = TIMESTEP,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if transformer.rotary:
            raise ValueError(
                f"transformer must be a CogVideoX-2B, got one with rotary positions and {transformer.num_heads} heads, "
                "as the 5B has"
            )
        for name, number, count in (
            ("layer", layer, len(transformer.transformer_blocks)),
            ("head", head, transformer.num_heads),
        ):
            if not 0 <= number < count:
                raise ValueError(f"{name} must be from 0 to {count - 1}, got {number}")
        empty = torch.zeros(1, 1, transformer.text_dim) if prompt is None else prompt
        if empty.ndim != 3 or empty.shape[0] != 1 or empty.shape[2] != transformer.text_dim:
            raise ValueError(f"prompt must be [1, L, {transformer.text_dim}], got {list(empty.shape)}")
        if vae is not None and vae.config.latent_channels != transformer.in_channels:
            raise ValueError(
                f"vae must have the {transformer.in_channels} channels of the transformer, got "
                f"{vae.config.latent_channels}"
            )
        self.transformer, self.vae, self.layer, self.head, self.timestep = transformer, vae, layer, head, timestep
        self.sample, self.generator = sample, generator
        self.register_buffer("prompt", empty, persistent=False)
        # Pixels of a cell, in height and width.
        self.stride = transformer.patch_size * (1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1))
        self._positions: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of a video.

        Gradients reach the transformer, and its adapters, but not the VAE and the video.

        Args:
            video: `[B, T, H, W, 3]` in [-1, 1], as of all models here. The VAE is given [0, 1], as published, although
                it was trained on [-1, 1]. H and W are multiples of `stride`, 16 pixels of CogVideoX-2B.

        Returns:
            Queries and keys, each `[B, T, H / stride, W / stride, D]`, normalised as the transformer does it.

        Raises:
            TypeError: `video` is not floating point.
            ValueError: `video` has another shape.
        """
        return self.maps(self.latents(video))

    @torch.no_grad()
    def latents(self, video: Tensor) -> Tensor:
        """Latents `[B, T, C, h, w]` of the frames `[B, T, H, W, 3]` in [-1, 1], each encoded alone."""
        if not video.is_floating_point():
            raise TypeError(f"video must be floating point in [-1, 1], got {video.dtype}; use video / 127.5 - 1")
        if video.ndim != 5 or video.shape[-1] != 3 or 0 in video.shape:
            raise ValueError(f"video must be [B, T, H, W, 3], none of them 0, got {list(video.shape)}")
        if any(size % self.stride for size in video.shape[2:4]):
            raise ValueError(
                f"video must have a height and width that {self.stride} divides, got {list(video.shape[2:4])}; "
                "resize the frames"
            )
        frames = rearrange((video + 1) / 2, "b t h w c -> (b t) c h w").to(self.prompt.dtype)
        if self.vae is not None:
            options: dict[str, Any] = {"sample": self.sample, "generator": self.generator}
            frames = torch.stack([encode_together(self.vae, frame, **options)[:, 0] for frame in frames.split(1)])
        return frames.unflatten(0, video.shape[:2])

    def maps(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, each `[B, T, h, w, D]`, of latents as the method of this name returns them."""
        if latents.shape[1] <= CHUNK:
            return self._pass(latents)
        chunks = [self._pass(torch.cat([latents[:, :1], chunk], 1)) for chunk in latents.split(CHUNK, 1)]
        query, key = zip(*chunks, strict=True)
        return torch.cat([x[:, 1:] for x in query], 1), torch.cat([x[:, 1:] for x in key], 1)

    def _pass(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        batch, grid = len(latents), self.transformer.grid(latents)
        text = self.prompt.to(latents.dtype).expand(batch, -1, -1)
        time, place = latents.new_full((batch,), self.timestep), self._places(grid, latents.device)
        ((query, key),) = self.transformer.query_key(latents, text, time, [self.layer], [self.head], place)
        return query[..., 0, :].unflatten(2, grid), key[..., 0, :].unflatten(2, grid)

    def _places(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """The transformer's table of positions for the longest chunk, made once for a size of frames."""
        if self._positions is None or self._positions[0] != grid or self._positions[1].device != device:
            self._positions = grid, self.transformer.positions(CHUNK + 1, grid, device)
        return self._positions[1]
