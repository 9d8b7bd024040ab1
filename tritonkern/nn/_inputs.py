"""Checks of what a layer or model is called with, before PyTorch's own layers see it."""

from __future__ import annotations

from torch import Tensor, nn

from tritonkern.nn._plain import has_hooks
from tritonkern.ops._checks import check_dense, check_strided


def check_inputs(module: nn.Module, **tensors: Tensor) -> None:
    """Raise TypeError or ValueError unless each is a strided floating-point tensor on the device of `module`.

    The device is not checked where a module has hooks, which may move weights or inputs (offloading, `fully_shard`).
    """
    parameter = next(module.parameters(), None)
    for name, x in tensors.items():
        check_strided(name, x)
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}; convert it first")
        check_dense(name, x)
        if parameter is None or x.device == parameter.device or any(map(has_hooks, module.modules())):
            continue
        raise ValueError(
            f"{name} must be on the device of the layer's parameters, {parameter.device}, got {x.device}; "
            "move one of them"
        )
