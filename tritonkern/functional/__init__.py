"""The public functions, one per operation."""

from tritonkern.functional.attention import (
    temporal_window_attention,
    track_sample_attention,
    track_splat_attention,
)
from tritonkern.functional.blocks import gated_linear_recurrence, temporal_mixer
from tritonkern.functional.matching import (
    Match,
    correlation_pyramid,
    correlation_soft_argmax,
    local_correlation,
    local_correlation_linear,
    soft_argmax_2d,
)
from tritonkern.functional.query_key import (
    QueryKeyMatch,
    attention_row_statistics,
    frame_local_attention,
    query_key_cost,
    query_key_matching,
)

__all__ = [
    "Match",
    "QueryKeyMatch",
    "attention_row_statistics",
    "correlation_pyramid",
    "correlation_soft_argmax",
    "frame_local_attention",
    "gated_linear_recurrence",
    "local_correlation",
    "local_correlation_linear",
    "query_key_cost",
    "query_key_matching",
    "soft_argmax_2d",
    "temporal_mixer",
    "temporal_window_attention",
    "track_sample_attention",
    "track_splat_attention",
]
