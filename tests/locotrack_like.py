"""A structural twin of cvlab-kaist/locotrack's PyTorch model, written from its description: the same parts, names and
signatures, small, in eager PyTorch. It stands in for the repository where that is not available.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class FeatureGrids(NamedTuple):
    lowres: tuple
    hires: tuple
    highest: tuple
    resolutions: tuple


class QueryFeatures(NamedTuple):
    lowres: tuple
    hires: tuple
    highest: tuple
    lowres_supp: tuple
    hires_supp: tuple
    highest_supp: tuple
    resolutions: tuple


class ConvSame(nn.Conv2d):
    """TensorFlow's SAME padding: the odd cell goes behind."""

    def calc_same_pad(self, i, k, s, d):
        return max(d * (k - 1) + 1 - (i % s or s), 0)

    def forward(self, x):
        padding = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            extra = self.calc_same_pad(size, kernel, stride, 1)
            padding += [extra // 2, extra - extra // 2]
        return F.conv2d(F.pad(x, padding), self.weight, self.bias, self.stride)


class CMDTop(nn.Module):
    def __init__(self, channels=(16, 32, 32), kernels=(3, 3, 2)):
        super().__init__()
        inputs = (49, *channels[:-1])
        self.conv = nn.ModuleList(
            nn.Sequential(ConvSame(before, after, kernel, 2), nn.GroupNorm(after // 16, after), nn.ReLU())
            for before, after, kernel in zip(inputs, channels, kernels, strict=True)
        )

    def forward(self, x):
        """`[M, 7, 7, 7, 7]`, patch and support -> `[M, 2C]`."""
        sides = x.permute(0, 3, 4, 1, 2).flatten(1, 2), x.flatten(1, 2)
        for layer in self.conv:
            sides = [layer(side) for side in sides]
        return torch.cat([side.mean((2, 3)) for side in sides], -1)


class MultiHeadAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads, self.key_size = heads, dim // heads
        self.query_proj, self.key_proj, self.value_proj, self.final_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query, key, value, mask=None):
        frames, half = query.shape[1], self.num_heads // 2
        bias = torch.full((self.num_heads, frames, frames), -1e9)
        for head in range(self.num_heads):
            slope = 1 / (24 ** (1 / half)) ** (head % half + 1)
            for i in range(frames):
                for j in range(frames):
                    if (j <= i) if head < half else (j >= i):
                        bias[head, i, j] = -slope * abs(i - j)
        projections = self.query_proj(query), self.key_proj(key), self.value_proj(value)
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)) for x in projections)
        logits = torch.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(self.key_size) + bias
        return self.final_proj(torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), value).flatten(2))


class Transformer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attn, self.norm = MultiHeadAttention(dim, heads), nn.LayerNorm(dim)

    def forward(self, x, mask=None):
        y = self.norm(x)
        return x + self.attn(y, y, y, mask=mask)


class PIPSTransformer(nn.Module):
    def __init__(self, channels, dim, heads, out):
        super().__init__()
        self.input_proj, self.output_proj = nn.Linear(channels, dim), nn.Linear(dim, out)
        self.transformer = Transformer(dim, heads)

    def forward(self, x):
        return self.output_proj(self.transformer(self.input_proj(x), mask=None))


class Tracker(nn.Module):
    """Takes videos `[B, T, H, W, 3]` in [-1, 1] and queries `[B, N, 3]` (t, y, x) in pixels."""

    def __init__(self, size=(64, 64), dims=(8, 12, 16), num_pips_iter=3):
        super().__init__()
        self.softmax_temperature, self.num_pips_iter = 20.0, num_pips_iter
        self.initial_resolution = size
        highest, hires, lowres = dims
        self.resnet_torch = nn.ModuleList(
            nn.Sequential(ConvSame(before, after, 3, 2), nn.ReLU(), ConvSame(after, after, kernel, 1))
            for before, after, kernel in ((3, highest, 3), (highest, hires, 1), (hires, lowres, 2))
        )
        self.cmdtop = nn.ModuleList(CMDTop() for _ in range(3))
        self.torch_pips_mixer = PIPSTransformer(2 + 3 * 64 + 84, 32, 4, 4 + hires + lowres)
        self.cost_conv = ConvSame(2, 1, 3, 1)
        self.occ_linear = nn.Linear(6, 2)

    def forward(self, video, query_points, query_chunk_size=64):
        grids = self.get_feature_grids(video)
        features = self.get_query_features(video, False, query_points, grids)
        size = video.shape[-3:-1]
        steps = self.estimate_trajectories(size, False, grids, features, query_points, query_chunk_size)
        return {name: values[-1] for name, values in steps.items()}

    def get_feature_grids(self, video, is_training=False, refinement_resolutions=None):
        x, levels = video.flatten(0, 1).movedim(-1, 1), []
        for conv in self.resnet_torch:
            x = conv(F.relu(x) if levels else x)
            level = x.movedim(1, -1).unflatten(0, video.shape[:2])
            levels.append((level / level.square().sum(-1, keepdim=True).clamp(min=1e-12).sqrt(),))
        return FeatureGrids(levels[2], levels[1], levels[0], (tuple(video.shape[2:4]),))

    def get_query_features(self, video, is_training, query_points, feature_grids, refinement_resolutions=None):
        offsets = torch.arange(-3, 4.0)
        offsets = torch.stack(torch.meshgrid(torch.zeros(1), offsets, offsets, indexing="ij"), -1)[0]
        supports = []
        for (grid,) in feature_grids[:3]:
            size = torch.tensor(grid.shape[1:4])
            at = (query_points * (size / torch.tensor(video.shape[1:4])))[:, :, None, None] + offsets
            t, y, x = (at / size * 2 - 1).unbind(-1)
            at = torch.stack([x, y, t + 1 / grid.shape[1]], -1)
            cells = grid.permute(0, 4, 1, 2, 3)
            sampled = F.grid_sample(cells, at, padding_mode="border", align_corners=False)
            supports.append((sampled.permute(0, 2, 3, 4, 1),))
        centres = [(support[:, :, 3, 3],) for (support,) in supports]
        return QueryFeatures(*centres, *supports, feature_grids.resolutions)

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
        grids, (resolution,) = feature_grids, feature_grids.resolutions
        image = (*grids.lowres[0].shape[:2], *self.initial_resolution, 3)
        chunks = []
        for start in range(0, query_points_in_video.shape[1], query_chunk_size):
            lowres, hires, highest, *supports = (x[0][:, start : start + query_chunk_size] for x in query_features[:6])
            queries = query_points_in_video[:, start : start + query_chunk_size]
            points, occlusion, expected, cost = self.tracks_from_cost_volume(
                lowres, hires, grids.lowres[0], grids.hires[0], queries, im_shp=image
            )
            steps, carried = [(points, occlusion, expected)], None
            for i in range(self.num_pips_iter):
                points, occlusion, expected, carried, _ = self.refine_pips(
                    [hires, lowres, highest],
                    [supports[1], supports[0], supports[2]],
                    None,
                    [grids.hires[0], grids.lowres[0], grids.highest[0]],
                    points.detach(),
                    occlusion.detach(),
                    expected.detach(),
                    orig_hw=self.initial_resolution,
                    last_iter=carried,
                    mixer_iter=i,
                    resize_hw=resolution,
                    get_causal_context=get_causal_context,
                    cost_volume=cost,
                )
                steps.append((points, occlusion, expected))
            chunks.append(steps)
        joined = [[torch.cat(x, 1) for x in zip(*step, strict=True)] for step in zip(*chunks, strict=True)]
        return dict(zip(("tracks", "occlusion", "expected_dist"), zip(*joined, strict=True), strict=True))

    def refine_pips(
        self,
        target_feature,
        support_feature,
        frame_features,
        pyramid,
        pos_guess,
        occ_guess,
        expd_guess,
        orig_hw,
        last_iter=None,
        mixer_iter=0.0,
        resize_hw=None,
        causal_context=None,
        get_causal_context=False,
        cost_volume=None,
    ):
        size, resized = torch.tensor(orig_hw[::-1]), torch.tensor(resize_hw[::-1])
        y, x = torch.meshgrid(torch.arange(-3, 4.0), torch.arange(-3, 4.0), indexing="ij")
        embedded = []
        for encoder, support, grid in zip(self.cmdtop, support_feature, pyramid, strict=True):
            cells = torch.tensor([grid.shape[3], grid.shape[2]])
            at = (pos_guess * cells / size)[..., None, None, :] + torch.stack([x, y], -1)
            at = (at / cells * 2 - 1).transpose(1, 2).flatten(0, 1).flatten(2, 3)
            patches = F.grid_sample(grid.flatten(0, 1).movedim(-1, 1), at, padding_mode="zeros", align_corners=False)
            patches = patches.unflatten(3, (7, 7)).unflatten(0, grid.shape[:2])
            volume = torch.einsum("btcnhw,bnijc->bnthwij", patches, support)
            embedded.append(encoder(volume.flatten(0, 2)).unflatten(0, volume.shape[:3]))
        ahead = F.pad(pos_guess[..., :-1, :] - pos_guess[..., 1:, :], (0, 0, 0, 1))
        behind = F.pad(pos_guess[..., 1:, :] - pos_guess[..., :-1, :], (0, 0, 1, 0))
        motion = torch.cat([ahead, behind], -1) * (resized / size / size).repeat(2)
        phase = (motion[..., None, :] * 2 ** torch.arange(10)[:, None]).flatten(-2)
        waves = torch.cat([phase, phase + math.pi / 2], -1).sin()
        tokens = [occ_guess[..., None], expd_guess[..., None], *embedded, motion, waves]
        series = torch.cat(tokens, -1)
        update = self.torch_pips_mixer(series.flatten(0, 1)).unflatten(0, series.shape[:2])
        carried = torch.cat(target_feature[:2], -1)[:, :, None] if last_iter is None else last_iter
        return (
            pos_guess + update[..., :2] * size / resized,
            occ_guess + update[..., 2],
            expd_guess + update[..., 3],
            carried + update[..., 4:],
            None,
        )

    def tracks_from_cost_volume(
        self, interp_feature, interp_feature_hires, feature_grid, feature_grid_hires, query_points, im_shp=None
    ):
        cost = torch.einsum("bnc,bthwc->bnthw", interp_feature, feature_grid)
        fine = torch.einsum("bnc,bthwc->bnthw", interp_feature_hires, feature_grid_hires)
        rows, columns = fine.shape[3:]
        coarse = F.interpolate(cost.flatten(0, 1), (rows, columns), mode="bilinear").unflatten(0, cost.shape[:2])
        pair = torch.stack([coarse, fine], 3)
        weights = (self.cost_conv(pair.flatten(0, 2)) * self.softmax_temperature).flatten(1).softmax(-1)
        weights = weights.unflatten(0, fine.shape[:3])
        y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
        centres = torch.stack([x, y], -1).flatten(0, 1).to(weights.dtype)
        near = (centres - centres[weights.argmax(-1)][..., None, :]).square().sum(-1) < 25
        weights = weights * near
        points = (weights @ centres) / weights.sum(-1, keepdim=True).clamp(min=1e-12)
        points = points * torch.tensor([im_shp[3] / columns, im_shp[2] / rows])
        if query_points is not None:
            own = query_points[..., :1].round() == torch.arange(im_shp[1])
            points = torch.where(own[..., None], query_points[:, :, None, 1:].flip(-1), points)
        statistics = torch.cat([pair.mean((-2, -1)), pair.amax((-2, -1)), pair.amin((-2, -1))], -1)
        occlusion, expected = self.occ_linear(statistics).unbind(-1)
        return points, occlusion, expected, cost
