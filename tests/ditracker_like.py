"""A structural twin of DiTracker, written from its description: the names, shapes and calls that `tritonkern.patch`
replaces, small, in eager PyTorch.
"""

import math

import torch
import torch.nn.functional as F
from cotracker_like import Mlp, Offline
from einops import rearrange
from torch import nn


class Block(nn.Module):
    """Of a transformer that also returns the queries and keys `[B, 1, n, C]` of the video."""

    def __init__(self, channels):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(channels, channels) for _ in range(4))
        self.attended = 0

    def forward(self, hidden_states, encoder_hidden_states):
        x = torch.cat([encoder_hidden_states, hidden_states], 1)[:, None]
        query, key, text = self.query(x), self.key(x), encoder_hidden_states.shape[1]
        x = self.out((x + F.scaled_dot_product_attention(query, key, self.value(x)))[:, 0])
        self.attended += 1
        return x[:, text:], x[:, :text], query[:, :, text:], key[:, :, text:]


class Maps(nn.Module):
    """Queries and keys `[B K, T, C, H / 16, W / 16]` of the last K blocks of a small transformer."""

    def __init__(self, channels, layers):
        super().__init__()
        self.patch, self.text = nn.Conv2d(3, channels, 16, 16), nn.Parameter(torch.randn(1, 2, channels))
        self.transformer = nn.Module()
        self.transformer.transformer_blocks = nn.ModuleList(Block(channels) for _ in range(4))
        self.layer_hooks = [1, 2][-layers:]

    def forward(self, video):
        x = self.patch(video.flatten(0, 1))
        rows, columns = x.shape[-2:]
        video, text = rearrange(x, "(b t) c h w -> b (t h w) c", b=len(video)), self.text.expand(len(video), -1, -1)
        maps = [], []
        for i, block in enumerate(self.transformer.transformer_blocks[: max(self.layer_hooks) + 1]):
            video, text, *found = block(hidden_states=video, encoder_hidden_states=text)
            for of_layers, y in zip(maps, found, strict=True):
                if i in self.layer_hooks:
                    of_layers.append(rearrange(y[:, 0], "b (t h w) c -> b t c h w", h=rows, w=columns))
        return [torch.cat(x) for x in maps]


class DiTracker(Offline):
    def __init__(self, fuse="concat", cost_softmax=True, layers=1, latent=8, dim=16, levels=2):
        super().__init__(latent, dim, levels)
        self.resnet_fuse_mode, self.cost_softmax, self.layers = fuse, cost_softmax, layers
        self.dit_fnet = Maps(latent, layers)
        self.corr_mlp = Mlp((2 if fuse == "concat" else 1) * 49 * 49, 24, 12)
        self.updateformer.output.weight.data *= 30  # points move
        if fuse is None:
            self.fnet = None

    def get_pyramid_fmaps(self, fmaps):
        levels = [fmaps]
        for _ in range(self.corr_levels - 1):
            pooled = F.avg_pool2d(levels[-1].flatten(0, 1), 2)
            levels.append(pooled.unflatten(0, fmaps.shape[:2]))
        return levels

    def normalize_fmaps(self, fmaps):
        return fmaps / fmaps.square().sum(-1, keepdim=True).clamp(min=1e-12).sqrt()

    def forward(self, video, queries, iters=2, is_train=False, add_space_attn=True, fmaps_chunk_size=13):
        video = video / 255
        fine = [n // self.stride for n in video.shape[-2:]]
        maps = [
            F.interpolate(x.flatten(0, 1), fine, mode="bilinear").unflatten(0, x.shape[:2])
            for x in self.dit_fnet(video)
        ]
        if self.fnet is not None:
            features = self.fnet(video.flatten(0, 1))
            maps += [features.reshape(*video.shape[:2], *features.shape[1:])] * 2
        frames, places = queries[..., 0].long(), queries[..., 1:] / self.stride
        pyramids = [self.get_pyramid_fmaps(x) for x in maps]
        levels = list(zip(*pyramids[1::2], strict=True))
        supports = []
        for i, at_level in enumerate(zip(*pyramids[::2], strict=True)):
            repeats = [len(x) // len(video) for x in at_level]
            supports.append(
                [
                    self.get_track_feat(x, frames.repeat(k, 1), places.repeat(k, 1, 1) / 2**i, self.corr_radius)[1]
                    for x, k in zip(at_level, repeats, strict=True)
                ]
            )
        vis = video.new_zeros(*video.shape[:2], queries.shape[1])
        coords = places[:, None].expand(-1, video.shape[1], -1, -1)
        steps = self.refine(levels, supports, coords, vis, vis, iters)
        return (*steps[-1][:2], steps[-1][2].sigmoid(), steps if is_train else None)

    def embed(self, fmaps, support, coords, batch):
        side, layers = 2 * self.corr_radius + 1, self.layers
        shape = (batch, coords.shape[0] // batch, coords.shape[1], side, side, side, side)
        patches = self.get_correlation_feat(fmaps[0], coords.repeat(layers, 1, 1))
        patches = rearrange(patches, "(b k) t n h w c -> b k t n h w c", b=batch)
        cells = rearrange(support[0], "(b k) (i j) n c -> b k n i j c", b=batch, i=side)
        volume = torch.einsum("bktnhwc,bknijc->bktnhwij", patches, cells) / math.sqrt(self.latent_dim)
        volume = F.softmax(volume.flatten(-4, -3), dim=-3).mean(dim=1).view(shape)
        if self.fnet is not None:
            patches = self.get_correlation_feat(fmaps[1], coords)
            cells = rearrange(support[1], "b (i j) n c -> b n i j c", i=side)
            if not self.cost_softmax:
                patches, cells = self.normalize_fmaps(patches), self.normalize_fmaps(cells)
            other = torch.einsum("btnhwc,bnijc->btnhwij", patches, cells)
            if self.cost_softmax:
                other = F.softmax((other / math.sqrt(self.latent_dim)).flatten(-4, -3), dim=-3).view(shape)
        rows = math.prod(shape[:3])
        if self.resnet_fuse_mode == "concat":
            return self.corr_mlp(torch.cat([volume.reshape(rows, -1), other.reshape(rows, -1)], dim=-1))
        if self.resnet_fuse_mode == "add":
            volume = (volume + other) / 2
        return self.corr_mlp(volume.reshape(rows, -1))
