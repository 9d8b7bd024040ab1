"""An image network with Tracktention layers between its blocks: a video network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from tritonkern.nn import Tracktention
from tritonkern.nn._inputs import check_inputs
from tritonkern.ops._checks import check_mask, check_strided


def insert_tracktention(
    model: nn.Module,
    blocks: Iterable[int | str],
    dim: int | Sequence[int],
    num_heads: int = 8,
    depth: int = 2,
    sigma: float = 0.5,
) -> TracktentionModel:
    """A video network around an image network, whose features are exchanged along tracks after some of its blocks.

    Args:
        model: an image network, called with `[N, 3, H, W]`. It is not copied, and its modules, parameters and state
            dict stay as they are: it loads the same files, and called by itself it is the image network.
        blocks: after which modules: names as in `model.named_modules()` (stages of a ConvNet), or the indices of a
            transformer's blocks (those of the model's longest list of modules of one class; negative ones count from
            the end). The output of such a module, or the first of a tuple, must be tokens `[N, L, C]`, of which the
            last h * w are the patches row by row (class and register tokens before them pass unchanged), or a feature
            map `[N, C, h, w]`.
        dim: channels C after each of the blocks, or one number for all.
        num_heads, depth, sigma: as in `tritonkern.Tracktention`.

    Raises:
        ValueError: no or unknown blocks, or sizes that do not fit.

    Paper: Lai and Vedaldi, "Tracktention: Leveraging Point Tracking to Attend Videos Faster and Better", CVPR 2025.
    """
    names = [_name(model, block) for block in blocks]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"blocks must name at least one module, none of them twice, got {names}")
    dims = [dim] * len(names) if isinstance(dim, int) else list(dim)
    if len(dims) != len(names):
        raise ValueError(f"dim must be a number or one for each of {len(names)} blocks, got {len(dims)}")
    layers = {name: Tracktention(size, num_heads, depth, sigma) for name, size in zip(names, dims, strict=True)}
    return TracktentionModel(model, layers)


class TracktentionModel(nn.Module):
    """What `insert_tracktention` returns. State dict: `image.*`, the image network's own, and `layers.*`."""

    def __init__(self, image: nn.Module, layers: Mapping[str, Tracktention]) -> None:
        super().__init__()
        self.image = image
        self.names = list(layers)
        self.layers = nn.ModuleList(layers.values())
        example = next(image.parameters(), None)
        if example is not None:
            self.layers.to(example.device, example.dtype)

    def forward(self, video: Tensor, tracks: Tensor, visibility: Tensor | None = None, **options: Any) -> Any:
        """The image network's answer to every frame.

        Args:
            video: `[B, T, 3, H, W]` (any number of channels), as the image network takes its images.
            tracks: `[B, T, M, 2]` (x, y) in pixels of the frames, which span `[0, W] x [0, H]` (the centre of the
                first pixel is (0.5, 0.5)). From a tracker's `[N, T, 2]` they come by `.transpose(0, 1)[None]`.
            visibility: `[B, T, M]` bool, see `tritonkern.Tracktention`.
            options: passed on to the image network.

        Returns:
            What the image network returns for `[B * T, 3, H, W]`, with B and T apart in every tensor (of tuples,
            lists and dictionaries too) that begins with B * T.

        Raises:
            ValueError: `video` is not 5-D, the output of a block is not as `insert_tracktention` asks for, or shapes do
                not fit together.
        """
        check_strided("video", video)
        check_inputs(self, tracks=tracks)
        if video.ndim != 5:
            raise ValueError(f"video must be [B, T, 3, H, W], got {list(video.shape)}")
        batch, frames, _, height, width = video.shape
        if tracks.ndim != 4 or tracks.shape[:2] != (batch, frames) or tracks.shape[3] != 2:
            raise ValueError(f"tracks must be [{batch}, {frames}, M, 2], got {list(tracks.shape)}")
        if video.device != tracks.device:
            raise ValueError(f"video must be on the device of tracks, {tracks.device}, got {video.device}")
        if visibility is not None:
            check_mask("visibility", visibility, tracks.shape[:3], tracks.device)
        # A graph belongs to one call.
        thread = None if torch.compiler.is_compiling() else threading.get_ident()
        recording = torch.is_grad_enabled()

        clip = _Clip(self, (batch, frames), (height, width), tracks, visibility)

        def hook(layer: nn.Module, module: nn.Module, output: Any) -> Any:
            # Ignore calls of other threads, of this model or of the image network alone.
            if thread is not None and threading.get_ident() != thread:
                return None
            if recording and not torch.is_grad_enabled():
                raise RuntimeError(
                    f"{type(module).__name__} runs without gradients inside a call that records them, as under "
                    "reentrant checkpointing; its Tracktention layer would not learn; checkpoint the whole model"
                )
            if isinstance(output, Tensor):
                return clip.exchange(layer, output, type(module).__name__)
            first, *others = output
            return type(output)((clip.exchange(layer, first, type(module).__name__), *others))

        # Hooks are there during this call only, so that other callers still have the image network.
        with ExitStack() as hooks:
            for name, layer in zip(self.names, self.layers, strict=True):
                hooks.callback(_hook(self.image.get_submodule(name), partial(hook, layer)))
            output = self.image(video.flatten(0, 1), **options)
        return _map(output, lambda x: x.unflatten(0, (batch, frames)) if len(x) == batch * frames else x)

    def _patch(self) -> tuple[int, int]:
        """Height and width of a patch: the image network begins with a convolution whose stride is its kernel."""
        for module in self.image.modules():
            if isinstance(module, nn.Conv2d) and module.stride == module.kernel_size != (1, 1):
                return module.kernel_size[0], module.kernel_size[1]
        raise ValueError(
            "blocks return tokens, but the model has no patch embedding, a convolution with kernel = stride"
        )


class _Clip(NamedTuple):
    """What the layers need of one call."""

    model: TracktentionModel
    frames: tuple[int, int]
    """B, T"""
    pixels: tuple[int, int]
    """H, W"""
    tracks: Tensor
    visibility: Tensor | None

    def exchange(self, layer: nn.Module, x: Tensor, block: str) -> Tensor:
        """Tokens `[B * T, L, C]` or a map `[B * T, C, h, w]` that `block` returned -> the same, after the layer."""
        (batch, frames), (height, width) = self.frames, self.pixels
        if x.ndim not in (3, 4) or len(x) != batch * frames:
            raise ValueError(
                f"a block must return [{batch * frames}, L, C] or [{batch * frames}, C, h, w], "
                f"got {list(x.shape)} from {block}"
            )
        if x.ndim == 4:
            rows, columns = x.shape[2:]
            grid = rearrange(x, "(b t) c h w -> b t h w c", b=batch, t=frames)
            grid = layer(grid, self._tracks(height / rows, width / columns), self.visibility)
            return rearrange(grid, "b t h w c -> (b t) c h w")
        down, across = self.model._patch()
        rows, columns = height // down, width // across
        prefix = x.shape[1] - rows * columns
        if prefix < 0:
            raise ValueError(f"a block returned {x.shape[1]} tokens for {rows} x {columns} patches")
        grid = rearrange(x[:, prefix:], "(b t) (h w) c -> b t h w c", b=batch, t=frames, h=rows, w=columns)
        grid = layer(grid, self._tracks(down, across), self.visibility)
        patches = rearrange(grid, "b t h w c -> (b t) (h w) c")
        return torch.cat([x[:, :prefix], patches], 1) if prefix else patches

    def _tracks(self, down: float, across: float) -> Tensor:
        """The tracks in cells of `down` x `across` pixels."""
        # Factor by factor: a tensor of them would have to be copied to the GPU.
        x, y = self.tracks.unbind(-1)
        return torch.stack([x / across, y / down], -1)


def _hook(module: nn.Module, change: Callable[[nn.Module, Any], Any]) -> Callable[[], None]:
    """Let `change(module, output)` replace what `module` returns, until the result is called."""
    if not torch.compiler.is_compiling():
        return module.register_forward_hook(lambda module, args, output: change(module, output)).remove
    if module._forward_hooks:
        raise RuntimeError(
            "a model with Tracktention compiles only if its blocks have no forward hooks of their own, which would run "
            "after the layer and not before it; remove them, or run the model uncompiled"
        )
    # Dynamo cannot register hooks, but it follows an assignment to `forward`, which leaves no trace in its graph.
    own, forward = module.__dict__.get("forward"), module.forward
    module.__dict__["forward"] = lambda *args, **options: change(module, forward(*args, **options))

    def remove() -> None:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own

    return remove


def _name(model: nn.Module, block: int | str) -> str:
    """Name of a block, given as such or as an index into the model's longest list of modules of one class."""
    if isinstance(block, str):
        if block not in (names := [name for name, _ in model.named_modules()]):
            raise ValueError(f"blocks: the model has no module called {block!r}; it has {', '.join(names[1:12])}, ...")
        return block
    path, length = "", 0
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(child) for child in module}) == 1:
            if len(module) > length:
                path, length = name, len(module)
    if not -length <= block < length:
        raise ValueError(f"blocks: no block {block} in the {length} modules of {path!r}; give names instead")
    return f"{path}.{block % length}"


def _map(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`output` with `change` applied to its tensors of at least one axis."""
    if isinstance(output, Tensor):
        return change(output) if output.ndim else output
    if type(output) is dict:
        return {key: _map(x, change) for key, x in output.items()}
    if isinstance(output, Mapping):  # `transformers` returns dictionaries of its own classes
        return type(output)(**{key: _map(x, change) for key, x in output.items()})
    if isinstance(output, (tuple, list)):
        items = [_map(x, change) for x in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    return output
