"""Checks, operators and gradient of the temporal mixer. x is `[B, N, T, C]` in here."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tritonkern.ops._checks import check_eps, check_flags, check_saved, check_tensors
from tritonkern.ops._dtypes import accumulator
from tritonkern.ops._registry import Results, differentiable, operator

NAME = "temporal_mixer"
# Statistics of a row are one tile of a Triton program.
MAX_CHANNELS = 4096


class Conv(NamedTuple):
    """A convolution along time with kernels of 3 frames; output channels 4 c to 4 c + 3 belong to channel c of x."""

    weight: Tensor
    """`[4 C, 1, 3]`"""
    bias: Tensor
    """`[4 C]`"""


class State(NamedTuple):
    """The two frames before x, or None and None; in the dtype of sums."""

    normed: Tensor | None
    """`[B, N, 2, C]`, after the LayerNorm."""
    hidden: Tensor | None
    """`[B, N, 2, 4 C]`, after the GELU."""


class Mixed(NamedTuple):
    out: Tensor
    normed: Tensor
    hidden: Tensor


class Gradients(NamedTuple):
    x: Tensor
    norm_weight: Tensor
    conv1_weight: Tensor
    conv1_bias: Tensor
    conv2_weight: Tensor
    conv2_bias: Tensor


def check_inputs(x: Tensor, expected: dict[str, tuple[Tensor | None, str]], eps: float) -> None:
    """`expected`: per argument the tensor and its shape in terms of x."""
    check_tensors(x=x, **{name: tensor for name, (tensor, _) in expected.items()})
    if x.dim() != 4 or not 1 <= x.shape[-1] <= MAX_CHANNELS:
        raise ValueError(
            f"x must have shape [N, T, C] or [B, N, T, C] with C from 1 to {MAX_CHANNELS}, got {tuple(x.shape)}"
        )
    batch, tracks, _, channels = x.shape
    shapes = {
        "norm": (channels,),
        "weight": (4 * channels, 1, 3),
        "bias": (4 * channels,),
        "normed": (batch, tracks, 2, channels),
        "hidden": (batch, tracks, 2, 4 * channels),
    }
    for name, (tensor, kind) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shapes[kind]:
            raise ValueError(
                f"{name} must have shape {list(shapes[kind])}, as x has {channels} channels, got {list(tensor.shape)}"
            )
        if kind in ("normed", "hidden") and tensor.dtype != accumulator(x.dtype):
            raise TypeError(f"{name} must be {accumulator(x.dtype)}, as x is {x.dtype}, got {tensor.dtype}")
    check_eps(eps, x.dtype)


@operator(NAME, "forward")
def temporal_mixer_fwd(
    x: Tensor, norm_weight: Tensor, conv1: Conv, conv2: Conv, causal: bool, eps: float, state: State
) -> Results[Mixed]:
    """The output in x's shape and dtype, and the state after it (of shape [0] without a state), contiguous."""
    expected: dict[str, tuple[Tensor | None, str]] = {
        "norm_weight": (norm_weight, "norm"),
        "conv1_weight": (conv1.weight, "weight"),
        "conv1_bias": (conv1.bias, "bias"),
        "conv2_weight": (conv2.weight, "weight"),
        "conv2_bias": (conv2.bias, "bias"),
        "the first state": (state.normed, "normed"),
        "the second state": (state.hidden, "hidden"),
    }
    check_inputs(x, expected, eps)
    if (state.normed is None) != (state.hidden is None):
        raise ValueError("state must have two tensors, that of the first convolution and that of the second")
    if state.normed is not None and not causal:
        raise ValueError("state is for a causal mixer; pass causal=True with it, or leave it out")
    return lambda: Mixed(x.new_empty(x.shape), *(empty_state(x, before) for before in state))


def empty_state(x: Tensor, before: Tensor | None) -> Tensor:
    """The result for one of the two states, not initialised."""
    return x.new_empty(0 if before is None else before.shape, dtype=accumulator(x.dtype))


@operator(NAME, "backward")
def temporal_mixer_bwd(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    conv1: Conv,
    conv2_weight: Tensor,
    causal: bool,
    eps: float,
    needs_grad: list[bool],
) -> Results[Gradients]:
    """Gradients of x, in its dtype, and of the five parameters, in that of sums; of shape [0] where not needed."""
    expected: dict[str, tuple[Tensor | None, str]] = {
        "norm_weight": (norm_weight, "norm"),
        "conv1_weight": (conv1.weight, "weight"),
        "conv1_bias": (conv1.bias, "bias"),
        "conv2_weight": (conv2_weight, "weight"),
    }
    check_inputs(x, expected, eps)
    check_saved({"grad_out": (grad_out, x.shape, x.dtype)}, x.device)
    check_flags(needs_grad, 6)
    dtype, channels = accumulator(x.dtype), x.shape[-1]
    parameters = ((channels,), (4 * channels, 1, 3), (4 * channels,), (4 * channels, 1, 3), (4 * channels,))
    return lambda: Gradients(
        x.new_empty(x.shape if needs_grad[0] else 0),
        *(
            x.new_empty(shape if needed else 0, dtype=dtype)
            for shape, needed in zip(parameters, needs_grad[1:], strict=True)
        ),
    )


def parameter_gradients(sums: Tensor | None, x: Tensor, needs_grad: list[bool]) -> list[Tensor]:
    """From sums `[30, C]`: 12 weights and 4 biases of the first convolution, 12 and one of the second, the norm's."""
    candidates = (
        lambda sums: sums[29].clone(),
        lambda sums: sums[:12].mT.reshape(-1, 1, 3).clone(),
        lambda sums: sums[12:16].mT.reshape(-1).clone(),
        lambda sums: sums[16:28].mT.reshape(-1, 1, 3).clone(),
        lambda sums: sums[28].repeat_interleave(4),
    )
    return [
        make(sums) if needed else x.new_empty(0, dtype=accumulator(x.dtype))
        for make, needed in zip(candidates, needs_grad[1:], strict=True)
    ]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.causal, ctx.eps, normed_state, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.carries_state = normed_state is not None
    ctx.dtypes = [tensor.dtype for tensor in tensors]
    # Nothing of the forward pass is saved: statistics and hidden values are computed again from x.
    ctx.save_for_backward(*tensors[:5])


def _gradient(ctx: Any, grad_out: Tensor | None, *_: Any) -> Any:
    if ctx.carries_state:
        raise RuntimeError(
            "temporal_mixer with a carried state has no gradient; run it under torch.no_grad(), or train on whole "
            "clips without state"
        )
    if grad_out is None:
        return ()
    needs_grad = list(ctx.needs_input_grad[:6])
    grads = temporal_mixer_bwd(grad_out, *ctx.saved_tensors, ctx.causal, ctx.eps, needs_grad, ctx.backend)
    return tuple(
        grad.to(dtype) if needed else None for grad, needed, dtype in zip(grads, needs_grad, ctx.dtypes, strict=True)
    )


differentiable(temporal_mixer_fwd, _save, _gradient)
