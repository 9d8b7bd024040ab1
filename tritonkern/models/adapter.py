"""The temporal adapter that lets the tokens of a per-frame backbone look along time."""

import torch.nn.functional as F
from torch import Tensor, nn

from tritonkern.nn import TemporalWindowAttention


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
        batch, frames, height, width, _ = tokens.shape
        if height % self.pool or width % self.pool:
            raise ValueError(f"h and w of tokens must be multiples of pool={self.pool}, got {height} x {width}")

        # Channels-last tensors throughout: a grid of tokens is an image in the memory order that convolutions prefer.
        x = self.norm(tokens.movedim(-1, 1)).movedim(1, -1)
        x = F.relu(self.conv1(x.flatten(0, 1).movedim(-1, 1)))
        x = F.relu(self.conv_pool(x)).movedim(1, -1)

        # [B, T, h/pool * w/pool, hidden]
        grid = x.shape[1:3]
        x = x.unflatten(0, (batch, frames)).flatten(2, 3)
        x = x + self.attn_temp(self.norm2(x))

        x = x.flatten(0, 1).unflatten(1, grid).movedim(-1, 1)
        x = self.conv2(F.relu(self.conv_upsample(x)))
        return x.movedim(1, -1).unflatten(0, (batch, frames))
