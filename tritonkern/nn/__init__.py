"""Layers. Their parameters have the names and shapes of the public models that use them."""

from tritonkern.nn.correlation import CorrelationSoftArgmax, TrackerOutput
from tritonkern.nn.temporal import TemporalWindowAttention

__all__ = ["CorrelationSoftArgmax", "TemporalWindowAttention", "TrackerOutput"]
