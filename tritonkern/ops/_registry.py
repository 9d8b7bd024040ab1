"""The only place that talks to `torch.library`.

`Library.define/impl` costs about half of `torch.library.custom_op` a call (6 against 13 microseconds), which is why
operators are registered by hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

_library = torch.library.Library("tritonkern", "DEF")


def define(schema: str, implementation: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Register one functional operator for every device.

    Args:
        schema: operator schema without the namespace, such as ``"op_fwd(Tensor x) -> Tensor"``.
        implementation: called with real tensors, below autograd.
        fake: called with fake and meta tensors; returns outputs of the same shapes, strides and dtypes.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    _library.impl(name, _on_its_device(implementation), "CUDA")
    torch.library.register_fake(f"tritonkern::{name}", fake, lib=_library)
    return getattr(torch.ops.tritonkern, name).default


def _on_its_device(implementation: Callable) -> Callable:
    """Triton launches on the current device, which need not be that of the tensors."""

    @functools.wraps(implementation)
    def run(*arguments, **options):
        with torch.cuda.device_of(next(x for x in arguments if isinstance(x, torch.Tensor))):
            return implementation(*arguments, **options)

    return run


def attach_gradient(operator: torch._ops.OpOverload, setup_context: Callable, backward: Callable) -> None:
    """Give `operator` a first derivative (see `torch.library.register_autograd`)."""
    torch.library.register_autograd(operator, backward, setup_context=setup_context, lib=_library)


def forbid_gradient(operator: torch._ops.OpOverload, operation: str) -> None:
    """Make differentiating `operator`, the backward operator of `operation`, raise a clear error."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"{operation} has no second derivative: its backward pass cannot itself be differentiated. "
            "For second derivatives write it with PyTorch operations, or drop create_graph=True."
        )

    torch.library.register_autograd(operator, backward, lib=_library)
