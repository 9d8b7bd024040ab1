"""Eager PyTorch, the plainest correct form; in float64 it is what the tests believe.

LayerNorm, linear layers, attention and sum one after the other, from the references of their own rooms, with every
intermediate result in the type of its sums.
"""

import functools

from tritonkern.ops.temporal_block import composition

forward = functools.partial(composition.forward, "reference")
backward = functools.partial(composition.backward, "reference")
