"""The transformer of CogVideoX 2B and 5B (Yang et al., 2024), by the names of its published state dicts."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tritonkern.functional._full_attention import full_attention
from tritonkern.models.checkpoints import load_strict, read_state_dict
from tritonkern.models.low_rank import project_rows

_PERIOD = 10000.0
# Keys of config.json that this class has no use for, or whose only published value it has built in.
_BUILT_IN = {
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "attention_bias": True,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "patch_size_t": None,
    "ofs_embed_dim": None,
    "use_learned_positional_embeddings": False,
    "patch_bias": True,
}


class _PatchEmbed(nn.Module):
    def __init__(self, dim: int, channels: int, text_dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.text_proj = nn.Linear(text_dim, dim)

    def forward(self, latents: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, T, C, h, w]`, `[B, L, text_dim]` -> the tokens of the cells, `[B, T S, dim]`, and those of the text."""
        cells = rearrange(self.proj(latents.flatten(0, 1)), "(b t) c h w -> b (t h w) c", b=len(latents))
        return cells, self.text_proj(text)


class _TimeEmbedding(nn.Module):
    def __init__(self, dim: int, time_dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim, time_dim), nn.Linear(time_dim, time_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class _Modulation(nn.Module):
    """A LayerNorm whose scale, shift and gate depend on the time, others for video than for text."""

    def __init__(self, time_dim: int, dim: int):
        super().__init__()
        self.linear, self.norm = nn.Linear(time_dim, 6 * dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, text: int, time: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, text + video, C]` -> the same modulated, and its gate."""
        parts = self.linear(F.silu(time)).unflatten(-1, (2, 3, -1))  # [B, video or text, 3, C]
        of_text, of_video = parts[:, 1:].expand(-1, text, -1, -1), parts[:, :1].expand(-1, x.shape[1] - text, -1, -1)
        shift, scale, gate = torch.cat([of_text, of_video], 1).unbind(2)
        return self.norm(x) * (1 + scale) + shift, gate


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.norm_q, self.norm_k = (nn.LayerNorm(self.head_dim, 1e-6) for _ in range(2))
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def query_key(self, x: Tensor, text: int, rotary: Tensor | None, heads: Tensor | None) -> tuple[Tensor, Tensor]:
        """`[B, text + video, H, D]` of the given heads, normalised and rotated."""

        channels = torch.arange(self.head_dim, device=x.device)
        rows = None if heads is None else (self.head_dim * heads[:, None] + channels).flatten()

        def project(layer: nn.Module, norm: nn.LayerNorm) -> Tensor:
            y = norm((layer(x) if rows is None else project_rows(layer, x, rows)).unflatten(-1, (-1, self.head_dim)))
            return y if rotary is None else torch.cat([y[:, :text], _rotate(y[:, text:], rotary)], 1)

        return project(self.to_q, self.norm_q), project(self.to_k, self.norm_k)

    def forward(self, x: Tensor, text: int, rotary: Tensor | None) -> Tensor:
        query, key = self.query_key(x, text, rotary, None)
        value = self.to_v(x).unflatten(-1, (self.num_heads, -1))
        return self.to_out[0](full_attention(query, key, value).flatten(-2))


class _Gelu(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class _FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        # The published list has a dropout between its layers.
        self.net = nn.Sequential(_Gelu(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, time_dim: int):
        super().__init__()
        self.norm1, self.attn1 = _Modulation(time_dim, dim), _Attention(dim, num_heads)
        self.norm2, self.ff = _Modulation(time_dim, dim), _FeedForward(dim)

    def forward(self, x: Tensor, text: int, time: Tensor, rotary: Tensor | None) -> Tensor:
        y, gate = self.norm1(x, text, time)
        x = x + gate * self.attn1(y, text, rotary)
        y, gate = self.norm2(x, text, time)
        return x + gate * self.ff(y)


class _OutputNorm(nn.Module):
    def __init__(self, time_dim: int, dim: int):
        super().__init__()
        self.linear, self.norm = nn.Linear(time_dim, 2 * dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(time))[:, None].chunk(2, -1)
        return self.norm(x) * (1 + scale) + shift


class CogVideoX(nn.Module):
    """The video diffusion transformer of CogVideoX: text and video tokens in one sequence, text first.

    Arguments have the names and meanings of the published ``config.json``; `use_rotary_positional_embeddings` makes
    the 5B, whose queries and keys are rotated, and its absence the 2B, which adds a table of sines to its tokens. Both
    tables are computed for the size of the latents. CogVideoX 1.5 and the image-to-video models, which learn their
    table or have patches in time, are refused by `from_folder`.
    """

    checkpointing = False
    """Whether `query_key` computes the blocks again in the backward pass instead of keeping what they compute."""

    def __init__(
        self,
        num_attention_heads: int = 30,
        attention_head_dim: int = 64,
        in_channels: int = 16,
        out_channels: int = 16,
        time_embed_dim: int = 512,
        text_embed_dim: int = 4096,
        num_layers: int = 30,
        sample_width: int = 90,
        sample_height: int = 60,
        sample_frames: int = 49,
        patch_size: int = 2,
        temporal_compression_ratio: int = 4,
        max_text_seq_length: int = 226,
        spatial_interpolation_scale: float = 1.875,
        temporal_interpolation_scale: float = 1.0,
        use_rotary_positional_embeddings: bool = False,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        if dim % 16 or attention_head_dim % 16:
            raise ValueError(f"attention_head_dim must be a multiple of 16, got {attention_head_dim}")
        self.num_heads, self.head_dim, self.patch_size = num_attention_heads, attention_head_dim, patch_size
        self.in_channels, self.text_dim, self.max_text = in_channels, text_embed_dim, max_text_seq_length
        self.sample = sample_height // patch_size, sample_width // patch_size
        self.max_frames = (sample_frames - 1) // temporal_compression_ratio + 1
        self.scales = spatial_interpolation_scale, temporal_interpolation_scale
        self.rotary = use_rotary_positional_embeddings
        self.patch_embed = _PatchEmbed(dim, in_channels, text_embed_dim, patch_size)
        self.time_embedding = _TimeEmbedding(dim, time_embed_dim)
        self.transformer_blocks = nn.ModuleList(
            _Block(dim, num_attention_heads, time_embed_dim) for _ in range(num_layers)
        )
        self.norm_final = nn.LayerNorm(dim)
        self.norm_out = _OutputNorm(time_embed_dim, dim)
        self.proj_out = nn.Linear(dim, patch_size**2 * out_channels)

    @classmethod
    def from_folder(cls, folder: str | Path) -> CogVideoX:
        """The model of a folder as diffusers writes it: ``transformer/config.json`` and safetensors, in float32.

        Raises:
            FileNotFoundError: the folder or one of its files does not exist.
            ValueError: another architecture, or weights that are damaged or do not fit.
        """
        model, place = unloaded(Path(folder))
        load_strict(model, _read_folder(place), str(place))
        return model.eval()

    def grid(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of the cells of latents `[B, T, C, h, w]`."""
        return latents.shape[-2] // self.patch_size, latents.shape[-1] // self.patch_size

    def forward(self, latents: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        """The prediction of the noise or velocity.

        Args:
            latents: `[B, T, C, h, w]`, h and w multiples of `patch_size`.
            text: `[B, L, text_embed_dim]`, the embedding of the prompt.
            timestep: `[B]`, from 0 to 1000.

        Returns:
            `[B, T, C_out, h, w]`.

        Raises:
            ValueError: shapes that do not fit.
        """
        x, time, rotary = self._embed(latents, text, timestep)
        for block in self.transformer_blocks:
            x = block(x, text.shape[1], time, rotary)
        x = self.proj_out(self.norm_out(self.norm_final(x)[:, text.shape[1] :], time))
        h, w = self.grid(latents)
        p = self.patch_size
        return rearrange(x, "b (t h w) (c p q) -> b t c (h p) (w q)", h=h, w=w, p=p, q=p)

    def query_key(
        self,
        latents: Tensor,
        text: Tensor,
        timestep: Tensor,
        layers: Sequence[int],
        heads: Sequence[int] | None = None,
        positions: Tensor | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Queries and keys of the video in the attention of some layers, in their order, each `[B, T, S, H, D]`.

        Nothing behind the projections of the last layer is computed, and of that layer only those of `heads`.

        Args:
            latents, text, timestep: as in `forward`.
            layers: numbers of blocks, from 0.
            heads: numbers of heads; None for all.
            positions: of the 2B, what `positions` returns for as many frames or more, for several calls; None makes it.

        Raises:
            ValueError: a layer or head that does not exist, or shapes that do not fit.
        """
        for name, numbers, count in (
            ("layers", layers, len(self.transformer_blocks)),
            ("heads", heads or (), self.num_heads),
        ):
            wrong = [number for number in numbers if not 0 <= number < count]
            if wrong:
                raise ValueError(f"{name} must be from 0 to {count - 1}, got {wrong}")
        if not layers:
            return []
        x, time, rotary = self._embed(latents, text, timestep, positions)
        chosen = None if heads is None else torch.tensor(list(heads), device=x.device)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for index, block in enumerate(cast(Iterable[_Block], self.transformer_blocks)):
            if index in layers:
                y = block.norm1(x, text.shape[1], time)[0]
                query, key = block.attn1.query_key(y, text.shape[1], rotary, chosen)
                found[index] = tuple(z[:, text.shape[1] :].unflatten(1, (latents.shape[1], -1)) for z in (query, key))
            if index == max(layers):
                break
            if self.checkpointing and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(block, x, text.shape[1], time, rotary, use_reentrant=False))
            else:
                x = block(x, text.shape[1], time, rotary)
        return [found[layer] for layer in layers]

    def positions(self, frames: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        """The table of sines `[T S, C]` that the 2B adds to its tokens; that of fewer frames is its beginning."""
        return _sines(self.num_heads * self.head_dim, frames, grid, self.scales, device)

    def _embed(
        self, latents: Tensor, text: Tensor, timestep: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens `[B, L + T S, C]`, time embedding `[B, time_embed_dim]`, angles `[T S, D / 2]` of the rotation."""
        self._check(latents, text, timestep)
        frames = latents.shape[1]
        angles = timestep.float()[:, None] * _frequencies(self.num_heads * self.head_dim // 2, 1, latents.device)
        time = self.time_embedding(torch.cat([angles.cos(), angles.sin()], -1).to(latents.dtype))
        cells, text = self.patch_embed(latents, text)
        grid = self.grid(latents)
        if self.rotary:
            rotary = _rotation(self.head_dim, frames, grid, self.sample, latents.device)
        else:
            table = self.positions(frames, grid, latents.device) if positions is None else positions
            cells, rotary = cells + table[: cells.shape[1]].to(cells.dtype), None
        return torch.cat([text, cells], 1), time, rotary

    def _check(self, latents: Tensor, text: Tensor, timestep: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[2] != self.in_channels:
            raise ValueError(f"latents must be [B, T, {self.in_channels}, h, w], got {tuple(latents.shape)}")
        if any(size % self.patch_size or not size for size in latents.shape[-2:]):
            raise ValueError(
                f"latents must have h and w that patches of {self.patch_size} divide, got {tuple(latents.shape[-2:])}"
            )
        if text.ndim != 3 or text.shape[0] != latents.shape[0] or text.shape[2] != self.text_dim:
            raise ValueError(f"text must be [{latents.shape[0]}, L, {self.text_dim}], got {tuple(text.shape)}")
        if timestep.shape != latents.shape[:1]:
            raise ValueError(f"timestep must be [{latents.shape[0]}], got {tuple(timestep.shape)}")


def _frequencies(count: int, step: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    exponent = torch.arange(0, count * step, step, dtype=dtype, device=device) / (count * step)
    return torch.exp(-math.log(_PERIOD) * exponent) if dtype == torch.float32 else 1.0 / _PERIOD**exponent


def _sines(dim: int, frames: int, grid: tuple[int, int], scales: tuple[float, float], device: torch.device) -> Tensor:
    """`[T S, C]`: a quarter of the channels for the frame, three eighths each for column and row."""

    def line(count: int, channels: int, scale: float) -> Tensor:
        place = torch.arange(count, dtype=torch.float32, device=device) / scale
        angles = place.double()[:, None] * _frequencies(channels // 2, 1, device, torch.float64)
        return torch.cat([angles.sin(), angles.cos()], -1).float()

    h, w = grid
    t, y, x = line(frames, dim // 4, scales[1]), line(h, dim * 3 // 8, scales[0]), line(w, dim * 3 // 8, scales[0])
    parts = t[:, None, None], x[None, None], y[None, :, None]
    return torch.cat([part.expand(frames, h, w, -1) for part in parts], -1).flatten(0, 2)


def _rotation(
    head_dim: int, frames: int, grid: tuple[int, int], sample: tuple[int, int], device: torch.device
) -> Tensor:
    """Angles `[T S, D / 2]`: places of the grid in the one of training, to which it is fitted and centred."""
    (h, w), (height, width) = grid, sample
    if h * width > w * height:
        fitted = height, round(height / h * w)
    else:
        fitted = round(width / w * h), width
    top, left = round((height - fitted[0]) / 2), round((width - fitted[1]) / 2)

    def line(first: float, last: float, count: int, channels: int) -> Tensor:
        place = torch.linspace(first, last * (count - 1) / count, count, dtype=torch.float32, device=device)
        exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
        return place[:, None] * (1.0 / _PERIOD**exponent)

    part = head_dim // 8 * 3
    t = line(0, frames, frames, head_dim // 4)
    y, x = line(top, top + fitted[0], h, part), line(left, left + fitted[1], w, part)
    parts = t[:, None, None], y[None, :, None], x[None, None]
    return torch.cat([angles.expand(frames, h, w, -1) for angles in parts], -1).flatten(0, 2)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs of adjacent channels of `[B, n, H, D]`, turned by angles `[n, D / 2]` in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)


def unloaded(folder: Path) -> tuple[CogVideoX, Path]:
    """The model of a folder as of `CogVideoX.from_folder`, on the meta device, and where its weights are.

    Raises as that, for everything but the weights.
    """
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no transformer: config.json is missing; give a folder that diffusers wrote"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    with torch.device("meta"):
        return CogVideoX(**_arguments(config, path)), folder


def _arguments(config: dict, path: Path) -> dict:
    """The arguments of `CogVideoX` from a config.json."""
    if config.get("_class_name", "CogVideoXTransformer3DModel") != "CogVideoXTransformer3DModel":
        raise ValueError(f"{path} is of {config['_class_name']}, not of a CogVideoXTransformer3DModel")
    for name, value in _BUILT_IN.items():
        if config.get(name, value) != value:
            raise ValueError(f"{path} has {name} = {config[name]!r}; only models with {value!r} are supported")
    known = inspect.signature(CogVideoX.__init__).parameters
    return {name: value for name, value in config.items() if name in known and name != "self"}


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of all safetensors files of a folder; those of an index, if there is one."""
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is None:
        files = sorted(folder.glob("*.safetensors"))
    else:
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is not a readable index of safetensors files") from error
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file")
    state: dict[str, Tensor] = {}
    for path in files:
        state |= read_state_dict(path)
    return state
