"""Structural twins of CoTracker3's offline and online models, written from their description: the names, shapes and
calls that `tritonkern.patch` replaces, small, in eager PyTorch. They stand in for the repository where there is none.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_q, self.to_kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x, context=None, attn_bias=None):
        keys, values = self.to_kv(x if context is None else context).tensor_split(2, -1)
        query, key, value = (y.unflatten(-1, (self.heads, -1)) for y in (self.to_q(x), keys, values))
        logits = torch.einsum("bnhd,bmhd->bhnm", query, key) * self.scale
        if attn_bias is not None:
            logits = logits + attn_bias
        return self.to_out(torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), value).flatten(2))


class UpdateFormer(nn.Module):
    """Attention over time, then from the points to virtual ones and back."""

    def __init__(self, channels, dim, heads=2, virtual=3):
        super().__init__()
        self.input, self.output = nn.Linear(channels, dim), nn.Linear(dim, 4)
        self.virtual = nn.Parameter(torch.randn(1, virtual, dim))
        self.time, self.gather, self.spread = (Attention(dim, heads) for _ in range(3))

    def forward(self, tokens, add_space_attn=True):
        """`[B, N, T, channels]` -> `[B, N, T, 4]`."""
        x = self.input(tokens)
        batch, points, frames, _ = x.shape
        x = (x.flatten(0, 1) + self.time(x.flatten(0, 1))).unflatten(0, (batch, points))
        x = x.transpose(1, 2).flatten(0, 1)
        bias = torch.linspace(-1, 1, points).expand(1, 1, self.virtual.shape[1], points)
        virtual = self.gather(self.virtual.expand(len(x), -1, -1), context=x, attn_bias=bias)
        x = x + self.spread(x, context=virtual)
        return self.output(x).unflatten(0, (batch, frames)).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, channels, hidden, out):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Encoder(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, channels, 7, 4, 3, bias=False), nn.InstanceNorm2d(channels)
        self.frames = 0

    def forward(self, images):
        self.frames += len(images)
        return self.norm(self.conv(images))


class Offline(nn.Module):
    def __init__(self, latent=8, dim=16, levels=3):
        super().__init__()
        self.stride, self.corr_radius, self.corr_levels, self.latent_dim = 4, 3, levels, latent
        self.model_resolution = (64, 96)
        self.fnet = Encoder(latent)
        self.corr_mlp = Mlp(49 * 49, 24, 12)
        self.updateformer = UpdateFormer(4 + 12 * levels, dim)

    def get_support_points(self, points, r):
        """`[..., 2]` (x, y) -> `[..., 2r + 1, 2r + 1, 2]`; the first of the new axes moves x."""
        offsets = torch.arange(-r, r + 1.0)
        return points[..., None, None, :] + torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1)

    def sample(self, features, points):
        """`[M, C, h, w]` at `[M, ..., 2]` in pixels whose centres are whole numbers -> `[M, ..., C]`."""
        size = torch.tensor([features.shape[-1] - 1, features.shape[-2] - 1])
        grid = (points * (2 / size) - 1).flatten(1, -2)[:, None]
        sampled = F.grid_sample(features, grid, padding_mode="border", align_corners=True)
        return sampled[:, :, 0].mT.unflatten(1, points.shape[1:-1])

    def get_track_feat(self, fmaps, queried_frames, queried_coords, support_radius=0):
        """The support `[B, 49, N, C]` of the queries in their own frames, and its centre."""
        points = self.get_support_points(queried_coords, support_radius)
        supports = []
        for features, frames, own in zip(fmaps, queried_frames, points, strict=True):
            supports.append(self.sample(features[frames], own.flatten(1, 2)))
        support = torch.stack(supports).transpose(1, 2)
        return support[:, None, support.shape[1] // 2], support

    def get_correlation_feat(self, fmaps, queried_coords):
        points = self.get_support_points(queried_coords, self.corr_radius)
        return self.sample(fmaps.flatten(0, 1), points).unflatten(0, fmaps.shape[:2])

    def pyramid(self, video, chunk):
        images = (2 * (video / 255) - 1).flatten(0, 1)
        features = torch.cat([self.fnet(part) for part in images.split(chunk)])
        features = F.normalize(features.permute(0, 2, 3, 1), dim=-1).permute(0, 3, 1, 2)
        levels = [features]
        for _ in range(self.corr_levels - 1):
            levels.append(F.avg_pool2d(levels[-1], 2))
        return [level.reshape(video.shape[0], -1, *level.shape[1:]) for level in levels]

    def embed(self, fmaps, support, coords, batch):
        """The embedding `[B T N, 12]` of one level at `[B T, N, 2]`."""
        side = 2 * self.corr_radius + 1
        corr_feat = self.get_correlation_feat(fmaps, coords)
        support = support.unflatten(1, (side, side)).permute(0, 3, 1, 2, 4)
        volume = torch.einsum("btnhwc,bnijc->btnhwij", corr_feat, support)
        return self.corr_mlp(volume.reshape(-1, side**4))

    def refine(self, levels, supports, coords, vis, conf, iters):
        """Coordinates `[B, T, N, 2]` in cells of the finest level; a list of every iteration's."""
        steps, batch = [], len(vis)
        for _ in range(iters):
            coords = coords.detach()
            embedded = [
                self.embed(fmaps, support, coords.flatten(0, 1) / 2**i, batch)
                for i, (fmaps, support) in enumerate(zip(levels, supports, strict=True))
            ]
            step = F.pad(coords[:, 1:] - coords[:, :-1], (0, 0, 0, 0, 0, 1)) / 16
            tokens = [vis[..., None], conf[..., None], torch.cat(embedded, -1).view(*vis.shape, -1), step]
            delta = self.updateformer(torch.cat(tokens, -1).transpose(1, 2)).transpose(1, 2)
            coords, vis, conf = coords + delta[..., :2], vis + delta[..., 2], conf + delta[..., 3]
            steps.append((coords * self.stride, vis, conf))
        return steps

    def forward(self, video, queries, iters=4, is_train=False, add_space_attn=True, fmaps_chunk_size=200):
        """Video `[B, T, 3, H, W]` in [0, 255], queries `[B, N, 3]` (t, x, y) -> tracks `[B, T, N, 2]`, logits."""
        levels = self.pyramid(video, fmaps_chunk_size)
        frames, places = queries[..., 0].long(), queries[..., 1:] / self.stride
        supports = [
            self.get_track_feat(level, frames, places / 2**i, self.corr_radius)[1] for i, level in enumerate(levels)
        ]
        vis = video.new_zeros(*video.shape[:2], queries.shape[1])
        coords = places[:, None].expand(-1, video.shape[1], -1, -1)
        steps = self.refine(levels, supports, coords, vis, vis, iters)
        return (*steps[-1][:2], steps[-1][2].sigmoid(), steps if is_train else None)


class Online(Offline):
    """Windows of `window_len` frames, each one half behind the last."""

    window_len = 8

    def init_video_online_processing(self):
        self.online_ind, self.online_support, self.online_coords = 0, None, None

    def forward(
        self,
        video,
        queries,
        iters=4,
        is_train=False,
        add_space_attn=True,
        fmaps_chunk_size=200,
        is_online=False,
    ):
        if not is_online:
            return super().forward(video, queries, iters, is_train, add_space_attn, fmaps_chunk_size)
        start, length = self.online_ind, self.window_len
        missing = length - video.shape[1]
        levels = self.pyramid(torch.cat([video, video[:, -1:].expand(-1, missing, -1, -1, -1)], 1), fmaps_chunk_size)
        frames, places = queries[..., 0].long() - start, queries[..., 1:] / self.stride
        seen_first = (frames >= (0 if start == 0 else length // 2)) & (frames < length)
        supports = []
        for i, level in enumerate(levels):
            support = self.get_track_feat(level, frames.clamp(0, length - 1), places / 2**i, self.corr_radius)[1]
            supports.append(support * seen_first[:, None, :, None])
        if self.online_support is not None:
            supports = [before + new for before, new in zip(self.online_support, supports, strict=True)]
        self.online_support = supports
        coords = places[:, None].expand(-1, length, -1, -1)
        if self.online_coords is not None:
            coords = torch.cat([self.online_coords[:, length // 2 :], coords[:, length // 2 :]], 1)
        vis = video.new_zeros(*coords.shape[:3])
        coords, vis, conf = self.refine(levels, supports, coords, vis, vis, iters)[-1]
        self.online_coords = coords / self.stride
        self.online_ind += length // 2
        return coords, vis, conf.sigmoid(), None


class Predictor(nn.Module):
    """As the repository's: the model as an attribute, video chunks, tracks and a threshold on the visibility."""

    def __init__(self, model):
        super().__init__()
        self.model = model.eval()

    @torch.no_grad()
    def forward(self, video, queries=None, is_first_step=False):
        if not isinstance(self.model, Online):
            tracks, visible, *_ = self.model.forward(video=video, queries=queries, iters=3)
            return tracks, visible > 0
        if is_first_step:
            self.model.init_video_online_processing()
            self.queries = queries
            return None, None
        tracks, visible, *_ = self.model(video=video, queries=self.queries, iters=3, is_online=True)
        return tracks, visible > 0
