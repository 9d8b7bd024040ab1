"""One public function an operation: what it computes, argument checks, one call."""

from tritonkern.functional.attention import (
    full_attention,
    temporal_window_attention,
    track_sample_attention,
    track_splat_attention,
    window_extent,
)
from tritonkern.functional.blocks import norm_conv_relu, relu_conv_add, residual_norm, temporal_block, temporal_mixer
from tritonkern.functional.matching import (
    Match,
    correlation_soft_argmax,
    local_correlation,
    local_correlation_linear,
    soft_argmax_2d,
)

__all__ = [
    "Match",
    "correlation_soft_argmax",
    "full_attention",
    "local_correlation",
    "local_correlation_linear",
    "norm_conv_relu",
    "relu_conv_add",
    "residual_norm",
    "soft_argmax_2d",
    "temporal_block",
    "temporal_mixer",
    "temporal_window_attention",
    "track_sample_attention",
    "track_splat_attention",
    "window_extent",
]
