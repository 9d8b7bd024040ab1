"""DINOv2 vision transformers (Oquab et al., TMLR 2024), with and without registers (Darcet et al., ICLR 2024)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tritonkern.models.checkpoints import load_strict, read_state_dict
from tritonkern.models.vit import Block, PatchEmbed
from tritonkern.nn import TemporalAdapter
from tritonkern.nn._inputs import check_inputs
from tritonkern.nn._plain import has_hooks


@dataclass(frozen=True)
class DINOv2Config:
    """Sizes of a DINOv2 model. The published ones are in `DINOV2_CONFIGS`."""

    dim: int
    depth: int
    num_heads: int
    swiglu: bool = False
    """SwiGLU feed-forward (ViT-g) in place of a GELU MLP."""
    num_registers: int = 0
    patch_size: int = 14
    grid: int = 37
    """Rows and columns of the position embedding: the published models were trained last at 37 x 14 = 518 pixels."""


_SIZES = {
    "vits14": DINOv2Config(384, 12, 6),
    "vitb14": DINOv2Config(768, 12, 12),
    "vitl14": DINOv2Config(1024, 24, 16),
    "vitg14": DINOv2Config(1536, 40, 24, swiglu=True),
}
DINOV2_CONFIGS = {
    **_SIZES,
    **{
        f"{name}_reg": DINOv2Config(c.dim, c.depth, c.num_heads, c.swiglu, num_registers=4)
        for name, c in _SIZES.items()
    },
}


class DINOv2(nn.Module):
    """A DINOv2 backbone whose parameter names are the official ones.

    Args:
        config: a name of `DINOV2_CONFIGS` ("vits14", "vitb14", "vitl14", "vitg14", each also with "_reg" for the
            models with four registers), or a `DINOv2Config`. Weights are random; see `from_checkpoint`.

    Raises:
        ValueError: an unknown name.
    """

    # Maximum bytes of temporaries. A GPU needs several frames at a time to be busy. A CPU is busy with one frame, and
    # slower with many: newly allocated memory (25 MB per frame in each hidden layer of ViT-S at 64 x 64 patches)
    # consists of pages that the operating system must clear first.
    temporaries = {"cpu": 2**27, "cuda": 2**30}

    def __init__(self, config: str | DINOv2Config = "vitb14") -> None:
        super().__init__()
        if isinstance(config, str):
            if config not in DINOV2_CONFIGS:
                raise ValueError(f"config must be one of {', '.join(DINOV2_CONFIGS)} or a DINOv2Config, got {config!r}")
            config = DINOV2_CONFIGS[config]
        self.config = config
        self.patch_embed = PatchEmbed(config.dim, config.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid**2, config.dim))
        # Used only in DINOv2's own training, and here so that official state dicts load strictly. A buffer, because
        # DistributedDataParallel refuses parameters that no gradient reaches.
        self.register_buffer("mask_token", torch.zeros(1, config.dim))
        if config.num_registers:
            self.register_tokens = nn.Parameter(torch.empty(1, config.num_registers, config.dim))
            nn.init.normal_(self.register_tokens, std=1e-6)
        self.blocks = nn.ModuleList(Block(config.dim, config.num_heads, config.swiglu) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)

        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> DINOv2:
        """The model whose weights `path` holds, its size inferred from them.

        Args:
            path: an official `dinov2_vit*14[_reg4]_pretrain.pth`, or its tensors as .safetensors.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file cannot be read, or its keys or shapes are not those of a DINOv2 model.
        """
        state = official_keys(read_state_dict(path))
        config = infer_config(state, str(path))
        with torch.device("meta"):
            model = cls(config)
        load_strict(model, state, str(path))
        return model.eval()

    def position_embedding(self, rows: int, columns: int) -> Tensor:
        """Position embedding `[1, 1 + rows * columns, dim]` (class token first) of a grid of patches.

        The models without registers were published with a resampling whose step is `grid / (rows + 0.1)`, those with
        registers with an antialiased one of exact size; they differ everywhere but at the trained size.
        """
        grid = self.config.grid
        if (rows, columns) == (grid, grid):
            return self.pos_embed
        pos_embed = self.pos_embed.to(torch.promote_types(self.pos_embed.dtype, torch.float32))
        patches = rearrange(pos_embed[:, 1:], "n (h w) c -> n c h w", h=grid)
        if self.config.num_registers:
            patches = F.interpolate(patches, size=(rows, columns), mode="bicubic", antialias=True)
        else:
            factors = ((rows + 0.1) / grid, (columns + 0.1) / grid)
            patches = F.interpolate(patches, scale_factor=factors, mode="bicubic")
        patches = rearrange(patches, "n c h w -> n (h w) c")
        return torch.cat([pos_embed[:, :1], patches], dim=1).to(self.pos_embed.dtype)

    def embed(self, images: Tensor, positions: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` -> what enters the first block, `[N, 1 + registers + patches, dim]`.

        `positions` is the `position_embedding` of their grid.
        """
        x = self.patch_embed(images)
        # Not len(x), which would fix the number of frames of an exported program.
        frames = x.shape[0]
        x = torch.cat([self.cls_token.expand(frames, -1, -1), x], dim=1)
        x = x + positions
        if self.config.num_registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(frames, -1, -1), x[:, 1:]], dim=1)
        return x

    def per_frame(
        self, function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, tokens: int, in_place: bool = False
    ) -> Tensor:
        """`function(x)` for a function that treats frames `[N, ...]` independently.

        Where no gradient is recorded, it is called with a few frames at a time, so that its temporaries stay small
        however long the clip.

        Args:
            function: what to compute.
            module: the module that `function` calls. If it or a part of it has hooks, they see all frames at once.
            x: the frames.
            tokens: tokens per frame.
            in_place: whether the result may overwrite `x`.
        """
        # A compiled graph is not cut: its number of frames may be a symbol.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(map(has_hooks, module.modules())):
            return function(x)
        bound = self.temporaries.get(x.device.type, 2**30)
        # Inside a block a token has about twelve vectors: queries, keys and values, the hidden layer before and after
        # its GELU, and the residual stream.
        frames = max(1, bound // (12 * 4 * self.config.dim * tokens))
        if len(x) <= frames:
            return function(x)
        first = function(x[:frames])
        out = x if in_place else first.new_empty((len(x), *first.shape[1:]))
        out[:frames] = first
        del first
        for start in range(frames, len(x), frames):
            out[start : start + frames] = function(x[start : start + frames])
        return out

    def run_blocks(
        self,
        x: Tensor,
        leading: torch.Size,
        grid: tuple[int, int],
        wanted: set[int],
        adapters: Sequence[Callable[[Tensor], Tensor]],
        norm: bool,
    ) -> list[Tensor]:
        """All tokens after the `wanted` blocks. `x`, the result of `embed`, may be overwritten.

        The other arguments are those of `get_intermediate_layers`. Blocks treat frames one by one; only adapters see
        the whole clip.
        """
        prefix = 1 + self.config.num_registers
        outputs: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            returned = any(x is output for output in outputs)
            x = self.per_frame(block, block, x, x.shape[1], in_place=not returned)
            if index < len(adapters):
                adapter = adapters[index]
                if isinstance(adapter, TemporalAdapter):
                    x = adapter.add_to(x.unflatten(0, leading), grid).flatten(0, -3)
                else:
                    patches = x[:, prefix:].unflatten(1, grid).unflatten(0, leading)
                    update = adapter(patches).flatten(0, len(leading) - 1).flatten(1, 2)
                    x = torch.cat([x[:, :prefix], x[:, prefix:] + update], dim=1)
            if index in wanted:
                outputs.append(self.norm(x) if norm else x)
        return outputs

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
        adapters: Sequence[Callable[[Tensor], Tensor]] = (),
    ) -> tuple[Any, ...]:
        """Patch tokens after some of the blocks, in the order of the blocks.

        Args:
            images: `[..., 3, H, W]` with any leading axes, ImageNet-normalised, H and W multiples of the patch size.
            n: how many of the last blocks to return, or the indices of the blocks.
            reshape: return `[..., dim, h, w]` in place of `[..., h * w, dim]`.
            return_class_token: return pairs (patch tokens, class token `[..., dim]`).
            norm: apply the model's final LayerNorm to every output.
            adapters: `adapters[i]` maps the patch tokens after block i, `[..., h, w, dim]` with the leading axes of
                `images` (so that `[B, T, 3, H, W]` gives an adapter its frames), to what is added to them.

        Raises:
            ValueError: bad image size, an index that no block has, or more adapters than blocks.
        """
        check_inputs(self, images=images)
        size, depth = self.config.patch_size, len(self.blocks)
        if images.ndim < 4 or images.shape[-3] != 3 or images.shape[-2] % size or images.shape[-1] % size:
            raise ValueError(
                f"images must be [..., 3, H, W] with H and W multiples of {size}, got {list(images.shape)}; "
                "resize or crop them"
            )
        wanted = set(range(depth - n, depth) if isinstance(n, int) else n)
        if not wanted <= set(range(depth)) or not wanted:
            raise ValueError(f"n must be 1 to {depth}, or block indices from 0 to {depth - 1}, got {n}")
        if len(adapters) > depth:
            raise ValueError(f"adapters must be at most one for each of {depth} blocks, got {len(adapters)}")

        leading = images.shape[:-3]
        rows, columns = (side // size for side in images.shape[-2:])
        prefix = 1 + self.config.num_registers
        embed = partial(self.embed, positions=self.position_embedding(rows, columns))
        x = self.per_frame(embed, self.patch_embed, images.flatten(0, -4), prefix + rows * columns)
        outputs = self.run_blocks(x, leading, (rows, columns), wanted, adapters, norm)
        tokens = [out[:, prefix:].unflatten(0, leading) for out in outputs]
        if reshape:
            tokens = [rearrange(out, "... (h w) c -> ... c h w", h=rows).contiguous() for out in tokens]
        if return_class_token:
            return tuple(
                (patches, out[:, 0].unflatten(0, leading)) for patches, out in zip(tokens, outputs, strict=True)
            )
        return tuple(tokens)

    def forward(self, images: Tensor, function: Callable[[Tensor], Any] | None = None) -> Any:
        """Images `[..., 3, H, W]` -> normed class token `[..., dim]`; or `function(images)`, see `with_hooks`."""
        if function is not None:
            return function(images)
        ((_, class_token),) = self.get_intermediate_layers(images, return_class_token=True)
        return class_token

    def with_hooks(self, function: Callable[[Tensor], Any], images: Tensor) -> Any:
        """`function(images)`, with the hooks of this module before and after it.

        For models that use parts and methods of a backbone in place of its class token: hooks run only where a module
        is called, those of `fully_shard`, which gather the parameters, included.
        """
        return self(images, function) if has_hooks(self) else function(images)


def official_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of training checkpoints, with blocks in chunks (`blocks.c.i.`), become those of released files."""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in state.items()}


def infer_config(state: Mapping[str, Tensor], source: str) -> DINOv2Config:
    """The configuration that a DINOv2 state dict was made with, heads of 64 channels as in every published model.

    Raises:
        ValueError: the state dict is not one of DINOv2; the message names `source`.
    """
    weight, positions = (state.get(name, torch.empty(0)) for name in ("patch_embed.proj.weight", "pos_embed"))
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    shapes_fit = weight.ndim == 4 and positions.ndim == 3 and positions.shape[1] > 1
    if not shapes_fit or len(weight) == 0 or len(weight) % 64 or depth == 0:
        raise ValueError(
            f"{source} holds no DINOv2 weights: patch_embed.proj.weight [dim, 3, p, p] with dim a multiple of 64, "
            "pos_embed [1, 1 + grid * grid, dim] and blocks.* are needed"
        )
    dim, _, patch_size, _ = weight.shape
    registers = state["register_tokens"].shape[1] if state.get("register_tokens", weight[0, 0]).ndim == 3 else 0
    swiglu = "blocks.0.mlp.w12.weight" in state
    grid = math.isqrt(positions.shape[1] - 1)
    return DINOv2Config(dim, depth, dim // 64, swiglu, registers, patch_size, grid)
