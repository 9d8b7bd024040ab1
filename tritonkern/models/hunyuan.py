"""diffusers' transformer of HunyuanVideo (Kong et al., 2024) as `DiffTrack` uses one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# The guidance scale that a pipeline gives to the transformer, times 1000.
_GUIDANCE = 6000.0


class HunyuanVideo(nn.Module):
    """A HunyuanVideoTransformer3DModel with the methods of `CogVideoX` that tracking calls.

    Its queries and keys are taken from the model's own attention (`tritonkern.integrations.video_dit.watch`).

    Args:
        model: of diffusers.
        pooled: `[1, C]`, the pooled embedding of the prompt; None for zeros.
    """

    pooled: Tensor

    def __init__(self, model: Any, pooled: Tensor | None = None):
        super().__init__()
        self.model, self.patch_size = model, model.config.patch_size
        self.num_heads, self.text_dim = model.config.num_attention_heads, model.config.text_embed_dim
        pooled = torch.zeros(1, model.config.pooled_projection_dim) if pooled is None else pooled
        self.register_buffer("pooled", pooled)

    @classmethod
    def from_folder(cls, folder: Path, pooled: Tensor | None) -> HunyuanVideo:
        """The model of the folder ``transformer`` in `folder`, in float32. Needs diffusers."""
        from diffusers import HunyuanVideoTransformer3DModel

        return cls(HunyuanVideoTransformer3DModel.from_pretrained(folder, subfolder="transformer"), pooled).eval()

    @property
    def transformer_blocks(self) -> list[nn.Module]:
        """Dual blocks, then single ones."""
        return [*self.model.transformer_blocks, *self.model.single_transformer_blocks]

    def grid(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of the cells of latents `[B, T, C, h, w]`."""
        return latents.shape[-2] // self.patch_size, latents.shape[-1] // self.patch_size

    def query_key(
        self,
        latents: Tensor,
        text: Tensor,
        timestep: Tensor,
        layers: Sequence[int],
        heads: Sequence[int] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """As `CogVideoX.query_key`; the pass ends at the last layer."""
        from tritonkern.integrations.video_dit import watch

        with watch(self.model, layers, heads, stop=True) as seen:
            self.model(
                hidden_states=latents.transpose(1, 2),
                timestep=timestep,
                encoder_hidden_states=text,
                encoder_attention_mask=text.new_ones(text.shape[:2]),
                pooled_projections=self.pooled.to(text).expand(len(text), -1),
                guidance=text.new_full((len(text),), _GUIDANCE) if self.model.config.guidance_embeds else None,
                return_dict=False,
            )
        return [(seen[layer].query, seen[layer].key) for layer in layers]
