"""The temporal adapter that lets the tokens of a per-frame backbone look along time."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonkern.functional._adapter import adapter_in, adapter_out
from tritonkern.nn.temporal import TemporalWindowAttention


class TemporalAdapter(nn.Module):
    """Bottleneck of convolutions around temporal window attention, added to a backbone's tokens by the caller.

    Parameters are those of Chrono's `TemporalAdapter`. The last convolution starts at zero: a new adapter adds nothing.
    The first norm takes its statistics over all frames of the clip together, so every frame depends on the whole clip.

    Args:
        dim: channels C of the tokens.
        hidden: channels of the bottleneck, a multiple of `num_heads`.
        num_heads: heads of the temporal attention.
        window_size: odd number of frames that attend to each other, truncated at the ends of the clip.
        pool: side, in tokens, of the patches that share one temporal attention sequence.

    Paper: Kim et al., "Exploring Temporally-Aware Features for Point Tracking", CVPR 2025.
    """

    def __init__(self, dim: int, hidden: int = 128, num_heads: int = 4, window_size: int = 13, pool: int = 4) -> None:
        super().__init__()
        self.pool = pool
        self.norm = nn.GroupNorm(1, dim)
        self.conv1 = nn.Conv2d(dim, hidden, kernel_size=3, padding=1)
        self.conv_pool = nn.Conv2d(hidden, hidden, kernel_size=pool, stride=pool)
        self.norm2 = nn.LayerNorm(hidden)
        self.attn_temp = TemporalWindowAttention(hidden, num_heads=num_heads, window_size=window_size)
        self.conv_upsample = nn.ConvTranspose2d(hidden, hidden, kernel_size=pool, stride=pool)
        self.conv2 = nn.Conv2d(hidden, dim, kernel_size=3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor) -> Tensor:
        """Patch tokens `[B, T, h, w, C]` -> what the adapter adds to them, same shape.

        Raises:
            ValueError: `tokens` is not 5-D, has other than `dim` channels, or h or w is no multiple of `pool`.
        """
        channels = self.norm.num_channels
        if tokens.ndim != 5 or tokens.shape[4] != channels:
            raise ValueError(f"tokens must be [B, T, h, w, {channels}], got {list(tokens.shape)}")
        grid = (tokens.shape[2], tokens.shape[3])
        tokens = tokens.flatten(2, 3)
        # Half precision comes from the tokens, or from autocast: `hidden` may be float32 for either.
        dtype = None if tokens.dtype == torch.float32 else tokens.dtype
        return self._restore(self._bottleneck(tokens, grid), grid, dtype=dtype).unflatten(2, grid)

    def add_to(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """All tokens of a backbone `[B, T, prefix + h * w, C]` -> new ones, the update added to the patches.

        The fastest way to use an adapter: patches are not cut out, and the update is not stored.

        Args:
            tokens: `prefix` class and register tokens, which stay as they are, before the patches of each frame.
            grid: (h, w).

        Raises:
            ValueError: `tokens` is not 4-D, has other than `dim` channels or fewer than h * w rows, or h or w is no
                multiple of `pool`.
        """
        channels = self.norm.num_channels
        if tokens.ndim != 4 or tokens.shape[3] != channels:
            raise ValueError(f"tokens must be [B, T, prefix + h * w, {channels}], got {list(tokens.shape)}")
        return self._restore(self._bottleneck(tokens, grid), grid, tokens=tokens)

    def _bottleneck(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """`[B, T, prefix + h * w, C]` -> the image that the last ReLU and convolution take, patch after patch."""
        norm, conv, pool, upsample = self.norm, self.conv1, self.conv_pool, self.conv_upsample
        hidden = adapter_in(
            tokens, grid, norm.weight, norm.bias, conv.weight, cast(Tensor, conv.bias), pool=self.pool, eps=norm.eps
        )
        # What follows has the dtype that the convolution chose: on the CPU float32 even for half precision.
        with torch.autocast(tokens.device.type, enabled=False):
            # Patches are rows: a convolution whose kernel is its stride is a product with the kernel as a matrix.
            x = F.relu(_linear(hidden, pool.weight.permute(0, 2, 3, 1).flatten(1), pool.bias))
        # [B, T, h/pool * w/pool, hidden]
        x = x + self.attn_temp(self.norm2(x.to(self.norm2.weight.dtype))).to(x.dtype)
        with torch.autocast(tokens.device.type, enabled=False):
            bias = upsample.bias.repeat(self.pool**2)  # type: ignore[union-attr]
            return _linear(x, upsample.weight.permute(2, 3, 1, 0).flatten(0, 2), bias)

    def _restore(
        self, x: Tensor, grid: tuple[int, int], tokens: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        bias = cast(Tensor, self.conv2.bias)
        return adapter_out(x, grid, self.conv2.weight, bias, tokens, pool=self.pool, dtype=dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
