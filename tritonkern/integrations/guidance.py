"""Cross-attention guidance of DiffTrack for a stock CogVideoX pipeline of diffusers.

Nam et al., "Emergent Temporal Correspondences from Video Diffusion Transformers", 2025. A third sample, in which cells
do not see other frames in some layers, shows the model what motion without correspondence looks like; the prediction is
pushed away from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tritonkern.functional import frame_local_attention
from tritonkern.integrations.video_dit import replace_forward


@contextlib.contextmanager
def cross_attention_guidance(
    transformer: nn.Module,
    layers: Sequence[int] = (13, 17, 21),
    scale: float = 1.0,
    cfg_scale: float | Callable[[int], float] = 6.0,
    renormalise: bool | None = None,
) -> Iterator[None]:
    """Within the block, calls of `transformer` return predictions that make the pipeline's combination the guided one.

    ```python
    with cross_attention_guidance(pipe.transformer, scale=1.0, cfg_scale=6.0):
        video = pipe(prompt, guidance_scale=6.0).frames
    ```

    The pipeline gives [uncond, cond] and combines ``uncond + cfg_scale (cond - uncond)``. Here the perturbed sample is
    made from cond, and ``cond + scale / cfg_scale (cond - perturbed)`` takes the place of cond, so that the combination
    gains ``scale (cond - perturbed)``. Up to the first of `layers` the perturbed sample is equal to cond and is not
    computed.

    Args:
        transformer: a CogVideoXTransformer3DModel.
        layers: numbers of blocks; published are 13, 17, 21 for the 2B and 15, 17, 18 for the 5B.
        scale: of the guidance.
        cfg_scale: the guidance scale of the pipeline, or a function of the number of the call, from 0. A number of 1 or
            less: the pipeline gives cond alone, and ``cond + scale (cond - perturbed)`` is returned.
        renormalise: as in `tritonkern.frame_local_attention`; None: False as published, True for cfg_scale <= 1.

    Raises:
        TypeError: another transformer.
        ValueError: a layer that does not exist.
        RuntimeError: in a pass, if a guided layer does not call PyTorch's attention, or gradients are recorded.
    """
    if type(transformer).__name__ != "CogVideoXTransformer3DModel":
        raise TypeError(f"transformer must be diffusers' CogVideoXTransformer3DModel, got {type(transformer).__name__}")
    model: Any = transformer
    blocks = list(model.transformer_blocks)
    wrong = [layer for layer in layers if not 0 <= layer < len(blocks)]
    if wrong or not layers:
        raise ValueError(f"layers must be some from 0 to {len(blocks) - 1}, got {list(layers)}")
    calls = _Calls(min(layers), scale, cfg_scale, renormalise)
    with contextlib.ExitStack() as stack:
        replace_forward(stack, model, calls.transformer(model.forward))
        for number, block in enumerate(blocks):
            if number >= calls.first:
                replace_forward(stack, block, calls.block(number, block.forward))
        for layer in dict.fromkeys(layers):
            attention = blocks[layer].attn1
            replace_forward(stack, attention, calls.attention(layer, attention))
        replace_forward(stack, model.norm_out, calls.output_norm(model.norm_out.forward))
        replace_forward(stack, model.proj_out, calls.output(model.proj_out.forward))
        yield


class _Calls:
    """What the parts of the transformer do instead, and what they need to know of the pass."""

    def __init__(
        self, first: int, scale: float, cfg_scale: float | Callable[[int], float], renormalise: bool | None
    ) -> None:
        self.first, self.scale, self.cfg_scale, self.renormalise = first, scale, cfg_scale, renormalise
        self.step, self.batch, self.text, self.frames, self.cfg = -1, 0, 0, 0, 1.0

    def transformer(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **options: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "cross_attention_guidance has no gradient; call the transformer under torch.no_grad()"
                )
            self.step += 1
            self.cfg = self.cfg_scale(self.step) if callable(self.cfg_scale) else self.cfg_scale
            self.frames, self.text = hidden_states.shape[1], encoder_hidden_states.shape[1]
            parts = 2 if self.cfg > 1 else 1
            if len(hidden_states) % parts:
                raise RuntimeError("the transformer must get [uncond, cond]; cfg_scale <= 1 is for cond alone")
            self.batch = len(hidden_states) // parts
            return forward(hidden_states, encoder_hidden_states, *args, **options)

        return call

    def _with_perturbed(self, x: Tensor) -> Tensor:
        """The batch, and cond once more."""
        return torch.cat([x, x[-self.batch :]])

    def block(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, *args: Any, **options: Any) -> Any:
            if number == self.first:
                hidden_states, encoder_hidden_states = (
                    self._with_perturbed(x) for x in (hidden_states, encoder_hidden_states)
                )
            return forward(hidden_states, encoder_hidden_states, self._with_perturbed(temb), *args, **options)

        return call

    def attention(self, layer: int, attention: Any) -> Callable[..., Any]:
        forward = attention.forward

        def call(hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **options: Any) -> Any:
            renormalise = self.cfg <= 1 if self.renormalise is None else self.renormalise
            # In the first layer cond and the perturbed sample have the same queries, keys and values.
            shared = layer == self.first
            if shared:
                hidden_states, encoder_hidden_states = (
                    x[: -self.batch] for x in (hidden_states, encoder_hidden_states)
                )
            with _FrameLocal(self.batch, self.text, self.frames, renormalise, shared) as mode:
                video, text = forward(hidden_states, encoder_hidden_states, *args, **options)
            if not mode.used:
                raise RuntimeError(
                    f"the attention of layer {layer} does not call torch.nn.functional.scaled_dot_product_attention; "
                    "choose it with transformer.set_attention_backend('native') and unfused projections"
                )
            if mode.apart is None:
                return video, text
            perturbed = attention.to_out[0](mode.apart.flatten(2))
            return torch.cat([video, perturbed[:, self.text :]]), torch.cat([text, perturbed[:, : self.text]])

        return call

    def output_norm(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, temb: forward(x, temb=self._with_perturbed(temb))

    def output(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor) -> Tensor:
            *given, perturbed = forward(x).split(self.batch)
            strength = self.scale / self.cfg if self.cfg > 1 else self.scale
            return torch.cat([*given[:-1], given[-1] + strength * (given[-1] - perturbed)])

        return call


class _FrameLocal(TorchFunctionMode):
    """The last `batch` samples attend within frames, the others as always.

    `shared`: the last `batch` samples attend as always, too, and within frames besides; this result is `apart`.
    """

    def __init__(self, batch: int, text: int, frames: int, renormalise: bool, shared: bool) -> None:
        super().__init__()
        self.batch, self.text, self.frames, self.renormalise, self.shared = batch, text, frames, renormalise, shared
        self.used = False
        self.apart: Tensor | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        self.used = True
        names = ("query", "key", "value")
        tensors = [args[i] if len(args) > i else kwargs[name] for i, name in enumerate(names)]
        rest = {name: value for name, value in kwargs.items() if name not in names}
        usual = function(*(x if self.shared else x[: -self.batch] for x in tensors), *args[3:], **rest)
        local = frame_local_attention(
            *(x[-self.batch :].transpose(1, 2) for x in tensors),
            text=self.text,
            frames=self.frames,
            renormalise=self.renormalise,
            scale=rest.get("scale"),
        )
        if self.shared:
            self.apart = local
            return usual
        return torch.cat([usual, local.transpose(1, 2)])
