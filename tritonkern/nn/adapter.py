"""The temporal adapter which lets the tokens of a per-frame backbone attend along time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tritonkern.distributed import moments
from tritonkern.functional._adapter import adapter_in, adapter_out
from tritonkern.functional._arguments import autocast_dtype
from tritonkern.nn._inputs import check_inputs
from tritonkern.nn._plain import input_dtype, is_plain, obstacle
from tritonkern.nn.temporal import AttentionState, TemporalWindowAttention
from tritonkern.ops.temporal_adapter.op import adapter_in_fwd

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What the fused computation assumes of the 3x3 convolutions.
_SAME = dict(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, padding_mode="zeros")


class AdapterState(NamedTuple):
    """What `TemporalAdapter.step` carries from frame to frame."""

    attention: AttentionState
    waiting: list[tuple[Tensor, Tensor]]
    """Of each frame whose output waits, the tokens and what is added to the output of the attention."""
    statistics: Any
    """`[2, B]` float64, mean and 1 / deviation of every frame's norm; None: those of the frames in `moments`."""
    moments: list[Tensor]
    """`[2, B]` float64 of each of the last frames: mean and mean square of the patches."""
    window: int
    """Frames of `moments`, at most."""


class TemporalAdapter(nn.Module):
    """Bottleneck of convolutions around temporal window attention, added to a backbone's tokens by the caller.

    Parameters are those of Chrono's `TemporalAdapter`. The last convolution starts at zero: a new adapter adds nothing.
    The first norm takes its statistics over all frames of the clip together, so every frame depends on the whole clip.

    Args:
        dim: channels C of the tokens.
        hidden: channels of the bottleneck, a multiple of `num_heads`.
        num_heads: heads of the temporal attention.
        window_size: odd number of frames that attend to each other, truncated at the ends of the clip.
        pool: side, in tokens, of the patches that share one temporal attention sequence.

    Paper: Kim et al., "Exploring Temporally-Aware Features for Point Tracking", CVPR 2025.
    """

    frames_group: ProcessGroup | None = None
    """Set by `tritonkern.distributed.shard_frames`: the ranks that hold the stretches of the clip."""

    def __init__(self, dim: int, hidden: int = 128, num_heads: int = 4, window_size: int = 13, pool: int = 4) -> None:
        super().__init__()
        self.dim = dim
        self.pool = pool
        self.norm = nn.GroupNorm(1, dim)
        self.conv1 = nn.Conv2d(dim, hidden, kernel_size=3, padding=1)
        self.conv_pool = nn.Conv2d(hidden, hidden, kernel_size=pool, stride=pool)
        self.norm2 = nn.LayerNorm(hidden)
        self.attn_temp = TemporalWindowAttention(hidden, num_heads=num_heads, window_size=window_size)
        self.conv_upsample = nn.ConvTranspose2d(hidden, hidden, kernel_size=pool, stride=pool)
        self.conv2 = nn.Conv2d(hidden, dim, kernel_size=3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor) -> Tensor:
        """Patch tokens `[B, T, h, w, C]` -> what the adapter adds to them, same shape.

        Raises:
            ValueError: `tokens` is not 5-D, has other than `dim` channels, or h or w is no multiple of `pool`.
        """
        check_inputs(self, tokens=tokens)
        if tokens.ndim != 5 or tokens.shape[4] != self.dim:
            raise ValueError(f"tokens must be [B, T, h, w, {self.dim}], got {list(tokens.shape)}")
        # 16-bit results come from 16-bit tokens or from autocast, whatever the dtype of the steps between.
        dtype = autocast_dtype(tokens)
        if not self._reads_weights():
            return self._call_submodules(tokens).to(dtype)
        grid = (tokens.shape[2], tokens.shape[3])
        return self._last_convolution(self._bottleneck(tokens.flatten(2, 3), grid), grid, dtype=dtype).unflatten(
            2, grid
        )

    def add_to(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """All tokens of a backbone `[B, T, prefix + h * w, C]` -> new tokens, the update added to the patches.

        The fastest way to use an adapter: patches are not copied out, and the update is not stored.

        Args:
            tokens: `prefix` class and register tokens, which are copied as they are, before the patches of each frame.
            grid: (h, w).

        Raises:
            ValueError: `tokens` is not 4-D, has other than `dim` channels or fewer than h * w rows, or h or w is no
                multiple of `pool`.
        """
        check_inputs(self, tokens=tokens)
        if tokens.ndim != 4 or tokens.shape[3] != self.dim:
            raise ValueError(f"tokens must be [B, T, prefix + h * w, {self.dim}], got {list(tokens.shape)}")
        if is_plain(self, TemporalAdapter) and self._reads_weights():
            return self._last_convolution(self._bottleneck(tokens, grid), grid, tokens=tokens)
        prefix = tokens.shape[2] - grid[0] * grid[1]
        if prefix < 0:
            raise ValueError(f"tokens must have at least {grid[0]} * {grid[1]} rows, got {list(tokens.shape)}")
        patches = tokens[:, :, prefix:]
        update = self(patches.unflatten(2, grid)).flatten(2, 3)
        return torch.cat([tokens[:, :, :prefix], patches + update.to(tokens.dtype)], dim=2)

    def begin(
        self, lookahead: int | None = None, *, statistics: Tensor | None = None, statistics_window: int = 24
    ) -> AdapterState:
        """The state before the first frame, for `step`.

        Args:
            lookahead: frames that the result of a frame waits for; windows reach no further ahead. None: as many as the
                windows have.
            statistics: `[2, B]` float64, mean and `1 / sqrt(variance + eps)` for the norm of all frames, as
                `clip_statistics` returns them.
            statistics_window: without `statistics`, the norm of a frame has the statistics of so many frames: itself
                and those before it, as far as there are any.
        """
        return AdapterState(self.attn_temp.begin(lookahead), [], statistics, [], statistics_window)

    @torch.no_grad()
    def clip_statistics(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """`[2, B]` float64: what `add_to` normalises these tokens with."""
        norm, conv, grid_ = self.norm, self.conv1, (*grid, self.pool)
        call = (norm.weight, norm.bias, norm.eps, conv.weight, conv.bias, *grid_, autocast_dtype(tokens), None)
        return torch.stack(adapter_in_fwd(tokens, *call)[1:])

    @torch.no_grad()
    def step(self, state: AdapterState, tokens: Tensor, grid: tuple[int, int]) -> tuple[AdapterState, Tensor | None]:
        """The next frame of a stream: `add_to` of tokens `[B, 1, prefix + h * w, C]`.

        Returns the state, and the new tokens of the frame `lookahead` frames ago, or None while there is none. Forward
        only. With the whole window as lookahead, the clip's own statistics and `finish` at the end, a stream of a clip
        has the results of one call of `add_to`, and its bits where PyTorch's linear layers have the same bits for one
        frame as for many. `state` is used up.

        Raises:
            ValueError: not one frame, or a submodule that must be called (LoRA, hooks, quantised layers).
        """
        check_inputs(self, tokens=tokens)
        if tokens.ndim != 4 or tokens.shape[1] != 1 or tokens.shape[3] != self.dim:
            raise ValueError(f"tokens must be one frame, [B, 1, prefix + h * w, {self.dim}], got {list(tokens.shape)}")
        if not self._reads_weights() or not is_plain(self.attn_temp, TemporalWindowAttention):
            raise ValueError(
                "step needs an adapter of plain layers, without hooks, LoRA or quantised weights: the norm of a stream "
                "has other statistics than the layer itself; merge or remove them"
            )
        attention, waiting, statistics, moments, window = state
        if statistics is None:
            moments = [*moments, self._moments(tokens, grid)][-window:]
            mean, square = torch.stack(moments).mean(0)
            statistics = torch.stack([mean, ((square - mean.square()).clamp(min=0) + self.norm.eps).rsqrt()])
        x = self._pooled(tokens, grid, statistics)
        attention, attended = self.attn_temp.step(attention, _call(self.norm2, x))
        waiting = [*waiting, (tokens, x)]
        state = AdapterState(attention, waiting, state.statistics, moments, window)
        if attended is None:
            return state, None
        out = self._added(*waiting[0], attended, grid)
        return state._replace(waiting=waiting[1:]), out

    @torch.no_grad()
    def finish(self, state: AdapterState, grid: tuple[int, int]) -> Tensor | None:
        """New tokens of the frames that still wait, `[B, T, prefix + h * w, C]`; their windows end with the stream."""
        attended = self.attn_temp.finish(state.attention)
        if attended is None:
            return None
        parts = zip(state.waiting, attended.split(1, 1), strict=True)
        return torch.cat([self._added(*waiting, out, grid) for waiting, out in parts], 1)

    def _moments(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        patches = tokens[:, :, tokens.shape[2] - grid[0] * grid[1] :].double()
        return torch.stack([patches.mean((1, 2, 3)), patches.square().mean((1, 2, 3))])

    def _added(self, tokens: Tensor, x: Tensor, attended: Tensor, grid: tuple[int, int]) -> Tensor:
        return self._last_convolution(self._upsampled(x + attended.to(x.dtype)), grid, tokens=tokens)

    def _reads_weights(self) -> bool:
        """Whether the fused computation may take the place of calls; otherwise each submodule is called."""
        patch: dict[str, Any] = dict(
            kernel_size=(self.pool, self.pool), stride=(self.pool, self.pool), padding=(0, 0), dilation=(1, 1), groups=1
        )
        layers = (self.norm, self.conv1, self.conv_pool, self.conv_upsample, self.conv2)
        return (
            is_plain(self.norm, nn.GroupNorm, num_groups=1)
            and is_plain(self.conv1, nn.Conv2d, **_SAME)
            and is_plain(self.conv_pool, nn.Conv2d, **patch)
            and is_plain(self.conv_upsample, nn.ConvTranspose2d, **patch, output_padding=(0, 0))
            and is_plain(self.conv2, nn.Conv2d, **_SAME)
            and all(layer.weight is not None and layer.bias is not None for layer in layers)
        )

    def _call_submodules(self, tokens: Tensor) -> Tensor:
        """What `_bottleneck` and `_last_convolution` compute, `[B, T, h, w, C]` -> the same shape."""
        batch, frames, rows, columns, _ = tokens.shape
        if rows % self.pool or columns % self.pool:
            raise ValueError(f"tokens must have h and w that are multiples of {self.pool}, got {list(tokens.shape)}")
        # Contiguous: in PyTorch 2.13 the backward pass of a channels-last group norm crashes on CPUs.
        x = rearrange(tokens, "b t h w c -> b c t h w").contiguous()
        if self.frames_group is None:
            x = _call(self.norm, x)
        else:
            entries = zip(x.split(1), *self._clip_norm(tokens.flatten(2, 3), self.frames_group), strict=True)
            x = torch.cat([F.group_norm(entry, 1, weight, bias, self.norm.eps) for entry, weight, bias in entries])
        x = F.relu(_call(self.conv1, rearrange(x, "b c t h w -> (b t) c h w")))
        x = F.relu(_call(self.conv_pool, x))
        rows, columns = x.shape[2:]
        series = rearrange(x, "(b t) c h w -> b t (h w) c", b=batch, t=frames)
        series = series + _call(self.attn_temp, _call(self.norm2, series)).to(series.dtype)
        x = rearrange(series, "b t (h w) c -> (b t) c h w", h=rows, w=columns)
        x = _call(self.conv2, F.relu(_call(self.conv_upsample, x)))
        return rearrange(x, "(b t) c h w -> b t h w c", b=batch, t=frames)

    def _bottleneck(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """`[B, T, prefix + h * w, C]` -> the image that the last ReLU and convolution take, patch after patch."""
        x = self._pooled(tokens, grid)
        return self._upsampled(x + self.attn_temp(_call(self.norm2, x)).to(x.dtype))

    def _pooled(self, tokens: Tensor, grid: tuple[int, int], statistics: Tensor | None = None) -> Tensor:
        """`[B, T, prefix + h * w, C]` -> what attends along time, `[B, T, h/pool * w/pool, hidden]`."""
        norm, conv, pool = self.norm, self.conv1, self.conv_pool
        convolution = conv.weight, cast(Tensor, conv.bias)
        options: dict[str, Any] = dict(pool=self.pool, eps=norm.eps, statistics=statistics)
        if self.frames_group is None:
            hidden = adapter_in(tokens, grid, norm.weight, norm.bias, *convolution, **options)
        else:
            patches = tokens[:, :, tokens.shape[2] - grid[0] * grid[1] :]
            entries = zip(tokens.split(1), *self._clip_norm(patches, self.frames_group), strict=True)
            hidden = torch.cat([adapter_in(x, grid, w, b, *convolution, **options) for x, w, b in entries])
        # What follows has the dtype that the convolution chose: on the CPU float32 even for half precision.
        with torch.autocast(tokens.device.type, enabled=False):
            # Patches are rows: a convolution whose kernel is its stride is a product with the kernel as a matrix.
            return F.relu(_linear(hidden, rearrange(pool.weight, "o c h w -> o (h w c)"), pool.bias))

    def _upsampled(self, x: Tensor) -> Tensor:
        upsample = self.conv_upsample
        with torch.autocast(x.device.type, enabled=False):
            bias = upsample.bias.repeat(self.pool**2)  # type: ignore[union-attr]
            return _linear(x, rearrange(upsample.weight, "c o h w -> (h w o) c"), bias)

    def _clip_norm(self, patches: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
        """Weight and bias `[B, C]` with which a GroupNorm over this rank's `[B, T, h * w, C]` is that of the clip.

        (x - mean) / deviation of the clip is an affine function of that of this rank's frames, so the fused computation
        need not know about other ranks; its gradients and those of the moments add up to those of the norm.
        """
        part = moments(patches, group)
        rstd, rstd_of_all = ((v + self.norm.eps).rsqrt() for v in (part.variance, part.variance_of_all))
        weight, bias = (x.double() for x in (self.norm.weight, self.norm.bias))
        shift = (part.mean - part.mean_of_all) * rstd_of_all
        scaled = weight * (rstd_of_all / rstd)[:, None], bias + weight * shift[:, None]
        return scaled[0].to(self.norm.weight.dtype), scaled[1].to(self.norm.bias.dtype)

    def check_can_shard(self) -> None:
        """Raise TypeError unless the layers that see several frames are those that `shard_frames` can replace."""
        obstacles = {
            "norm": obstacle(self.norm, nn.GroupNorm, num_groups=1, affine=True),
            "attn_temp": obstacle(self.attn_temp, TemporalWindowAttention),
        }
        for name, reason in obstacles.items():
            if reason is not None:
                raise TypeError(f"the layer {name} of a TemporalAdapter cannot be computed in stretches: {reason}")

    def _last_convolution(
        self, x: Tensor, grid: tuple[int, int], tokens: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        bias = cast(Tensor, self.conv2.bias)
        return adapter_out(x, grid, self.conv2.weight, bias, tokens, pool=self.pool, dtype=dtype)


def _call(module: nn.Module, x: Tensor) -> Any:
    """`module(x)` in the dtype of the module's parameters, which need not be that of the step before."""
    return module(x.to(input_dtype(module, x.dtype)))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
