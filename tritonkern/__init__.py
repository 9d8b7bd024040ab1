"""Attention and matching operations of video point trackers: eager reference, C++ for the CPU, Triton for GPUs.

Importing this package loads neither Triton nor a device; a backend is loaded at its first call.
"""

from tritonkern.functional import (
    Match,
    QueryKeyMatch,
    attention_row_statistics,
    correlation_pyramid,
    correlation_soft_argmax,
    frame_local_attention,
    gated_linear_recurrence,
    local_correlation,
    local_correlation_linear,
    query_key_cost,
    query_key_matching,
    soft_argmax_2d,
    temporal_mixer,
    temporal_window_attention,
    track_sample_attention,
    track_splat_attention,
)
from tritonkern.integrations import patch
from tritonkern.nn import CorrelationSoftArgmax, TemporalAdapter, TemporalWindowAttention, Tracktention

__version__ = "0.1.0"

__all__ = [
    "CorrelationSoftArgmax",
    "Match",
    "QueryKeyMatch",
    "TemporalAdapter",
    "TemporalWindowAttention",
    "Tracktention",
    "__version__",
    "attention_row_statistics",
    "correlation_pyramid",
    "correlation_soft_argmax",
    "frame_local_attention",
    "gated_linear_recurrence",
    "local_correlation",
    "local_correlation_linear",
    "patch",
    "query_key_cost",
    "query_key_matching",
    "soft_argmax_2d",
    "temporal_mixer",
    "temporal_window_attention",
    "track_sample_attention",
    "track_splat_attention",
]
