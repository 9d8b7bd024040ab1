"""Layers. Their parameters have the names and shapes of the public models that use them."""

from tritonkern.nn.adapter import TemporalAdapter
from tritonkern.nn.correlation import CorrelationSoftArgmax, TrackerOutput
from tritonkern.nn.temporal import TemporalWindowAttention
from tritonkern.nn.tracktention import Tracktention

__all__ = ["CorrelationSoftArgmax", "TemporalAdapter", "TemporalWindowAttention", "TrackerOutput", "Tracktention"]
