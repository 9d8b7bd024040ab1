"""TAPNext and TAPNext++ in PyTorch (github.com/google-deepmind/tapnet, tapnet/tapnext, read in July 2026, Apache-2.0).

The patch replaces what the recurrent block of each of the model's blocks does between its linear layers: the
convolution along time, the gates and the recurrence, which the official code computes frame by frame in a loop. The
state that goes from call to call is the official one.

In training mode the official code runs a parallel scan, whose backward pass divides by products of factors, and by 1e-5
where such a product is smaller. The patched model's gradients are those of the loop, which need no division.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonkern.functional import gated_linear_recurrence
from tritonkern.integrations import _compare, _recognise
from tritonkern.integrations._patch import Replacement, only_calls
from tritonkern.integrations._precision import Precision
from tritonkern.nn._plain import obstacle
from tritonkern.ops.gated_linear_recurrence.op import MAX_WIDTH, TAPS

PARTS = (
    *_recognise.methods("embed_queries", "prediction_heads"),
    _recognise.child("lin_proj", nn.Conv2d),
    _recognise.child("blocks", nn.ModuleList),
    *(_recognise.child(f"blocks.0.ssm_block.recurrent_block.{name}") for name in ("conv_1d", "rg_lru", "linear_x")),
    _recognise.child("visible_head"),
    _recognise.child("coordinate_head"),
)


def replacements(path: str, tracker: Any, precision: Precision) -> Iterator[Replacement]:
    """What `tritonkern.patch` replaces in a model that has `PARTS`."""
    if precision.name != "float32":
        raise ValueError(
            f"precision: {precision.name!r} has no meaning for TAPNext, which has no local correlation; leave "
            "precision='float32'"
        )
    prefix = f"{path}." if path else ""
    for index, block in enumerate(tracker.blocks):
        recurrent = block.ssm_block.recurrent_block
        if _fits(recurrent):
            name = f"{prefix}blocks.{index}.ssm_block.recurrent_block"
            yield Replacement(name, recurrent, "forward", (_recurrent_forward,), _first)


def _fits(block: Any) -> bool:
    """Whether the block has the shapes that the operation takes, and nothing but parameters is read."""
    conv, unit = block.conv_1d, block.rg_lru
    read = ((conv, ("w", "b")), (unit, ("a_param",)), *((gate, ("w", "b")) for gate in (unit.input_gate, unit.a_gate)))
    plain = all(
        only_calls(module)
        and obstacle(module, type(module)) is None
        and all(isinstance(module._parameters.get(name), Tensor) for name in names)
        for module, names in read
    )
    return plain and conv.w.shape[0] == TAPS and unit.input_gate.w.shape[-1] <= MAX_WIDTH


def _recurrent_forward(self: Any, own: Any, x: Tensor, cache: Any = None, use_linear_scan: bool = True) -> Any:
    """Replaces `RecurrentBlock.forward`: `[N, T, C]` -> the same shape, and the state after it."""
    # The official code sums float64 up in float32, so that its results are others.
    if not _fits(self) or x.dtype == torch.float64:
        return own(x, cache, use_linear_scan)
    gate = F.gelu(self.linear_y(x), approximate="tanh")
    conv, unit = self.conv_1d, self.rg_lru
    inputs = self.linear_x(x)
    state = None if cache is None else (cache.conv1d_state.to(inputs.dtype), cache.rg_lru_state)
    hidden, (frames, last) = gated_linear_recurrence(
        inputs, conv.w, conv.b, unit.input_gate.w, unit.input_gate.b, unit.a_gate.w, unit.a_gate.b, unit.a_param,
        state=state,
    )  # fmt: skip
    made = type(self.init_cache(batch_size=0, lru_width=1, dtype=x.dtype))
    return self.linear_out(hidden * gate), made(rg_lru_state=last, conv1d_state=frames)


def _first(module: Any, own: Any, function: Any, x: Tensor, cache: Any = None, use_linear_scan: bool = True) -> Any:
    """The first sequence, in two frames."""
    if cache is not None:
        cache = type(cache)(*(state[:1] for state in cache))
    return _compare.arguments(module, own, function, x[:1, :2], cache, use_linear_scan)
