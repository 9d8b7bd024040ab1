"""Blocks of tracking networks."""

from __future__ import annotations

from torch import Tensor

from tritonkern.functional._arguments import real, refuse_forward_mode
from tritonkern.ops import _backends
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
        eps: of the LayerNorm.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        Contiguous tensor of x's shape and dtype; with a state the pair of it and the state after x. A NaN or infinity
        in a frame reaches exactly the frames that see it, through both convolutions: t - 2 to t + 2, or t to t + 4.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: an input carries a forward-mode tangent.
        ValueError: shapes or devices that do not fit together, a state without `causal`, or a backend that cannot run
            this call.
        RuntimeError: at the backward pass, with a state.

    Paper: Doersch et al., "TAPIR: Tracking Any Point with per-frame Initialization and temporal Refinement", ICCV 2023.
    """
    _backends.check_name(backend)
    eps = real("eps", eps)
    if state is not None and not (isinstance(state, tuple | list) and len(state) == 2):
        raise TypeError(f"state must be a pair of tensors or None, got {type(state).__name__}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    unbatched = isinstance(x, Tensor) and x.dim() == 3
    past: list[Tensor | None] = [None, None] if state is None else list(state)
    if unbatched:
        x, past = x.unsqueeze(0), [s.unsqueeze(0) if isinstance(s, Tensor) else s for s in past]
    parameters = (norm_weight, conv1_weight, conv1_bias, conv2_weight, conv2_bias)
    _mixer_op.check(x, *parameters, causal, eps, *past)
    refuse_forward_mode("temporal_mixer", x, *parameters)
    results: tuple[Tensor, ...] = _mixer_op.temporal_mixer_fwd(x, *parameters, causal, eps, *past, backend)
    out, *after = (result.squeeze(0) for result in results) if unbatched else results
    return out if state is None else (out, (after[0], after[1]))
