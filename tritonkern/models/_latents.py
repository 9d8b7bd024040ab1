"""Latents of frames, by a VAE of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def encode_together(
    vae: Any, frames: Tensor, *, sample: bool = False, generator: torch.Generator | None = None, scaled: bool = True
) -> Tensor:
    """Latents `[C, K, h, w]` of consecutive frames `[T, C, H, W]`; of one frame K is 1.

    Args:
        sample: draw from the posterior, by `generator`, instead of taking its mean.
        scaled: multiply by the factor of the VAE.
    """
    posterior = vae.encode(frames.transpose(0, 1)[None]).latent_dist
    latents = posterior.sample(generator) if sample else posterior.mode()
    return latents[0] * vae.config.scaling_factor if scaled else latents[0]
