"""A structural twin of cvlab-kaist/Chrono's model, written from its description: the same parts, names and signatures,
eager PyTorch throughout. It stands in for the repository where that is not available. `xformers` is imported inside, as
the official file does at its top.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tritonkern.models.dinov2 import DINOv2, DINOv2Config


class FeatureGrids(NamedTuple):
    lowres: tuple
    hires: tuple = ()
    highest: tuple = ()
    resolutions: tuple = ((256, 256),)


class LocalAttentionLayer(nn.Module):
    def __init__(self, dim, num_heads, window_size=13):
        super().__init__()
        from xformers.ops import fmha

        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.q_norm, self.k_norm, self.proj_drop = nn.Identity(), nn.Identity(), nn.Dropout(0.0)
        half = window_size // 2
        self.bias = fmha.attn_bias.LocalAttentionFromBottomRightMask(window_left=half, window_right=half)

    def forward(self, x):
        from xformers import ops

        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.proj(ops.memory_efficient_attention(query, key, value, attn_bias=self.bias).flatten(2))


class TemporalAdapter(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.norm = nn.GroupNorm(1, dim)
        self.conv1 = nn.Conv2d(dim, hidden, 3, padding=1)
        self.conv_pool = nn.Conv2d(hidden, hidden, 4, 4)
        self.norm2 = nn.LayerNorm(hidden)
        self.attn_temp = LocalAttentionLayer(hidden, 4)
        self.conv_upsample = nn.ConvTranspose2d(hidden, hidden, 4, 4)
        self.conv2 = nn.Conv2d(hidden, dim, 3, padding=1)

    def forward(self, x):
        """`[B, C, T, h, w]` -> the same shape."""
        batch, _, frames, _, _ = x.shape
        # Contiguous: PyTorch 2.13's backward of a channels-last group norm crashes on the CPU when x needs no gradient.
        x = self.norm(x.contiguous()).transpose(1, 2).flatten(0, 1)
        x = F.relu(self.conv_pool(F.relu(self.conv1(x))))
        rows, columns = x.shape[2:]
        series = x.unflatten(0, (batch, frames)).permute(0, 3, 4, 1, 2).flatten(0, 2)
        series = series + self.attn_temp(self.norm2(series))
        x = series.unflatten(0, (batch, rows, columns)).permute(0, 3, 4, 1, 2).flatten(0, 1)
        return self.conv2(F.relu(self.conv_upsample(x))).unflatten(0, (batch, frames)).transpose(1, 2)


class Tracker(nn.Module):
    """Takes videos `[B, T, H, W, 3]` in [-1, 1] and queries `[B, N, 3]` (t, y, x) in pixels."""

    def __init__(self, dim=128, depth=3, cells=8, registers=0, hidden=32, grid=None):
        super().__init__()
        self.softmax_temperature = 20.0
        self.initial_resolution = (256, 256)
        self.img_mult = cells
        self.dino = DINOv2(DINOv2Config(dim, depth, dim // 64, num_registers=registers, grid=grid or cells))
        self.adapter = nn.ModuleList(TemporalAdapter(dim, hidden) for _ in range(depth - 1))
        self.occ_linear = nn.Linear(3, 2)

    def forward(self, video, query_points, query_chunk_size=64):
        grids = self.forward_dino(video)
        features = self.get_query_features(video, False, query_points, grids)
        size = video.shape[-3:-1]
        return self.estimate_trajectories(size, False, grids, features, query_points, query_chunk_size)

    def forward_dino(self, video, use_bfloat16=True, img_mult=64):
        cells, (batch, frames) = self.img_mult, video.shape[:2]
        mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
        images = (((video + 1) / 2 - mean) / std).flatten(0, 1).movedim(-1, 1)
        hooks = []
        for block, adapter in zip(self.dino.blocks, self.adapter, strict=False):

            def hook(module, args, output, adapter=adapter):
                grid = output[:, -cells * cells :].unflatten(1, (cells, cells)).unflatten(0, (batch, frames))
                update = adapter(grid.movedim(-1, 1)).movedim(1, -1).flatten(0, 1).flatten(1, 2)
                return output + torch.cat([torch.zeros_like(output[:, : -cells * cells]), update], 1)

            hooks.append(block.register_forward_hook(hook))
        images = F.interpolate(images, size=(14 * cells, 14 * cells), mode="bilinear")
        tokens = self.dino.get_intermediate_layers(images, n=1)[-1]
        for handle in hooks:
            handle.remove()
        tokens = tokens.unflatten(1, (cells, cells)).unflatten(0, (batch, frames))
        return FeatureGrids((tokens / tokens.square().sum(-1, keepdim=True).clamp(min=1e-6).sqrt(),))

    def get_query_features(self, video, is_training, query_points, feature_grids, refinement_resolutions=None):
        (grid,) = feature_grids.lowres
        scale = torch.tensor(grid.shape[1:4]) / torch.tensor(video.shape[1:4])
        t, y, x = (query_points * scale).unbind(-1)
        size = torch.tensor(grid.shape[1:4])
        at = torch.stack([x, y, t + 0.5], -1) / size.flip(0) * 2 - 1
        sampled = F.grid_sample(
            grid.permute(0, 4, 1, 2, 3), at[:, :, None, None], padding_mode="border", align_corners=False
        )
        return FeatureGrids((sampled[..., 0, 0].mT,))

    def estimate_trajectories(
        self,
        video_size,
        is_training,
        feature_grids,
        query_features,
        query_points_in_video,
        query_chunk_size=None,
        causal_context=None,
        get_causal_context=False,
    ):
        (queries,), (grid,) = query_features.lowres, feature_grids.lowres
        image = (*grid.shape[:2], *self.initial_resolution, 3)
        parts = []
        for start in range(0, queries.shape[1], query_chunk_size):
            chunk = slice(start, start + query_chunk_size)
            parts.append(self.tracks_from_cost_volume(queries[:, chunk], grid, query_points_in_video[:, chunk], image))
        names = ("tracks", "occlusion", "expected_dist")
        return {name: torch.cat(part, 1) for name, part in zip(names, zip(*parts, strict=True), strict=True)}

    def tracks_from_cost_volume(self, interp_feature, feature_grid, query_points, im_shp=None):
        cost = torch.einsum("bnc,bthwc->bnthw", interp_feature, feature_grid)
        frames, rows, columns = cost.shape[2:]
        weights = (cost * self.softmax_temperature).flatten(3).softmax(-1)
        y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
        centres = torch.stack([x, y], -1).flatten(0, 1)
        near = (centres - centres[weights.argmax(-1)][..., None, :]).square().sum(-1) < 25
        weights = weights * near
        points = (weights @ centres) / weights.sum(-1, keepdim=True).clamp(min=1e-12)
        points = points * torch.tensor([im_shp[3] / columns, im_shp[2] / rows])
        own = query_points[..., :1].round() == torch.arange(frames)
        points = torch.where(own[..., None], query_points[:, :, None, 1:].flip(-1), points)
        statistics = torch.stack([cost.mean((-2, -1)), cost.amax((-2, -1)), cost.amin((-2, -1))], -1)
        occlusion, expected = self.occ_linear(statistics.detach()).unbind(-1)
        return points, occlusion, expected
