"""chrono-nano: the recipe of Chrono at a size that trains from scratch on a CPU and ships inside the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tritonkern.models._streaming import Frames, StreamedTracker
from tritonkern.models.checkpoints import load_strict, read_state_dict
from tritonkern.models.dinov2 import Block
from tritonkern.models.matching import MatchingTracker
from tritonkern.nn import TemporalAdapter
from tritonkern.nn._plain import has_hooks

# Frames that are convolved together where no gradient is needed.
_BLOCK = 8


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group normalisation, `[B, C_in, H, W]` -> `[B, C_out, H / stride, W / stride]`."""

    def __init__(self, dim_in: int, dim_out: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, stride, 1)
        self.norm1 = nn.GroupNorm(8, dim_out)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, 1, 1)
        self.norm2 = nn.GroupNorm(8, dim_out)
        same = stride == 1 and dim_in == dim_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(dim_in, dim_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


class ChronoNano(StreamedTracker, MatchingTracker):  # type: ignore[misc]  # as MatchingTracker
    """A small vision transformer with temporal adapters and Chrono's matching head.

    A convolutional stem gives 64x64 cells of local appearance; a transformer on 16x16 tokens, with a
    `TemporalAdapter` after each block but the last as in Chrono (Kim et al., CVPR 2025), adds
    context from the surroundings and the neighbouring frames; the two are added at 64x64 cells, where one more adapter
    attends along time. Set
    `temporal = False` to run without the adapters (for ablations).

    `features(video)`: float `[B, T, 256, 256, 3]` in [-1, 1] -> unit-norm `[B, T, 64, 64, 128]` in
    float32, or float64 for a model converted to it.
    """

    resolution = (256, 256)
    temporal = True

    def __init__(self, dim: int = 192, depth: int = 4, num_heads: int = 4, local_dim: int = 64, out_dim: int = 128):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 7, 2, 3),
            nn.GroupNorm(8, 32),
            nn.ReLU(),
            ResidualBlock(32, local_dim, stride=2),
            ResidualBlock(local_dim, local_dim),
        )
        self.patch_embed = nn.Conv2d(local_dim, dim, 4, 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 16 * 16, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.adapter = nn.ModuleList(TemporalAdapter(dim, hidden=64, pool=2) for _ in range(depth - 1))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.upsample = nn.ConvTranspose2d(dim, local_dim, 4, 4)
        self.fuse = ResidualBlock(local_dim, local_dim)
        self.local_adapter = TemporalAdapter(local_dim, hidden=64, pool=4)
        self.local_norm = nn.LayerNorm(local_dim, eps=1e-6)
        self.head = nn.Linear(local_dim, out_dim)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> ChronoNano:
        """The model with the weights that `tritonkern train` wrote to `path`, in float32.

        Raises `FileNotFoundError` if there is no such file, `ValueError` if it does not hold this model's weights.
        """
        with torch.device("meta"):
            model = cls()
        load_strict(model, read_state_dict(path), str(path))
        return model.eval()

    def features(self, video: Tensor) -> Tensor:
        batch, frames = video.shape[:2]
        images = rearrange(video.to(self.pos_embed.dtype), "b t h w c -> (b t) c h w")
        local = frames_in_blocks(lambda x: self.stem(x).movedim(1, -1), [self.stem], images).movedim(-1, 1)

        tokens = rearrange(self.patch_embed(local), "n c h w -> n (h w) c") + self.pos_embed
        for index, block in enumerate(self.blocks):
            tokens = frames_in_blocks(block, [block], tokens)
            if self.temporal and index < len(self.adapter):
                adapter = cast(TemporalAdapter, self.adapter[index])
                tokens = adapter.add_to(tokens.unflatten(0, (batch, frames)), (16, 16)).flatten(0, 1)
        context = rearrange(self.norm(tokens), "n (h w) c -> n c h w", h=16)

        cells = frames_in_blocks(
            lambda local, context: self.fuse(local + self.upsample(context)).movedim(1, -1),
            [self.fuse, self.upsample],
            local,
            context,
        ).unflatten(0, (batch, frames))
        del local, tokens, context
        if self.temporal:
            grid = cells.shape[2:4]
            cells = self.local_adapter.add_to(cells.flatten(2, 3), grid).unflatten(2, grid)
        modules = [self.local_norm, self.head]
        return frames_in_blocks(self._unit_features, modules, cells.flatten(0, 1)).unflatten(0, (batch, frames))

    def _stages(self) -> list[Callable[[Frames], Any]]:
        if not self.temporal:
            return [lambda frame: self.features(frame[0])]
        middle = [lambda frame, block=block: (_each(block, frame[0]), *frame[1:]) for block in self.blocks[1:-1]]
        return [self._first_stage, *middle, self._cells_stage, self._last_stage]

    def _adapters(self) -> list[tuple[TemporalAdapter, tuple[int, int]]]:
        adapters = [*cast(list[TemporalAdapter], list(self.adapter)), self.local_adapter]
        grids = [(16, 16)] * len(self.adapter) + [(64, 64)]
        return list(zip(adapters, grids, strict=True)) if self.temporal else []

    def _first_stage(self, frame: Frames) -> Frames:
        video = frame[0]
        local = self.stem(rearrange(video.to(self.pos_embed.dtype), "b t h w c -> (b t) c h w"))
        tokens = rearrange(self.patch_embed(local), "n c h w -> n (h w) c") + self.pos_embed
        return self.blocks[0](tokens).unflatten(0, video.shape[:2]), local.unflatten(0, video.shape[:2])

    def _cells_stage(self, frame: Frames) -> Frames:
        tokens, local, *others = frame
        context = rearrange(self.norm(_each(self.blocks[-1], tokens)).flatten(0, 1), "n (h w) c -> n c h w", h=16)
        cells = self.fuse(local.flatten(0, 1) + self.upsample(context))
        return rearrange(cells, "(b t) c h w -> b t (h w) c", b=len(tokens)), *others

    def _last_stage(self, frame: Frames) -> Any:
        return self._unit_features(frame[0].unflatten(2, (64, 64)))

    def _unit_features(self, cells: Tensor) -> Tensor:
        features = self.head(self.local_norm(cells))
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _each(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of frames `[N, ...]`, of frames `[B, T, ...]`."""
    return function(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def frames_in_blocks(function: Callable[..., Tensor], modules: Sequence[nn.Module], *frames: Tensor) -> Tensor:
    """`function` of tensors whose first axis is the frames; some frames at a time where no gradient is needed.

    The stem needs 20 MB per frame. Its results are the same in any blocks, up to rounding. If one of the `modules` that
    `function` calls, or a part of one, has hooks, they see all frames at once.
    """
    hooked = any(has_hooks(part) for module in modules for part in module.modules())
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or hooked or len(frames[0]) <= _BLOCK:
        return function(*frames)
    first = function(*(tensor[:_BLOCK] for tensor in frames))
    result = first.new_empty(len(frames[0]), *first.shape[1:])
    result[:_BLOCK] = first
    for start in range(_BLOCK, len(result), _BLOCK):
        result[start : start + _BLOCK] = function(*(tensor[start : start + _BLOCK] for tensor in frames))
    return result
