"""Tensors whose numbers are computed only when something asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_KNOWN = {
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "__len__", "is_floating_point")),
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf", "is_cuda")
    ),
}
"""What can be said of a promise without its numbers."""

RESHAPES = (Tensor.reshape, torch.reshape, Tensor.view, Tensor.flatten, torch.flatten, Tensor.unflatten)


class Promise(Tensor):
    """A tensor of known shape whose numbers are those of ``compute(*inputs)``.

    A subclass answers the functions that it knows a faster way for in `shortcut`. Every other function gets the real
    tensor, through which gradients flow to `inputs`; also code that never asks PyTorch's Python functions, such as
    `torch.autograd.Function` and `torch.utils.checkpoint`.
    """

    compute: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    _numbers: Tensor | None

    @classmethod
    def make(cls, shape: Sequence[int], compute: Callable[..., Tensor], *inputs: Tensor) -> Any:
        """A promise in the dtype and on the device of the first input."""
        return _Connect.apply(cls, tuple(shape), compute, *inputs)

    def numbers(self) -> Tensor:
        """The real tensor, without gradients. It is kept for as long as the promise."""
        if self._numbers is None:
            with torch.no_grad():
                self._numbers = self.compute(*self.inputs)
        return self._numbers

    def realised(self) -> Tensor:
        """The real tensor, through which gradients flow to the promise and from there to `inputs`."""
        return _Real.apply(self) if torch.is_grad_enabled() and self.requires_grad else self.numbers()

    def shortcut(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The result of `function` if there is a faster way to it, else NotImplemented."""
        return NotImplemented

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        given = args[0] if args and isinstance(args[0], (list, tuple)) else args
        if given and isinstance(given[0], Promise) or function is torch.einsum:
            for promise in given:
                if isinstance(promise, Promise):
                    result = promise.shortcut(function, args, kwargs)
                    if result is not NotImplemented:
                        return result
        args, kwargs = tree_map_only(Promise, Promise.realised, (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Below autograd, which has seen the promise itself and will ask `_Connect` for its gradient
        with torch.no_grad():
            args, kwargs = tree_map_only(Promise, Promise.numbers, (args, kwargs or {}))
            return function(*args, **kwargs)

    def reshaped(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, ...]:
        """The shape of the result of one of `RESHAPES`."""
        return tuple(function(torch.empty(self.shape, device="meta"), *args[1:], **kwargs).shape)


class _Connect(torch.autograd.Function):
    """Makes a promise that autograd knows, with the gradient of the computation that it stands for."""

    @staticmethod
    def forward(ctx: Any, cls: type[Promise], shape: Any, compute: Callable[..., Tensor], *inputs: Tensor) -> Promise:
        ctx.compute = compute
        ctx.save_for_backward(*inputs)
        first = inputs[0]
        promise = Tensor._make_wrapper_subclass(cls, shape, dtype=first.dtype, device=first.device)
        promise.compute, promise.inputs, promise._numbers = compute, inputs, None
        return promise

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        needed = ctx.needs_input_grad[3:]
        inputs = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            result = ctx.compute(*inputs)
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(result, wanted, grad))
        return None, None, None, *(next(found) if need else None for need in needed)


class _Real(torch.autograd.Function):
    """A promise -> its numbers. Saves nothing, so that `torch.utils.checkpoint` sees the same graph again."""

    @staticmethod
    def forward(ctx: Any, promise: Promise) -> Tensor:
        return promise.numbers().detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
