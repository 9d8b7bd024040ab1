"""Layers that attend along time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tritonkern.distributed import halo_window_attention
from tritonkern.functional import temporal_window_attention
from tritonkern.functional._arguments import window_extent
from tritonkern.nn._inputs import check_inputs
from tritonkern.ops.temporal_window_attention.op import check_window

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AttentionState(NamedTuple):
    """What `TemporalWindowAttention.step` carries from frame to frame."""

    lookahead: int
    """Frames that an output waits for."""
    frames: int
    """Frames seen."""
    queries: Any
    """`[B, <= lookahead, N, H, D]` of the frames whose output waits; None before the first frame."""
    keys: Any
    """`[B, left + 1 + lookahead, N, H, D]`, a ring: frame t is in row t modulo its length."""
    values: Any


class TemporalWindowAttention(nn.Module):
    """Multi-head self-attention over a sliding window of frames.

    Parameters are those of Chrono's `LocalAttentionLayer` (`qkv`, `proj`, and with ``qk_norm=True`` also `q_norm` and
    `k_norm`), so that its state dict loads. Unlike that layer it runs on every device and in every floating dtype.

    Args:
        dim: channels C of the input, a multiple of num_heads; dim / num_heads must be a multiple of 8 up to 256.
        num_heads: attention heads H.
        window_size: odd number of frames seen in all, or ``(left, right)``; cut off at the ends of the clip.
        qkv_bias: whether the projection to query, key and value has a bias.
        qk_norm: whether query and key pass through a LayerNorm over the head dimension.
        attn_drop: dropout on the attention weights; only 0 is implemented.
        proj_drop: dropout on the output, in training mode.

    Raises:
        ValueError: sizes that do not fit, a bad window, or a non-zero attn_drop.

    Paper: Kim et al., "Exploring Temporally-Aware Features for Point Tracking", CVPR 2025.
    """

    frames_group: ProcessGroup | None = None
    """Set by `tritonkern.distributed.shard_frames`: the ranks that hold the stretches of the clip."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: int | tuple[int, int] = 13,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f"dim must be a multiple of num_heads, got dim={dim} and num_heads={num_heads}")
        self.head_dim = dim // num_heads
        if self.head_dim % 8 != 0 or not 8 <= self.head_dim <= 256:
            raise ValueError(
                f"dim / num_heads must be a multiple of 8 from 8 to 256, got {dim} / {num_heads} = {self.head_dim}; "
                "choose another num_heads"
            )
        if attn_drop != 0:
            raise ValueError(
                f"attn_drop must be 0, got {attn_drop}: the weights are never stored, so they cannot be dropped; "
                "use proj_drop for regularisation"
            )
        self.num_heads = num_heads
        self.window = window_extent(window_size)
        check_window(*self.window)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` or ``[B, T, N, C]`` -> the same shape; every position n attends along T on its own."""
        query, key, value = self._heads(x)
        if self.frames_group is None:
            return self._merged(temporal_window_attention(query, key, value, self.window))
        return self._merged(halo_window_attention(query, key, value, self.window, self.frames_group))

    def begin(self, lookahead: int | None = None) -> AttentionState:
        """The state before the first frame, for `step`.

        Args:
            lookahead: frames that an output waits for. Windows reach `min(right, lookahead)` frames ahead; None waits
                for the whole window.
        """
        right = self.window[1]
        return AttentionState(right if lookahead is None else min(right, lookahead), 0, None, None, None)

    @torch.no_grad()
    def step(self, state: AttentionState, x: Tensor) -> tuple[AttentionState, Tensor | None]:
        """The next frame of a stream: ``[B, 1, N, C]`` -> the output of the frame `lookahead` frames ago, or None.

        Forward only. A stream of a clip, with the whole window as lookahead and `finish` at its end, has the results of
        one call. Keys and values are kept in a ring of one window, which is written in place: `state` is used up.

        Raises:
            ValueError: not one frame.
        """
        if x.dim() != 4 or x.shape[1] != 1:
            raise ValueError(f"x must be one frame, [B, 1, N, {self.qkv.in_features}], got {tuple(x.shape)}")
        query, key, value = self._heads(x)
        lookahead, frames, queries, keys, values = state
        if queries is None:
            size = self.window[0] + 1 + lookahead
            ring = (len(query), size, *query.shape[2:])
            queries, keys, values = query[:, :0], key.new_zeros(ring), value.new_zeros(ring)
        keys[:, frames % keys.shape[1]] = key[:, 0]
        values[:, frames % keys.shape[1]] = value[:, 0]
        state = AttentionState(lookahead, frames + 1, torch.cat([queries, query], 1), keys, values)
        if state.queries.shape[1] <= lookahead:
            return state, None
        out = self._attended(state, 1)
        return state._replace(queries=state.queries[:, 1:]), out

    @torch.no_grad()
    def finish(self, state: AttentionState) -> Tensor | None:
        """The outputs of the frames that still wait, ``[B, T, N, C]``; their windows end with the stream. None where
        there are none."""
        waiting = 0 if state.queries is None else state.queries.shape[1]
        return self._attended(state, waiting) if waiting else None

    def _attended(self, state: AttentionState, count: int) -> Tensor:
        """The first `count` of the waiting frames."""
        lookahead, frames, queries, keys, values = state
        stored = min(frames, keys.shape[1])
        oldest = frames - stored
        out = temporal_window_attention(
            queries[:, :count],
            keys[:, :stored],
            values[:, :stored],
            (self.window[0], lookahead),
            query_offset=frames - queries.shape[1] - oldest,
            start=oldest % keys.shape[1],
        )
        return self._merged(out)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, ``[..., H, D]``."""
        check_inputs(self, x=x)
        if x.dim() not in (3, 4) or x.shape[-1] != self.qkv.in_features:
            raise ValueError(
                f"x must have shape [B, T, {self.qkv.in_features}] or [B, T, N, {self.qkv.in_features}], "
                f"got {tuple(x.shape)}"
            )
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        return self.q_norm(query), self.k_norm(key), value

    def _merged(self, out: Tensor) -> Tensor:
        return self.proj_drop(self.proj(out.flatten(-2)))

    def extra_repr(self) -> str:
        left, right = self.window
        return f"num_heads={self.num_heads}, window=({left}, {right})"
