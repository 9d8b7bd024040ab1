"""Queries and keys of the video diffusion transformers of diffusers: CogVideoX, HunyuanVideo, Wan and LTX.

They are taken from the call of `torch.nn.functional.scaled_dot_product_attention` inside the model's own attention,
after its normalisation and rotation. No processor is replaced, and outputs stay equal to the bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Seen(NamedTuple):
    """Queries and keys of one attention layer, views of what the model computed."""

    query: Tensor
    """[B, T, S, H, D] of the video."""
    key: Tensor
    text_query: Tensor
    """[B, L, H, D] of the text; L = 0 where it takes no part."""
    text_key: Tensor


class _Layout(NamedTuple):
    """How the tokens of one pass are ordered."""

    frames: int
    cells: int
    text_last: bool


class _Stop(Exception):
    pass


@contextlib.contextmanager
def watch(
    transformer: nn.Module, layers: Sequence[int], heads: Sequence[int] | None = None, stop: bool = False
) -> Iterator[dict[int, Seen]]:
    """Within the block, every pass of `transformer` puts the queries and keys of some layers into the dictionary.

    ```python
    with watch(pipe.transformer, [17]) as seen:
        pipe.transformer(latents, prompt_embeds, timestep)
    query, key = seen[17].query, seen[17].key
    ```

    Each pass replaces what the one before it left. Under gradient checkpointing the recomputation is ignored.

    Args:
        transformer: a CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel or
            LTXVideoTransformer3DModel; the last one must be given `num_frames` by name, as its pipeline does.
        layers: numbers of blocks from 0; single blocks of HunyuanVideo follow its dual ones.
        heads: numbers of the heads to keep; None for all. Chosen heads are copies.
        stop: ends the pass at the last of the layers; the call then returns None.

    Raises:
        TypeError: another transformer.
        ValueError: a layer or head that does not exist.
        RuntimeError: in the pass, if an attention does not call PyTorch's function.
    """
    family = next((name for name in _FAMILIES if type(transformer).__name__.startswith(name)), None)
    if family is None:
        raise TypeError(
            f"transformer must be one of diffusers' {', '.join(_FAMILIES)}, got {type(transformer).__name__}"
        )
    blocks = [block for name in _BLOCKS for block in getattr(transformer, name, ())]
    wrong = [layer for layer in layers if not 0 <= layer < len(blocks)]
    if wrong or not layers:
        raise ValueError(f"layers must be some from 0 to {len(blocks) - 1}, got {list(layers)}")
    seen: dict[int, Seen] = {}
    layout: list[_Layout] = []
    forward = transformer.forward

    def run(*args: Any, **options: Any) -> Any:
        seen.clear()
        layout[:] = [_FAMILIES[family](transformer, *args, **options)]
        try:
            return forward(*args, **options)
        except _Stop:
            return None
        finally:
            layout.clear()

    def attend(layer: int, attention: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if not layout or layer in seen:
                return attention(*args, **options)
            with _Capture() as capture:
                result = attention(*args, **options)
            if capture.found is None:
                raise RuntimeError(
                    f"the attention of layer {layer} does not call torch.nn.functional.scaled_dot_product_attention, "
                    "so that its queries and keys cannot be seen; choose it with "
                    "transformer.set_attention_backend('native') and unfused projections"
                )
            query, key = capture.found
            seen[layer] = _split(query, key, layout[0], heads)
            if stop and len(seen) == len(set(layers)):
                raise _Stop
            return result

        return call

    with contextlib.ExitStack() as stack:
        replace_forward(stack, transformer, run)
        for layer in dict.fromkeys(layers):
            block = blocks[layer]
            attention = block.attn1 if hasattr(block, "attn1") else block.attn
            replace_forward(stack, attention, attend(layer, attention.forward))
        yield seen


class _Capture(TorchFunctionMode):
    """The first self-attention that runs meanwhile."""

    found: tuple[Tensor, Tensor] | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and self.found is None:
            query, key = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
            if query.shape[-2] == key.shape[-2]:
                self.found = query, key
        return function(*args, **kwargs)


def replace_forward(stack: contextlib.ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Gives one module another `forward` until the stack is left."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward

    def restore() -> None:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before

    stack.callback(restore)


def _split(query: Tensor, key: Tensor, layout: _Layout, heads: Sequence[int] | None) -> Seen:
    """Video and text of `[B, H, n, D]`."""
    if heads is not None:
        wrong = [head for head in heads if not 0 <= head < query.shape[1]]
        if wrong:
            raise ValueError(f"heads must be from 0 to {query.shape[1] - 1}, got {wrong}")
        query, key = query[:, list(heads)], key[:, list(heads)]
    count = layout.frames * layout.cells
    text = query.shape[2] - count
    start = 0 if layout.text_last else text

    def video(x: Tensor) -> Tensor:
        return x[:, :, start : start + count].unflatten(2, (layout.frames, layout.cells)).permute(0, 2, 3, 1, 4)

    def words(x: Tensor) -> Tensor:
        return (x[:, :, count:] if layout.text_last else x[:, :, :text]).transpose(1, 2)

    return Seen(video(query), video(key), words(query), words(key))


def _cogvideox(model: Any, hidden_states: Tensor, *_: Any, **__: Any) -> _Layout:
    frames, (height, width) = hidden_states.shape[1], hidden_states.shape[3:]
    size, depth = model.config.patch_size, getattr(model.config, "patch_size_t", None) or 1
    return _Layout(math.ceil(frames / depth), (height // size) * (width // size), False)


def _hunyuan(model: Any, hidden_states: Tensor, *_: Any, **__: Any) -> _Layout:
    frames, height, width = hidden_states.shape[2:]
    size = model.config.patch_size
    return _Layout(frames // model.config.patch_size_t, (height // size) * (width // size), True)


def _wan(model: Any, hidden_states: Tensor, *_: Any, **__: Any) -> _Layout:
    frames, height, width = hidden_states.shape[2:]
    t, h, w = model.config.patch_size
    return _Layout(frames // t, (height // h) * (width // w), True)


def _ltx(model: Any, hidden_states: Tensor, *_: Any, num_frames: int, **__: Any) -> _Layout:
    return _Layout(num_frames, hidden_states.shape[1] // num_frames, True)


_FAMILIES: dict[str, Callable[..., _Layout]] = {
    "CogVideoXTransformer3DModel": _cogvideox,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "WanTransformer3DModel": _wan,
    "LTXVideoTransformer3DModel": _ltx,
}
_BLOCKS = ("transformer_blocks", "single_transformer_blocks", "blocks")
