"""A small tracker built like TAPNext (google-deepmind/tapnet): names and interfaces of its parts, none of its text."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

TAPS = 4


class Cache(NamedTuple):
    rg_lru_state: torch.Tensor
    conv1d_state: torch.Tensor


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.scale)


class Heads(nn.Module):
    """A linear layer of each head."""

    def __init__(self, width, num_heads):
        super().__init__()
        inner = width // num_heads
        self.w = nn.Parameter(torch.randn(num_heads, inner, inner) * inner**-0.5)
        self.b = nn.Parameter(torch.randn(num_heads, inner))

    def forward(self, x):
        return (torch.einsum("nthi,hij->nthj", x.unflatten(-1, self.b.shape), self.w) + self.b).flatten(-2)


class Unit(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.a_param = nn.Parameter(torch.randn(width) - 2)
        self.input_gate, self.a_gate = Heads(width, num_heads), Heads(width, num_heads)

    def forward(self, x, cache=None, use_linear_scan=True):
        log_a = -8.0 * torch.sigmoid(self.a_gate(x)) * F.softplus(self.a_param)
        root = torch.sqrt((1 - torch.exp(2 * log_a)).clamp(min=1e-9))
        if cache is None:
            root = torch.cat([torch.ones_like(root[:, :1]), root[:, 1:]], 1)
        added, a = x * torch.sigmoid(self.input_gate(x)) * root, log_a.exp()
        h, out = x.new_zeros(len(x), x.shape[-1], dtype=torch.float32) if cache is None else cache, []
        for t in range(x.shape[1]):
            h = a[:, t].float() * h + added[:, t].float()
            out.append(h.to(x.dtype))
        return torch.stack(out, 1), h


class Convolution(nn.Module):
    def __init__(self, width, temporal_width=TAPS):
        super().__init__()
        self.w = nn.Parameter(torch.randn(temporal_width, width) * 0.5)
        self.b = nn.Parameter(torch.randn(width))

    def forward(self, x, cache=None):
        taps = len(self.w)
        x = torch.cat([x.new_zeros(len(x), taps - 1, x.shape[-1]) if cache is None else cache, x], 1)
        y = F.conv1d(x.mT, self.w.mT.unsqueeze(1), self.b, groups=x.shape[-1]).mT
        return y, x[:, 1 - taps :]


class Recurrent(nn.Module):
    def __init__(self, width, num_heads, temporal_width=TAPS):
        super().__init__()
        self.linear_y, self.linear_x, self.linear_out = (nn.Linear(width, width) for _ in range(3))
        self.conv_1d, self.rg_lru = Convolution(width, temporal_width), Unit(width, num_heads)

    def forward(self, x, cache=None, use_linear_scan=True):
        y = F.gelu(self.linear_y(x), approximate="tanh")
        h, frames = self.conv_1d(self.linear_x(x), None if cache is None else cache.conv1d_state)
        h, last = self.rg_lru(h, None if cache is None else cache.rg_lru_state, use_linear_scan)
        return self.linear_out(h * y), Cache(rg_lru_state=last, conv1d_state=frames)

    @classmethod
    def init_cache(cls, batch_size, lru_width, dtype, conv1d_temporal_width=TAPS, device=None):
        frames = torch.zeros(batch_size, conv1d_temporal_width - 1, lru_width, dtype=dtype, device=device)
        return Cache(torch.zeros(batch_size, lru_width, device=device), frames)


class Temporal(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.temporal_pre_norm, self.channel_pre_norm = Norm(width), Norm(width)
        self.recurrent_block = Recurrent(width, num_heads)
        self.mlp_block = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, cache=None, use_linear_scan=True):
        mixed, cache = self.recurrent_block(self.temporal_pre_norm(x), cache, use_linear_scan)
        x = x + mixed
        return x + self.mlp_block(self.channel_pre_norm(x)), cache


class Block(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.ssm_block = Temporal(width, num_heads)
        self.vit_block = nn.TransformerEncoderLayer(width, num_heads, 2 * width, 0.0, batch_first=True)

    def forward(self, x, cache=None, use_linear_scan=True):
        (b, t, n, c) = x.shape
        x, cache = self.ssm_block(x.transpose(1, 2).reshape(b * n, t, c), cache, use_linear_scan)
        x = self.vit_block(x.view(b, n, t, c).transpose(1, 2).reshape(b * t, n, c))
        return x.view(b, t, n, c), cache


@dataclass
class State:
    step: int
    query_points: torch.Tensor
    hidden_state: list


class Tracker(nn.Module):
    """`video` [B, T, H, W, 3], `query_points` [B, N, 3] (t, y, x) -> tracks [B, T, N, 2], logits, visibility, state."""

    def __init__(self, width=32, num_heads=2, depth=2):
        super().__init__()
        self.lin_proj = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.encoder_norm = nn.LayerNorm(width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, 1, width))
        self.position = nn.Linear(2, width)
        self.visible_head, self.coordinate_head = nn.Linear(width, 1), nn.Linear(width, 2)

    def embed_queries(self, frames, query_points):
        asked = self.position(query_points[:, None, :, 1:] / 32 - 0.5)
        own = query_points[:, None, :, :1] == torch.arange(frames)[None, :, None, None]
        return torch.where(own, asked, self.mask_token.expand(len(asked), frames, asked.shape[2], -1))

    def prediction_heads(self, x):
        logits = self.coordinate_head(x)
        return 32 * logits.sigmoid(), logits, self.visible_head(x)

    def forward(self, video, query_points=None, state=None):
        b, t = video.shape[:2]
        tokens = self.lin_proj(video.flatten(0, 1).movedim(-1, 1)).flatten(2).mT.unflatten(0, (b, t))
        query_points = state.query_points if query_points is None else query_points
        step, hidden = (0, [None] * len(self.blocks)) if state is None else (state.step, state.hidden_state)
        moved = torch.cat([query_points[..., :1] - step, query_points[..., 1:]], -1)
        x = torch.cat([tokens, self.embed_queries(t, moved)], 2)
        caches = []
        for block, cache in zip(self.blocks, hidden, strict=True):
            x, cache = block(x, cache, use_linear_scan=not self.training)
            caches.append(cache)
        points = self.encoder_norm(x)[:, :, tokens.shape[2] :]
        return *self.prediction_heads(points), State(step + t, query_points, caches)
