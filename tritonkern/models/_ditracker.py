"""The two networks of DiTracker's head, by the names of the published state dict; CoTracker3 has the same ones.

Karaev et al., "CoTracker3: Simpler and Better Point Tracking by Pseudo-Labelling Real Videos", 2024.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tritonkern.nn._plain import input_dtype
from tritonkern.nn._sequence_attention import attend

STRIDE = 4
"""Pixels per cell of the finest map."""


class _ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with instance normalisation, which has no parameters."""

    def __init__(self, dim_in: int, dim_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(dim_in, dim_out, 3, stride, 1), nn.Conv2d(dim_out, dim_out, 3, 1, 1)
        self.downsample = nn.Sequential(nn.Conv2d(dim_in, dim_out, 1, stride)) if stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.instance_norm(self.conv1(x)))
        y = F.relu(F.instance_norm(self.conv2(y)))
        if self.downsample is not None:
            x = F.instance_norm(self.downsample(x))
        return F.relu(x + y)


class FrameNetwork(nn.Module):
    """Features of single frames: `[M, 3, H, W]` in [0, 1] -> `[M, dim, H / 4, W / 4]`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        widths = (dim // 2, dim // 2, dim // 4 * 3, dim, dim)
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3)
        for index in range(1, 5):
            before, after = widths[index - 1], widths[index]
            stages = _ResidualBlock(before, after, 1 if index == 1 else 2), _ResidualBlock(after, after, 1)
            self.add_module(f"layer{index}", nn.Sequential(*stages))
        self.conv2, self.conv3 = nn.Conv2d(sum(widths[1:]), 2 * dim, 3, 1, 1), nn.Conv2d(2 * dim, dim, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        size = images.shape[-2] // STRIDE, images.shape[-1] // STRIDE
        x = F.relu(F.instance_norm(self.conv1(images)))
        joined = []
        for index in range(1, 5):
            x = self.get_submodule(f"layer{index}")(x)
            joined.append(F.interpolate(x, size, mode="bilinear", align_corners=True))
        return self.conv3(F.relu(F.instance_norm(self.conv2(torch.cat(joined, 1)))))


class Perceptron(nn.Module):
    def __init__(self, dim_in: int, hidden: int, dim_out: int, approximate: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.approximate = nn.Linear(dim_in, hidden), nn.Linear(hidden, dim_out), approximate

    def forward(self, x: Tensor) -> Tensor:
        return self.after_first(self.fc1(x))

    def after_first(self, hidden: Tensor) -> Tensor:
        """The result, from that of the first layer."""
        return self.fc2(F.gelu(hidden, approximate=self.approximate))


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_kv, self.to_out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """`[M, L, C]` attends to `[M, S, C]`."""
        query = self.to_q(x).unflatten(-1, (self.num_heads, -1))
        key, value = self.to_kv(context).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.to_out(attend(query, key, value, query.shape[-1] ** -0.5).flatten(2))


class _SelfBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attn, self.mlp = _Attention(dim, num_heads), Perceptron(dim, 4 * dim, dim, "tanh")

    def forward(self, x: Tensor) -> Tensor:
        y = _normed(x)
        x = x + self.attn(y, y)
        return x + self.mlp(_normed(x))


class _CrossBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm_context, self.cross_attn = nn.LayerNorm(dim), _Attention(dim, num_heads)
        self.mlp = Perceptron(dim, 4 * dim, dim, "tanh")

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.cross_attn(_normed(x), self.norm_context(context))
        return x + self.mlp(_normed(x))


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class UpdateFormer(nn.Module):
    """Tokens of points `[B, N, T, dim_in]` -> steps and logits `[B, N, T, 4]`: x, y, visible, confident.

    In each of `rounds` rounds every track attends along time; then, in every frame, a few learnt tracks attend to the
    points and to each other, and the points to them.
    """

    def __init__(self, dim_in: int, dim: int, num_heads: int, rounds: int, virtual_tracks: int) -> None:
        super().__init__()
        self.input_transform = nn.Linear(dim_in, dim)
        self.flow_head, self.vis_conf_head = nn.Linear(dim, 2), nn.Linear(dim, 2)
        self.virual_tracks = nn.Parameter(torch.randn(1, virtual_tracks, 1, dim))  # as published
        self.time_blocks = nn.ModuleList(_SelfBlock(dim, num_heads) for _ in range(rounds))
        self.space_virtual_blocks = nn.ModuleList(_SelfBlock(dim, num_heads) for _ in range(rounds))
        self.space_point2virtual_blocks = nn.ModuleList(_CrossBlock(dim, num_heads) for _ in range(rounds))
        self.space_virtual2point_blocks = nn.ModuleList(_CrossBlock(dim, num_heads) for _ in range(rounds))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for head in (self.flow_head, self.vis_conf_head):
            nn.init.trunc_normal_(head.weight, std=0.001)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, frames, _ = tokens.shape
        x = self.input_transform(tokens.to(input_dtype(self, tokens.dtype)))
        x = torch.cat([x, self.virual_tracks.to(x.dtype).expand(batch, -1, frames, -1)], 1)
        rounds = zip(
            self.time_blocks,
            self.space_virtual2point_blocks,
            self.space_virtual_blocks,
            self.space_point2virtual_blocks,
            strict=True,
        )
        for along_time, gather, mix, spread in rounds:
            x = along_time(x.flatten(0, 1)).unflatten(0, (batch, -1))
            points, virtual = rearrange(x, "b n t c -> (b t) n c").split([count, x.shape[1] - count], 1)
            virtual = mix(gather(virtual, points))
            x = torch.cat([spread(points, virtual), virtual], 1)
            x = rearrange(x, "(b t) n c -> b n t c", b=batch)
        x = x[:, :count]
        return torch.cat([self.flow_head(x), self.vis_conf_head(x)], -1)


def time_table(frames: int, dim: int) -> Tensor:
    """`[1, frames, dim]`: sines, then cosines, of the number of the frame."""
    frequency = 1.0 / 10000.0 ** (torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = torch.arange(frames, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angles.sin(), angles.cos()], 1)[None].float()


def motion_code(positions: Tensor, size: tuple[float, float]) -> Tensor:
    """`[B, T, N, 84]` of positions `[B, T, N, 2]` in cells: the steps to the next and from the last frame, as shares of
    the map's `size` (x, y), and the sines and cosines of their octaves."""
    step = (positions[:, 1:] - positions[:, :-1]) / positions.new_tensor(size)
    pad = (0, 0, 0, 0)
    motion = torch.cat([F.pad(-step, (*pad, 0, 1)), F.pad(step, (*pad, 1, 0))], -1)
    octaves = torch.cat([motion * 2.0**k for k in range(10)], -1)
    return torch.cat([motion, octaves.sin(), (octaves + 0.5 * torch.pi).sin()], -1)


def resized_table(table: Tensor, frames: int) -> Tensor:
    """A `time_table` `[1, F, C]` for another number of frames, linearly."""
    if frames == table.shape[1]:
        return table
    resized = F.interpolate(table.float().mT, size=frames, mode="linear", align_corners=False)
    return resized.mT.to(table.dtype)
