"""Contract, operators and gradient of the temporal mixer."""

from __future__ import annotations

from torch import Tensor

from tritonkern.ops import _backends, _registry
from tritonkern.ops._contract import accumulator, check_dense

NAME = "temporal_mixer"
# Statistics of a row are one tile of a Triton program.
MAX_CHANNELS = 4096


def check(
    x: Tensor,
    norm_weight: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor,
    causal: bool,
    eps: float,
    normed_state: Tensor | None,
    hidden_state: Tensor | None,
) -> None:
    """Raise TypeError or ValueError unless the arguments fit together; x is `[B, N, T, C]`."""
    check_dense("x", x)
    if x.dim() != 4 or not 1 <= x.shape[-1] <= MAX_CHANNELS:
        raise ValueError(
            f"x must have shape [N, T, C] or [B, N, T, C] with C from 1 to {MAX_CHANNELS}, got {tuple(x.shape)}"
        )
    batch, tracks, _, channels = x.shape
    weights, biases = (4 * channels, 1, 3), (4 * channels,)
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("norm_weight", norm_weight, (channels,)),
        ("conv1_weight", conv1_weight, weights),
        ("conv1_bias", conv1_bias, biases),
        ("conv2_weight", conv2_weight, weights),
        ("conv2_bias", conv2_bias, biases),
    ]
    if normed_state is not None:
        expected.append(("the first state", normed_state, (batch, tracks, 2, channels)))
    if hidden_state is not None:
        expected.append(("the second state", hidden_state, (batch, tracks, 2, 4 * channels)))
    for name, tensor, shape in expected:
        check_dense(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}; move one of them")
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {list(shape)}, as x has {channels} channels, got {list(tensor.shape)}"
            )
    if (normed_state is None) != (hidden_state is None):
        raise ValueError("state must hold two tensors, that of the first convolution and that of the second")
    if normed_state is not None and not causal:
        raise ValueError("state is what a causal mixer carries on; pass causal=True with it, or leave it out")
    for name, state in (("the first state", normed_state), ("the second state", hidden_state)):
        if state is not None and state.dtype != accumulator(x.dtype):
            raise TypeError(f"{name} must be {accumulator(x.dtype)}, as x is {x.dtype}, got {state.dtype}")
    if not eps >= 0:
        raise ValueError(f"eps must be a number from 0 up, got {eps}")


def _forward(
    x: Tensor,
    norm_weight: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor,
    causal: bool,
    eps: float,
    normed_state: Tensor | None,
    hidden_state: Tensor | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    call = (
        x,
        norm_weight,
        conv1_weight,
        conv1_bias,
        conv2_weight,
        conv2_bias,
        causal,
        eps,
        normed_state,
        hidden_state,
    )
    check(*call)
    return _backends.load(NAME, x.device, backend).forward(*call)


def _forward_fake(
    x: Tensor,
    norm_weight: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor,
    causal: bool,
    eps: float,
    normed_state: Tensor | None,
    hidden_state: Tensor | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check(x, norm_weight, conv1_weight, conv1_bias, conv2_weight, conv2_bias, causal, eps, normed_state, hidden_state)
    accurate = accumulator(x.dtype)
    states = [x.new_empty(0 if s is None else s.shape, dtype=accurate) for s in (normed_state, hidden_state)]
    return x.new_empty(x.shape), states[0], states[1]


def _check_backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    conv2_weight: Tensor,
    causal: bool,
    eps: float,
    needed: list[bool],
) -> None:
    # The second bias moves no gradient; the first, of its shape, is checked in its place.
    check(x, norm_weight, conv1_weight, conv1_bias, conv2_weight, conv1_bias, causal, eps, None, None)
    check_dense("grad_out", grad_out)
    if grad_out.shape != x.shape or grad_out.dtype != x.dtype or grad_out.device != x.device:
        raise ValueError(
            f"grad_out must be {x.dtype} of shape {tuple(x.shape)} on {x.device}, "
            f"got {grad_out.dtype} of shape {tuple(grad_out.shape)} on {grad_out.device}"
        )
    if len(needed) != 6:
        raise ValueError(f"needed must be one flag each for x and the five parameters, got {needed}")


def _backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    conv2_weight: Tensor,
    causal: bool,
    eps: float,
    needed: list[bool],
    backend: str | None = None,
) -> list[Tensor]:
    call = (grad_out, x, norm_weight, conv1_weight, conv1_bias, conv2_weight, causal, eps, needed)
    _check_backward(*call)
    return _backends.load(NAME, x.device, backend).backward(*call)


def _backward_fake(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    conv2_weight: Tensor,
    causal: bool,
    eps: float,
    needed: list[bool],
    backend: str | None = None,
) -> list[Tensor]:
    _check_backward(grad_out, x, norm_weight, conv1_weight, conv1_bias, conv2_weight, causal, eps, needed)
    accurate, channels = accumulator(x.dtype), x.shape[-1]
    weights, biases = ((4 * channels, 1, 3), accurate), ((4 * channels,), accurate)
    wanted = [(tuple(x.shape), x.dtype), ((channels,), accurate), weights, biases, weights, biases]
    return [
        x.new_empty(shape, dtype=dtype) if need else x.new_empty(0, dtype=accurate)
        for (shape, dtype), need in zip(wanted, needed, strict=True)
    ]


_PARAMETERS = "Tensor x, Tensor norm_weight, Tensor conv1_weight, Tensor conv1_bias, Tensor conv2_weight"
temporal_mixer_fwd = _registry.define(
    f"temporal_mixer_fwd({_PARAMETERS}, Tensor conv2_bias, bool causal, float eps, Tensor? normed_state,"
    " Tensor? hidden_state, str? backend=None) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
temporal_mixer_bwd = _registry.define(
    f"temporal_mixer_bwd(Tensor grad_out, {_PARAMETERS}, bool causal, float eps, bool[] needed,"
    " str? backend=None) -> Tensor[]",
    _backward,
    _backward_fake,
)


def parameter_gradients(x: Tensor, partial: Tensor | None, needed: list[bool]) -> list[Tensor]:
    """From sums `[:, 30, C]`: weights of the first convolution (4 x 3), its biases (4), the second's, norm."""
    sums = None if partial is None else partial.sum(0)
    candidates = (
        lambda sums: sums[29].clone(),
        lambda sums: sums[:12].mT.reshape(-1, 1, 3).clone(),
        lambda sums: sums[12:16].mT.reshape(-1).clone(),
        lambda sums: sums[16:28].mT.reshape(-1, 1, 3).clone(),
        lambda sums: sums[28].repeat_interleave(4),
    )
    return [
        make(sums) if need else x.new_empty(0, dtype=accumulator(x.dtype))
        for make, need in zip(candidates, needed[1:], strict=True)
    ]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.causal, ctx.eps, normed_state, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.carries_state = normed_state is not None
    ctx.dtypes = [tensor.dtype for tensor in tensors]
    # Nothing of the forward pass is kept: statistics and hidden values are made again from x.
    ctx.save_for_backward(*tensors[:5])


def _gradient(ctx, grad_out, grad_normed_state, grad_hidden_state):
    if ctx.carries_state:
        raise RuntimeError(
            "temporal_mixer with a carried state has no gradient; run it under torch.no_grad(), or train on whole "
            "clips without state"
        )
    if grad_out is None:
        return (None,) * 11
    needed = list(ctx.needs_input_grad[:6])
    grads = temporal_mixer_bwd(grad_out, *ctx.saved_tensors, ctx.causal, ctx.eps, needed, ctx.backend)
    results = [grad.to(dtype) if need else None for grad, need, dtype in zip(grads, needed, ctx.dtypes, strict=True)]
    return (*results, None, None, None, None, None)


_registry.attach_gradient(temporal_mixer_fwd, _setup_context, _gradient)
_registry.forbid_gradient(temporal_mixer_bwd, NAME)
