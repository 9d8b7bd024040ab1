"""Attention along point tracks: the layer that turns an image network into a video network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tritonkern.functional import track_sample_attention, track_splat_attention
from tritonkern.nn._inputs import check_inputs
from tritonkern.ops._checks import check_mask
from tritonkern.ops.track_attention.op import visible_tracks


class TrackBlock(nn.Module):
    """Pre-norm transformer block on the tokens of tracks over time, `[B, M, T, C]`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`: `[B, M, 1, T, T]` bool, which frames (last axis) a frame may attend to."""
        qkv = self.qkv(self.norm1(x))
        query, key, value = rearrange(qkv, "b m t (three h d) -> three b m h t d", three=3, h=self.num_heads)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.proj(rearrange(attended, "b m h t d -> b m t (h d)"))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Tracktention(nn.Module):
    """Features travel along point tracks: sampled at the tracks, exchanged over time, splatted back, and added.

    1. Sampling: every track gathers projected features around its position, frame by frame
       (`tritonkern.track_sample_attention`); its query comes from an embedding of the position.
    2. Track transformer: `depth` blocks over the frames of each track, which look only at frames where it is visible.
    3. Splatting: every cell gathers the updated tokens of the tracks around it (`tritonkern.track_splat_attention`),
       which are projected and added to the features.

    The last projection starts at zero and has no bias: a new layer returns its input, and a frame without a visible
    track stays as it is even after training, bit for bit. Queries and keys pass a LayerNorm over all channels and are
    then rotated by their absolute positions, the same function for cells and tracks, so that their products depend on
    the difference of positions and their norms, which bound what culling may skip, stay.

    State dict, C = dim, all weights `[out, in]`: ``project`` (C, C; features to values), ``sample_query``,
    ``sample_key``, ``splat_query``, ``splat_key``, ``splat_value`` (C, C, with bias), each query and key with a
    LayerNorm ``*_norm`` (C), ``blocks.{i}`` (``norm1``, ``qkv`` (3C, C), ``proj``, ``norm2``, ``fc1`` (4C, C), ``fc2``)
    and ``out.weight`` (C, C). There are no buffers.

    Args:
        dim: channels C of the features, a multiple of num_heads; dim / num_heads a multiple of 8 up to 256.
        num_heads: heads of sampling, splatting and the track transformer.
        depth: blocks of the track transformer; 0 leaves time out.
        sigma: width in cells of the bias on distance, see `track_sample_attention`.

    Raises:
        ValueError: sizes that do not fit.

    Paper: Lai and Vedaldi, "Tracktention: Leveraging Point Tracking to Attend Videos Faster and Better", CVPR 2025.
    """

    def __init__(self, dim: int, num_heads: int = 8, depth: int = 2, sigma: float = 0.5) -> None:
        super().__init__()
        if num_heads < 1 or dim % (8 * num_heads) or not 8 <= dim // num_heads <= 256:
            raise ValueError(
                f"dim / num_heads must be a multiple of 8 from 8 to 256, got {dim} / {num_heads}; "
                "choose another num_heads"
            )
        if depth < 0:
            raise ValueError(f"depth must be 0 or more blocks, got {depth}")
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        self.dim = dim
        self.num_heads = num_heads
        self.sigma = sigma
        self.project = nn.Linear(dim, dim)
        self.sample_query = nn.Linear(dim, dim)
        self.sample_query_norm = nn.LayerNorm(dim)
        self.sample_key = nn.Linear(dim, dim)
        self.sample_key_norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(TrackBlock(dim, num_heads) for _ in range(depth))
        self.splat_query = nn.Linear(dim, dim)
        self.splat_query_norm = nn.LayerNorm(dim)
        self.splat_key = nn.Linear(dim, dim)
        self.splat_key_norm = nn.LayerNorm(dim)
        self.splat_value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, features: Tensor, tracks: Tensor, visibility: Tensor | None = None) -> Tensor:
        """Features with information of the other frames added.

        Args:
            features: `[B, T, h, w, C]`, any strides.
            tracks: `[B, T, M, 2]` (x, y) in cells of the features, cell i with its centre at i + 0.5; anywhere, also
                outside. Point m is the same in every frame. M may be 0.
            visibility: `[B, T, M]` bool. Where it is False, or a coordinate is not finite, the point takes no part in
                that frame.

        Returns:
            Tensor of the shape, dtype and memory order of `features`.

        Raises:
            TypeError, ValueError: shapes or dtypes that do not fit together.
        """
        check_inputs(self, features=features, tracks=tracks)
        if features.ndim != 5 or features.shape[-1] != self.dim:
            raise ValueError(f"features must be [B, T, h, w, {self.dim}], got {list(features.shape)}")
        if tracks.ndim != 4 or tracks.shape[:2] != features.shape[:2] or tracks.shape[3] != 2:
            batch, frames = features.shape[:2]
            raise ValueError(f"tracks must be [{batch}, {frames}, M, 2], got {list(tracks.shape)}")
        if visibility is not None:
            check_mask("visibility", visibility, tracks.shape[:3], tracks.device)
        place = torch.promote_types(tracks.dtype, torch.float32)
        rows, columns = features.shape[2:4]
        y, x = (torch.arange(n, device=tracks.device, dtype=place) + 0.5 for n in (rows, columns))
        cell_centers = torch.stack(torch.broadcast_tensors(x, y[:, None]), -1)  # [h, w, 2]
        visible = visible_tracks(tracks, visibility)
        # What is not visible is never used, but the gradient of a NaN would be one.
        points = torch.where(visible[..., None], tracks, 0).to(place)

        projected = self.project(features)
        key = self._heads(self.sample_key_norm(self.sample_key(projected)), cell_centers)
        query = self.sample_query_norm(self.sample_query(position_embedding(points, self.dim).to(features.dtype)))
        value = projected.unflatten(-1, (self.num_heads, -1))
        sampled = track_sample_attention(
            self._heads(query, points), key, value, points, sigma=self.sigma, visibility=visible
        )
        tokens = self._over_time(sampled.flatten(-2), visible)

        key = self._heads(self.splat_key_norm(self.splat_key(tokens)), points)
        query = self.splat_query_norm(self.splat_query(position_embedding(cell_centers, self.dim).to(features.dtype)))
        query = self._heads(query, cell_centers).expand(*features.shape[:2], -1, -1, -1, -1)
        value = self.splat_value(tokens).unflatten(-1, (self.num_heads, -1))
        update = track_splat_attention(query, key, value, points, sigma=self.sigma, visibility=visible)
        return features + self.out(update.flatten(-2)).to(features.dtype)

    def _heads(self, x: Tensor, positions: Tensor) -> Tensor:
        """`[..., C]` -> `[..., H, D]`, each head rotated by the position."""
        return rotate(x.unflatten(-1, (self.num_heads, -1)), positions)

    def _over_time(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """The track transformer on `[B, T, M, C]`."""
        frames = tokens.shape[1]
        time = torch.arange(frames, device=tokens.device, dtype=torch.float32)
        tokens = tokens.transpose(1, 2) + _waves(time, self.dim, 1e4).to(tokens.dtype)  # [B, M, T, C]
        # Every frame may attend to itself, so that no softmax is empty.
        itself = torch.eye(frames, dtype=torch.bool, device=tokens.device)
        mask = rearrange(visible, "b t m -> b m 1 1 t") | itself
        for block in self.blocks:
            tokens = block(tokens, mask)
        return tokens.transpose(1, 2)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, sigma={self.sigma}"


def position_embedding(positions: Tensor, dim: int) -> Tensor:
    """Sines and cosines of `[..., 2]` positions in cells, `[..., dim]`: half of the channels for x, half for y."""
    return torch.cat([_waves(axis, dim // 2, 1e4) for axis in positions.unbind(-1)], -1)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding in two dimensions of heads `[..., H, D]` at `[..., 2]` positions in cells.

    The first half of the channels turns with x, the second with y, pairs of neighbours as planes; wavelengths from
    2 pi to about 600 cells. The product of two rotated vectors depends on the difference of their positions, and a
    rotation keeps its norm.
    """
    pairs = x.shape[-1] // 4
    speed = 100.0 ** (-torch.arange(pairs, device=x.device, dtype=positions.dtype) / pairs)
    angle = (positions[..., None] * speed).flatten(-2)[..., None, :]  # [..., 1, D / 2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def _waves(x: Tensor, dim: int, longest: float) -> Tensor:
    """Sines and cosines of `[...]` at dim / 2 wavelengths, from 2 pi to 2 pi `longest`; `[..., dim]`."""
    speed = longest ** (-torch.arange(dim // 2, device=x.device, dtype=x.dtype) / (dim // 2))
    angle = x[..., None] * speed
    return torch.cat([angle.sin(), angle.cos()], -1)
