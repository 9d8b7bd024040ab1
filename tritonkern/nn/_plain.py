"""The rule for using a submodule's weights without calling it: the one place in the package that decides.

A fused computation may take the place of a module's own call only where the call would do nothing else, which is where
`obstacle` returns None. Everything else (LoRA, parametrizations, weight and spectral normalisation, pruning, quantised
or sharded parameters, hooks, a replaced `forward`) is called, which is slower, or refused with the reason.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

# The last two stand for plain tensors while PyTorch exports. Other subclasses of Tensor, such as DTensor or a quantised
# weight, have arithmetic of their own.
_PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)


def is_plain(module: nn.Module, kind: type[nn.Module], **settings: Any) -> bool:
    """Whether a computation written for `kind` may read the parameters of `module`; see `obstacle`."""
    return obstacle(module, kind, **settings) is None


def obstacle(module: nn.Module, kind: type[nn.Module], **settings: Any) -> str | None:
    """Why `module` must be called and its parameters must not be read, or None if they may be.

    Args:
        module: the module that a fused computation would replace. Only the module itself is examined, not its children.
        kind: the exact class that the computation is written for; a subclass may do something else.
        settings: attributes of the module that the computation assumes, such as `stride=(1, 1)`.

    Returns:
        A clause such as "it has hooks", to be put behind the name of the module.
    """
    if type(module) is not kind:
        return f"its class is {type(module).__name__} instead of {kind.__name__}"
    if "forward" in module.__dict__ or _forward_is_replaced(kind):
        return "its method forward was replaced"
    if has_hooks(module):
        return "it has hooks"
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) not in _PLAIN_TENSORS:
            return f"its {name} is a {type(parameter).__name__}"
    for name in ("weight", "bias"):
        # Pruning and the older weight normalisation put a tensor computed from other parameters there.
        if name in module.__dict__ or (name not in module._parameters and hasattr(module, name)):
            return f"its {name} is not one of its parameters"
    for name, needed in settings.items():
        if (value := getattr(module, name)) != needed:
            return f"its {name} is {value!r} instead of {needed!r}"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs hooks, its own or those of all modules; those of its children do not count."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or _has_any_global_hook()
    )


def input_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype that `module` must be called with: that of its first floating-point parameter.

    `default` is returned for a module without one, such as a layer quantised by `torch.ao.quantization`.
    """
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), default)


def _forward_is_replaced(kind: type[nn.Module]) -> bool:
    """Whether somebody assigned another function to `kind.forward`."""
    for base in kind.__mro__:
        if "forward" in base.__dict__:
            return getattr(base.__dict__["forward"], "__module__", None) != base.__module__
    return False
