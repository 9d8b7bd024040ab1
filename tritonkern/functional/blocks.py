"""Blocks of tracking networks."""

from __future__ import annotations

from torch import Tensor

from tritonkern.functional._arguments import check_types, real
from tritonkern.ops._checks import check_tensors
from tritonkern.ops._dtypes import accumulator
from tritonkern.ops.gated_linear_recurrence import op as _recurrence_op
from tritonkern.ops.temporal_mixer import op as _mixer_op


def temporal_mixer(
    x: Tensor,
    norm_weight: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor,
    *,
    causal: bool = False,
    state: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """TAPIR's mixing over time: LayerNorm, depthwise convolution to four channels each, GELU, another, sum, residual.

    ::

        h = LayerNorm(x) * norm_weight
        v = gelu(conv1(h))                    channel 4 c + j of v belongs to channel c of x; GELU in its tanh form
        out[c] = x[c] + sum over j of conv2(v)[4 c + j]

    Both convolutions run along time alone, with kernels of 3 frames and zeros beyond the clip: frames t - 1 to t + 1,
    or t - 2 to t where the mixer is causal. A causal mixer can carry on from clip to clip: given the state after the
    frames before, the results are those of one long clip.

    Args:
        x: ``[N, T, C]`` or ``[B, N, T, C]`` (batch, tracks, frames, channels), any strides; float64, float32, bfloat16
            or float16; C up to 4096. Sums are kept in float32 (float64 for float64). Autocast does not apply.
        norm_weight: ``[C]``, of any of these dtypes, as the other parameters are.
        conv1_weight, conv1_bias: ``[4 C, 1, 3]`` and ``[4 C]``, those of ``nn.Conv1d(C, 4 * C, 3, groups=C)``.
        conv2_weight, conv2_bias: the same shapes, those of ``nn.Conv1d(4 * C, 4 * C, 3, groups=4 * C)``.
        causal: whether a frame sees no later ones.
        state: the two frames before x (causal only): LayerNorm's ``[..., N, 2, C]`` and v's ``[..., N, 2, 4 C]``,
            float32 (float64 for float64). Zeros stand for the start of a clip. There is no gradient with a state.
        eps: added to the LayerNorm's variance; positive, at least the smallest normal number of the type of sums.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        Contiguous tensor of x's shape and dtype; with a state the pair of it and the state after x. A NaN or infinity
        in a frame reaches exactly the frames that see it, through both convolutions: t - 2 to t + 2, or t to t + 4.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: an input carries a forward-mode tangent.
        ValueError: shapes or devices that do not fit together, a state without `causal`, an `eps` that is too small, or
            a backend that cannot run this call.
        RuntimeError: at the backward pass, with a state.

    Paper: Doersch et al., "TAPIR: Tracking Any Point with per-frame Initialization and temporal Refinement", ICCV 2023.
    """
    parameters = {
        "norm_weight": norm_weight,
        "conv1_weight": conv1_weight,
        "conv1_bias": conv1_bias,
        "conv2_weight": conv2_weight,
        "conv2_bias": conv2_bias,
    }
    check_types(backend, x=x, **parameters)
    eps = real("eps", eps)
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    past: tuple[Tensor | None, Tensor | None] = (None, None) if state is None else _pair(state)
    unbatched = x.dim() == 3
    if unbatched:
        x, past = x[None], (None if past[0] is None else past[0][None], None if past[1] is None else past[1][None])
    out, *after = _mixer_op.temporal_mixer_fwd(x, *parameters.values(), causal, eps, *past, backend)
    if unbatched:
        out, after = out.squeeze(0), [s.squeeze(0) for s in after]
    return out if state is None else (out, (after[0], after[1]))


def gated_linear_recurrence(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    input_gate_weight: Tensor,
    input_gate_bias: Tensor,
    decay_gate_weight: Tensor,
    decay_gate_bias: Tensor,
    decay: Tensor,
    *,
    state: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """TAPNext's recurrence over time: depthwise causal convolution and real-gated linear recurrent unit (RG-LRU).

    ::

        u[t] = conv_bias + sum over k = 0..3 of conv_weight[k] x[t - 3 + k]
        i[t] = sigmoid(u[t] W_i + b_i)          r[t] = sigmoid(u[t] W_r + b_r)       W, b: of each head
        a[t] = exp(-8 softplus(decay) r[t])     m[t] = sqrt(1 - a[t]^2)
        h[t] = a[t] h[t - 1] + m[t] i[t] u[t]   the result

    At the start of a clip frames before the first are zeros, and m[0] is 1. The state after a clip is what the next
    one goes on from: both together give what one long clip gives. Nothing is stored per frame but the result.

    Args:
        x: ``[B, T, C]`` or ``[B, T, N, C]`` (batch, frames, sequences, channels), any strides; float64, float32,
            bfloat16 or float16. Sums and h are kept in float32 (float64 for float64). Autocast does not apply.
        conv_weight, conv_bias: ``[4, C]`` and ``[C]``, of any of these dtypes, as the other parameters are.
        input_gate_weight, input_gate_bias: W_i ``[H, D, D]``, inputs before outputs, and b_i ``[H, D]``, for H heads of
            D = C / H channels; D up to 64.
        decay_gate_weight, decay_gate_bias: W_r and b_r, of the same shapes.
        decay: ``[C]``, called a_param in the official code.
        state: what an earlier call returned: the last three frames of x before this clip, ``[B, 3, (N,) C]``, and the
            last h, ``[B, (N,) C]``. None is the start of a clip; that differs from a state of zeros by m[0].

    Returns:
        The contiguous tensor h of x's shape and dtype, and the state: frames in x's dtype, h in float32 (float64 for
        float64). Gradients pass through the state. The gradient of the square root is 1000 at most. A NaN or infinity
        in a frame reaches the channels of its head, in that frame and later ones of the sequence.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: an input carries a forward-mode tangent.
        ValueError: shapes or devices that do not fit together, or a backend that cannot run this call.

    Papers: De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models",
    2024; Zholus et al., "TAPNext: Tracking Any Point (TAP) as Next Token Prediction", ICCV 2025.
    """
    parameters = {
        "conv_weight": conv_weight,
        "conv_bias": conv_bias,
        "input_gate_weight": input_gate_weight,
        "input_gate_bias": input_gate_bias,
        "decay_gate_weight": decay_gate_weight,
        "decay_gate_bias": decay_gate_bias,
        "decay": decay,
    }
    past: tuple[Tensor | None, Tensor | None] = (None, None) if state is None else _pair(state)
    check_types(backend, x=x, **parameters)
    # Before the conversion, which would hide a wrong type.
    check_tensors(x=x, **parameters)
    dtype = accumulator(x.dtype)
    flat = x.dim() == 3
    if flat:
        x, past = x[:, :, None], tuple(None if s is None else s[..., None, :] for s in past)  # type: ignore[assignment]
    out, *after = _recurrence_op.gated_linear_recurrence_fwd(
        x, *(parameter.to(dtype) for parameter in parameters.values()), *past, backend
    )
    if flat:
        out, after = out.squeeze(2), [s.squeeze(-2) for s in after]
    return out, (after[0], after[1])


def _pair(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise TypeError(f"state must be a pair of tensors or None, got {type(state).__name__}")
    check_types(None, **{"the first state": state[0], "the second state": state[1]})
    return state[0], state[1]
