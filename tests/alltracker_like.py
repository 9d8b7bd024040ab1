"""A structural twin of AllTracker, written from its description: the names, shapes and calls that `tritonkern.patch`
replaces, small, in eager PyTorch. It stands in for the repository where there is none.
"""

import torch
import torch.nn.functional as F
from cotracker_like import Attention
from einops import rearrange
from torch import nn


class CorrBlock:
    """Correlations of all pairs of cells on several resolutions, sampled around positions."""

    def __init__(self, fmap1, fmap2, corr_levels, corr_radius):
        self.radius, self.volumes = corr_radius, []
        for _ in range(corr_levels):
            volume = torch.einsum("bcij,bchw->bijhw", fmap1, fmap2) / fmap1.shape[1] ** 0.5
            self.volumes.append(volume.flatten(0, 2)[:, None])
            fmap2 = F.interpolate(fmap2, scale_factor=0.5, mode="area")

    def __call__(self, coords):
        steps = torch.arange(-self.radius, self.radius + 1.0)
        offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)
        batch, _, height, width = coords.shape
        centres, found = rearrange(coords, "b c h w -> (b h w) 1 1 c"), []
        for level, volume in enumerate(self.volumes):
            size = torch.tensor([volume.shape[3] - 1, volume.shape[2] - 1]).clamp(min=1)
            grid = (centres / 2**level + offsets) * (2 / size) - 1
            found.append(F.grid_sample(volume, grid.to(volume.dtype), padding_mode="border", align_corners=True))
        return rearrange(torch.cat(found, 1).flatten(1), "(b h w) c -> b c h w", b=batch, h=height, w=width).float()


class TimeBlock(nn.Module):
    """Attention over time of every cell."""

    dense = True

    def __init__(self, dim):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(dim), Attention(dim, 2)
        self.layer_scale = nn.Parameter(torch.full((dim, 1), 0.3))

    def forward(self, input, S=None):
        frames, _, height, width = input.shape
        x = rearrange(input, "(b s) c h w -> (b h w) s c", s=S)
        x = x + self.attn(self.norm(x)) * self.layer_scale[:, 0]
        return rearrange(x, "(b h w) s c -> (b s) c h w", b=frames // S, h=height, w=width)


class SpaceBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(dim, dim, 7, padding=3, groups=dim), nn.Conv2d(dim, dim, 1), nn.GELU())

    def forward(self, input, S=None):
        return input + self.block(input)


class MotionEncoder(nn.Module):
    def __init__(self, correlations, dim):
        super().__init__()
        self.convc1, self.convf1 = nn.Conv2d(correlations, dim - 2, 1), nn.Conv2d(2, dim - 2, 5, padding=2)

    def forward(self, flow, corr):
        return torch.cat([F.relu(self.convc1(corr)) + F.relu(self.convf1(flow)), flow], 1)


class UpdateBlock(nn.Module):
    def __init__(self, correlations, dim):
        super().__init__()
        self.motion_encoder = MotionEncoder(correlations, dim)
        self.compressor = nn.Conv2d(3 * dim + 2, dim, 1)
        self.refine = nn.ModuleList([TimeBlock(dim), SpaceBlock(dim)])
        self.final_conv = nn.Conv2d(dim, dim, 1)

    def forward(self, flowfeat, ctxfeat, visconf, corr, flow, S):
        features = self.compressor(torch.cat([flowfeat, ctxfeat, self.motion_encoder(flow, corr), visconf], 1))
        for block in self.refine:
            features = block(features, S)
        return self.final_conv(features)


def head(dim, out, kernel):
    layers = (
        nn.Conv2d(dim, 2 * dim, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(2 * dim, out, kernel, padding="same"),
    )
    return nn.Sequential(*layers)


class Net(nn.Module):
    def __init__(self, seqlen=4, dim=16, levels=2, radius=2):
        super().__init__()
        self.seqlen, self.dim, self.corr_levels, self.corr_radius = seqlen, dim, levels, radius
        self.fnet = nn.Sequential(nn.Conv2d(3, 2 * dim, 8, 8), nn.InstanceNorm2d(2 * dim))
        self.update_block = UpdateBlock(levels * (2 * radius + 1) ** 2, dim)
        self.upsample_weight, self.flow_head, self.visconf_head = head(dim, 576, 1), head(dim, 2, 3), head(dim, 2, 3)
        self.register_buffer("time_emb", torch.linspace(-1, 1, seqlen)[None, :, None].expand(1, -1, dim).clone())

    def get_fmaps(self, images_, B, T, sw, is_training):
        if not is_training:
            images_ = images_.cuda()
        return self.fnet(images_)

    def upsample_data(self, flow, mask):
        count, _, height, width = flow.shape
        mask = mask.view(count, 1, 9, 8, 8, height, width).softmax(2)
        neighbours = F.unfold(8 * flow, [3, 3], padding=1).view(count, 2, 9, 1, 1, height, width)
        return rearrange((mask * neighbours).sum(2), "n c a b h w -> n c (h a) (w b)")

    def forward_window(self, fmap1_single, fmaps2, visconfs8, iters=None, flows8=None, is_training=False):
        batch, frames, channels, height, width = fmaps2.shape
        fmap1, fmap2 = fmap1_single[:, None].repeat(1, frames, 1, 1, 1).flatten(0, 1), fmaps2.flatten(0, 1)
        corr_fn = CorrBlock(fmap1, fmap2, self.corr_levels, self.corr_radius)
        grid = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        cells = torch.stack(grid[::-1]).to(fmaps2.dtype)
        flowfeat, ctxfeat = fmap1.split(self.dim, 1)
        ctxfeat = ctxfeat + self.time_emb[:, :frames].expand(batch, -1, -1).flatten(0, 1)[..., None, None]
        flows, visconfs = [], []
        for _ in range(iters):
            flows8 = flows8.detach()
            corr = corr_fn(cells + flows8).to(fmaps2.dtype)
            flowfeat = self.update_block(flowfeat, ctxfeat, visconfs8, corr, flows8, frames)
            flows8, visconfs8 = flows8 + self.flow_head(flowfeat), visconfs8 + self.visconf_head(flowfeat)
            weights = 0.25 * self.upsample_weight(flowfeat)
            flows.append(self.upsample_data(flows8, weights))
            visconfs.append(self.upsample_data(visconfs8, weights))
        return flows, visconfs, flows8, visconfs8, flowfeat

    def forward(self, images, iters=4, sw=None, is_training=False, stride=None):
        """`[B, T, 3, H, W]` in [0, 255] -> flow from the first frame and visibility `[B, T, 2, H, W]`, lists of all."""
        batch, count, _, rows, columns = images.shape
        length = self.seqlen
        images = (images / 255 - 0.45) / 0.22
        starts = list(range(0, max(count - length, 0) + 1, length // 2))
        fmaps = self.get_fmaps(images.flatten(0, 1), batch, count, sw, is_training).unflatten(0, (batch, count))
        if count == 2:
            zero = fmaps.new_zeros(batch, 2, *fmaps.shape[-2:])
            flows, visconfs, *_ = self.forward_window(fmaps[:, 0], fmaps[:, 1:], zero, iters, zero, is_training)
            flows, visconfs = (
                [x[..., :rows, :columns].reshape(batch, 2, rows, columns) for x in xs] for xs in (flows, visconfs)
            )
            return flows[-1], visconfs[-1].sigmoid(), flows, [x.sigmoid() for x in visconfs]
        full = fmaps.new_zeros(2, batch, count, 2, rows, columns)
        full8 = fmaps.new_zeros(2, batch, count, 2, *fmaps.shape[-2:])
        all_flows, all_visconfs = ([], []) if is_training else (None, None)
        for start in starts:
            some = slice(start, start + length)
            flows8, visconfs8 = (x[:, some].flatten(0, 1).detach().clone() for x in full8)
            flows, visconfs, flows8, visconfs8, _ = self.forward_window(
                fmaps[:, 0], fmaps[:, some], visconfs8, iters=iters, flows8=flows8, is_training=is_training
            )
            for i in range(len(flows)):
                flows[i] = flows[i][..., :rows, :columns].reshape(batch, length, 2, rows, columns)
                visconfs[i] = torch.sigmoid(visconfs[i][..., :rows, :columns]).reshape(batch, length, 2, rows, columns)
            full[0][:, some], full[1][:, some] = flows[-1], visconfs[-1]
            full8[0][:, start:], full8[1][:, start:] = 0, 0
            full8[0][:, some], full8[1][:, some] = flows8.unflatten(0, (batch, -1)), visconfs8.unflatten(0, (batch, -1))
            if is_training:
                all_flows.append(flows)
                all_visconfs.append(visconfs)
        return full[0], full[1], all_flows, all_visconfs
