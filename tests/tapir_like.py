"""A structural twin of TAPIR in PyTorch (google-deepmind/tapnet), written from its description: the same parts, names
and signatures, eager PyTorch throughout, in small. It stands in for the repository where that is not available.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class FeatureGrids(NamedTuple):
    lowres: tuple
    hires: tuple
    resolutions: tuple


class Channels(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp2_up, self.mlp2_down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.mlp2_down(F.gelu(self.mlp2_up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, dim, causal, index, multiplier=4):
        super().__init__()
        self.use_causal_conv, self.block_name = causal, f"block_{index}"
        self.layer_norm, self.layer_norm_1 = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        padding = 0 if causal else 1
        self.mlp1_up = nn.Conv1d(dim, multiplier * dim, 3, padding=padding, groups=dim)
        self.mlp1_up_1 = nn.Conv1d(multiplier * dim, multiplier * dim, 3, padding=padding, groups=multiplier * dim)
        self.multiplier = multiplier
        self.conv_channels_mixer = Channels(dim)

    def forward(self, x, causal_context=None, get_causal_context=False):
        after = {}

        def convolved(conv, rows, number):
            """Zeros, or the context, before the frames."""
            if causal_context is None:
                return conv(F.pad(rows.mT, (2, 0)) if self.use_causal_conv else rows.mT).mT
            name = f"{self.block_name}_causal_{number}"
            rows = torch.cat([causal_context[name], rows], 1)
            after[name] = rows[:, -2:]
            return conv(rows.mT).mT

        hidden = F.gelu(convolved(self.mlp1_up, self.layer_norm(x), 1), approximate="tanh")
        mixed = convolved(self.mlp1_up_1, hidden, 2)
        x = x + mixed.unflatten(-1, (-1, self.multiplier)).sum(-1)
        return x + self.conv_channels_mixer(self.layer_norm_1(x)), after


class Mixer(nn.Module):
    def __init__(self, inputs, outputs, dim, blocks, causal):
        super().__init__()
        self.linear, self.linear_1 = nn.Linear(inputs, dim), nn.Linear(dim, outputs)
        self.layer_norm = nn.LayerNorm(dim, bias=False)
        self.blocks = nn.ModuleList(Block(dim, causal, i) for i in range(blocks))

    def forward(self, x, causal_context=None, get_causal_context=False):
        x, contexts = self.linear(x), {}
        for block in self.blocks:
            x, after = block(x, causal_context, get_causal_context)
            contexts |= after
        return self.linear_1(self.layer_norm(x)), contexts if get_causal_context else {}


class Tracker(nn.Module):
    """Takes videos `[B, T, H, W, 3]` in [-1, 1] and queries `[B, N, 3]` (t, y, x) in pixels."""

    def __init__(self, causal=False, dim=24, blocks=2, initial=(64, 64), maps=(8, 16), heads=(4, 6, 4), steps=2):
        super().__init__()
        self.highres_dim, self.lowres_dim = maps
        self.num_pips_iter, self.pyramid_level = steps, 1
        self.softmax_temperature, self.initial_resolution, self.dim = 20.0, initial, dim
        self.first, self.second = nn.Conv2d(3, maps[0], 4, 4), nn.Conv2d(*maps, 2, 2)
        wide, wider, narrow = heads
        self.torch_cost_volume_track_mods = nn.ModuleDict(
            {
                "hid1": nn.Conv2d(1, wide, 3, 1, 1),
                "hid2": nn.Conv2d(wide, 1, 3, 1, 1),
                "hid3": nn.Conv2d(wide, wider, 3, 2),
                "hid4": nn.Linear(wider, narrow),
                "occ_out": nn.Linear(narrow, 2),
            }
        )
        outputs = 4 + self.highres_dim + self.lowres_dim
        self.torch_pips_mixer = Mixer(outputs + 3 * 49, outputs, dim, blocks, causal)

    def forward(self, video, query_points, query_chunk_size=4):
        grids = self.get_feature_grids(video, False)
        features = self.get_query_features(video, False, query_points, grids)
        results = self.estimate_trajectories(video.shape[2:4], False, grids, features, query_points, query_chunk_size)
        return {name: results[name][-1] for name in ("tracks", "occlusion", "expected_dist")}

    def get_feature_grids(self, video, is_training, refinement_resolutions=None):
        lowres, hires = [], []
        resolutions = (self.initial_resolution, tuple(video.shape[2:4]))
        for at, size in enumerate(resolutions):
            if at and size == resolutions[0]:
                lowres.append(lowres[-1]), hires.append(hires[-1])
                continue
            images = F.interpolate(video.flatten(0, 1).movedim(-1, 1), size, mode="bilinear")
            high = self.first(images).tanh()
            for grid, kept in ((high, hires), (self.second(high), lowres)):
                grid = grid.movedim(1, -1).unflatten(0, video.shape[:2])
                kept.append(grid / grid.square().sum(-1, keepdim=True).clamp(min=1e-12).sqrt())
        return FeatureGrids(tuple(lowres), tuple(hires), resolutions)

    def get_query_features(self, video, is_training, query_points, grids):
        def sampled(grid):
            size = torch.tensor(grid.shape[1:4])
            t, y, x = (query_points * (size / torch.tensor(video.shape[1:4]))).unbind(-1)
            at = torch.stack([x, y, t + 0.5], -1) / size.flip(0) * 2 - 1
            volume = grid.permute(0, 4, 1, 2, 3)
            return F.grid_sample(volume, at[:, :, None, None], padding_mode="border", align_corners=False)[..., 0, 0].mT

        return tuple(map(sampled, grids.lowres)), tuple(map(sampled, grids.hires))

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
        lowres, hires = query_features
        height, width = self.initial_resolution
        image = (*feature_grids.lowres[0].shape[:2], height, width, 3)
        parts = []
        for start in range(0, lowres[0].shape[1], query_chunk_size):
            chunk = slice(start, start + query_chunk_size)
            known = query_points_in_video
            if known is not None:
                known = known[:, chunk] * torch.tensor([1, height / video_size[0], width / video_size[1]])
            state = self.tracks_from_cost_volume(lowres[0][:, chunk], feature_grids.lowres[0], known, image)
            pyramid = [feature_grids.hires[1], feature_grids.lowres[1]]
            pyramid.append(F.avg_pool3d(pyramid[-1], (2, 2, 1)))
            queries = [hires[1][:, chunk], lowres[1][:, chunk], lowres[1][:, chunk]]
            last, contexts = None, []
            for i in range(self.num_pips_iter):
                context = None
                if causal_context is not None:
                    context = {name: x[:, chunk] for name, x in causal_context[i].items()}
                *state, last, after = self.refine_pips(
                    queries,
                    None,
                    pyramid,
                    *state,
                    orig_hw=self.initial_resolution,
                    last_iter=last,
                    mixer_iter=i,
                    resize_hw=feature_grids.resolutions[1],
                    causal_context=context,
                    get_causal_context=get_causal_context,
                )
                contexts.append(after)
            points = state[0] * torch.tensor([video_size[1] / width, video_size[0] / height])
            parts.append((points, state[1], state[2], contexts))
        points, occlusion, expected, contexts = zip(*parts, strict=True)
        names = ("tracks", "occlusion", "expected_dist")
        out = {name: [torch.cat(x, 1)] for name, x in zip(names, (points, occlusion, expected), strict=True)}
        if get_causal_context:
            out["causal_context"] = [
                {name: torch.cat([chunk[i][name] for chunk in contexts], 1) for name in contexts[0][i]}
                for i in range(self.num_pips_iter)
            ]
        return out

    def construct_initial_causal_state(self, num_points, num_resolutions=1):
        zeros = {
            f"block_{i}_causal_{j}": torch.zeros(1, num_points, 2, self.dim * 4 ** (j - 1))
            for i in range(len(self.torch_pips_mixer.blocks))
            for j in (1, 2)
        }
        return [zeros] * num_resolutions * self.num_pips_iter

    def refine_pips(
        self,
        target_feature,
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
    ):
        size = torch.tensor(orig_hw[::-1])
        steps = torch.arange(-3, 4)
        offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).flatten(0, 1)  # [49, 2] (y, x)
        found = []
        for level, (query, grid) in enumerate(zip(target_feature, pyramid, strict=True)):
            height, width = grid.shape[2:4]
            at = (pos_guess * torch.tensor([width, height]) / size).flip(-1)[..., None, :] + offsets
            # Both axes by the height, as the official code has it.
            at = (at / height * 2 - 1).flip(-1).transpose(1, 2).flatten(0, 1)
            images = grid.permute(0, 1, 4, 2, 3).flatten(0, 1)
            patches = F.grid_sample(images, at, align_corners=False)  # [B T, C, N, 49]
            patches = patches.unflatten(0, grid.shape[:2]).permute(0, 3, 1, 4, 2)
            if last_iter is None:
                found.append(torch.einsum("bntpc,bnc->bntp", patches, query))
            else:
                own = last_iter[..., : self.highres_dim] if level == 0 else last_iter[..., self.highres_dim :]
                found.append(torch.einsum("bntpc,bntc->bntp", patches, own))
        features = last_iter
        if features is None:
            features = torch.cat(target_feature[:2], -1)[:, :, None].expand(-1, -1, occ_guess.shape[2], -1)
        tokens = [torch.zeros_like(pos_guess), occ_guess[..., None], expd_guess[..., None], features, *found]
        tokens = torch.cat(tokens, -1)
        for name in causal_context or ():  # in place, as the official code has it
            causal_context[name] = causal_context[name].flatten(0, 1)
        out, after = self.torch_pips_mixer(tokens.flatten(0, 1).float(), causal_context, get_causal_context)
        out = out.unflatten(0, tokens.shape[:2])
        after = {name: x.unflatten(0, tokens.shape[:2]) for name, x in after.items()}
        moved = out[..., :2] * size / torch.tensor(resize_hw[::-1])
        return pos_guess + moved, out[..., 2] + occ_guess, out[..., 3] + expd_guess, out[..., 4:] + features, after

    def tracks_from_cost_volume(self, interp_feature, feature_grid, query_points, im_shp=None):
        heads = self.torch_cost_volume_track_mods
        cost = torch.einsum("bnc,bthwc->bnthw", interp_feature, feature_grid)
        frames, rows, columns = cost.shape[2:]
        hidden = heads["hid1"](cost.flatten(0, 2)[:, None]).relu()
        weights = (heads["hid2"](hidden).view_as(cost) * self.softmax_temperature).flatten(3).softmax(-1)
        y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
        centres = torch.stack([x, y], -1).flatten(0, 1)
        near = (centres - centres[weights.argmax(-1)][..., None, :]).square().sum(-1) < 25
        weights = weights * near
        points = (weights @ centres) / weights.sum(-1, keepdim=True).clamp(min=1e-12)
        points = points.detach() * torch.tensor([im_shp[3] / columns, im_shp[2] / rows])
        if query_points is not None:
            own = query_points[..., :1].round() == torch.arange(frames)
            points = torch.where(own[..., None], query_points[:, :, None, 1:].flip(-1), points)
        hidden = heads["hid3"](F.pad(hidden, (0, 2, 0, 2))).relu().mean((-2, -1))
        logits = heads["occ_out"](heads["hid4"](hidden).relu()).view(*cost.shape[:3], 2)
        return points, logits[..., 0], logits[..., 1]
