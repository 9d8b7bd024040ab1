"""The only place that talks to `torch.library`.

An operator is one decorated function: its signature is the schema, its body checks the arguments and says which tensors
the operator returns. `Library.define` and `impl` cost about half of `torch.library.custom_op` per call (6 against 13
microseconds), which is why operators are registered by hand.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tritonkern.ops import _backends

_library = torch.library.Library("tritonkern", "DEF")

Made = TypeVar("Made")
Results = Callable[[], Made]
"""What the function of an operator returns: a function without arguments that makes the results, uninitialised."""

_SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    int: "SymInt",
    float: "float",
    float | None: "float?",
    bool: "bool",
    list[bool]: "bool[]",
    list[int]: "SymInt[]",
    list[float]: "float[]",
    torch.dtype: "ScalarType",
}


def operator(operation: str, kernel: str) -> Callable[[Callable], torch._ops.OpOverload]:
    """Register the decorated function as the operator of its name, for every device.

    The function checks its arguments and returns a function that makes the results (`Results`), of the exact shapes,
    strides and dtypes that the kernels return; that one runs with fake tensors alone. Its parameters are Tensors,
    optional Tensors, ints, floats, optional floats, bools, lists of Tensors, bools, ints or floats, dtypes, or
    NamedTuples of these, which the schema has as arguments of their own: field ``weight`` of parameter ``norm`` is
    ``norm_weight``. The last argument of every schema is ``backend``. Results are a Tensor, or a list, tuple or
    NamedTuple of Tensors.

    Args:
        operation: folder of the operation, and first word of the operator's name.
        kernel: function of a backend's module that computes the results. It takes the arguments of the decorated
            function, NamedTuples included.

    The operator has no derivative until `differentiable` gives it a first one; missing ones are refused (above
    all forward mode, which PyTorch would silently take for zero).
    """

    def register(declaration: Callable) -> torch._ops.OpOverload:
        name, parameters = declaration.__name__, inspect.signature(declaration).parameters
        hints = get_type_hints(declaration)
        flat: list[tuple[str, Any]] = []  # argument of the schema, its type
        groups: list[tuple[Any, int]] = []  # parameter of the function, how many arguments it takes
        for parameter in parameters:
            fields = get_type_hints(hints[parameter]) if hasattr(hints[parameter], "_fields") else None
            if fields is not None:
                flat += [(f"{parameter}_{field}", kind) for field, kind in fields.items()]
            else:
                flat.append((parameter, hints[parameter]))
            groups.append((hints[parameter] if fields else None, len(fields or [None])))
        count, where = len(flat), next(i for i, (_, kind) in enumerate(flat) if kind is Tensor)
        arguments = ", ".join(f"{_SCHEMA[kind]} {argument}" for argument, kind in flat)
        flattened = any(group is not None for group, _ in groups)

        def grouped(given: Sequence) -> Sequence:
            it = iter(given)
            return [next(it) if group is None else group(*itertools.islice(it, size)) for group, size in groups]

        call_of = grouped if flattened else itemgetter(slice(count))
        signature_of = _signature([kind for _, kind in flat])
        right: set[tuple] = set()  # signatures of calls that have passed the checks

        def implementation(*given):
            call, signature = call_of(given), signature_of(given)
            if signature not in right:
                declaration(*call)
                if len(right) >= _SIGNATURES:
                    right.clear()
                right.add(signature)
            module = _backends.load(operation, given[where].device, given[count] if len(given) > count else None)
            return getattr(module, kernel)(*call)

        def fake(*given):
            return declaration(*call_of(given))()

        _library.define(
            f"{name}({arguments}, str? backend=None) -> {_schema_of_results(hints['return'])}",
            tags=(torch.Tag.pt2_compliant_tag,),
        )
        overload = getattr(torch.ops.tritonkern, name).default
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        _library.impl(name, _on_its_device(implementation, where), "CUDA")
        _library.impl(name, _differentiation(overload, [kind for _, kind in flat]), "Autograd")
        torch.library.register_fake(f"tritonkern::{name}", fake, lib=_library)
        if any(kind == list[Tensor] for _, kind in flat):
            torch.library.register_vmap(f"tritonkern::{name}", _one_by_one(overload), lib=_library)
        return overload

    return register


def _schema_of_results(annotation: Any) -> str:
    made = get_args(annotation)[-1]
    if made in (Tensor, list[Tensor]):
        return _SCHEMA[made]
    fields = made.__annotations__ if hasattr(made, "_fields") else get_args(made)
    return f"({', '.join('Tensor' for _ in fields)})"


# Signatures of calls that each operator remembers.
_SIGNATURES = 1024


def _signature(kinds: list[Any]) -> Callable[[Sequence], tuple]:
    """A function that finds what decides whether arguments of these types are right: everything but tensors' numbers.

    The function that declares an operator looks at nothing else, and takes longer than to look a signature up.
    """
    tensors = [i for i, kind in enumerate(kinds) if kind in (Tensor, Tensor | None)]
    lists_of_tensors = [i for i, kind in enumerate(kinds) if kind == list[Tensor]]
    lists = [i for i, kind in enumerate(kinds) if kind in (list[bool], list[int], list[float])]

    # A nested tensor has no shape, and is refused.
    def signature(given):
        found = list(given)
        for i in lists:
            found[i] = tuple(given[i])
        for i in lists_of_tensors:
            found[i] = tuple([(None if x.is_nested else x.shape, x.dtype, x.device, x.layout) for x in given[i]])
        for i in tensors:
            x = given[i]
            if x is not None:
                # Not a function of its own: a call for every tensor is a tenth of what a launch takes the host.
                found[i] = (None if x.is_nested else x.shape, x.dtype, x.device, x.layout)
        return tuple(found)

    return signature


def _one_by_one(overload: torch._ops.OpOverload) -> Callable:
    """A rule for `torch.vmap`: one call after the other, as PyTorch does by itself without lists of tensors."""

    def element(x, dim, i):
        if isinstance(dim, (list, tuple)):
            return [element(y, d, i) for y, d in zip(x, dim, strict=True)]
        return x if dim is None else x.select(dim, i)

    def rule(info, dims, *given):
        made = [overload(*map(element, given, dims, itertools.repeat(i))) for i in range(info.batch_size)]
        if isinstance(made[0], Tensor):
            return torch.stack(made), 0
        return [torch.stack(x) for x in zip(*made, strict=True)], [0] * len(made[0])

    return rule


def _on_its_device(implementation: Callable, where: int) -> Callable:
    """Triton launches on the current device, which need not be that of the tensors (of which `where` is the first)."""

    @functools.wraps(implementation)
    def run(*arguments):
        device = arguments[where].device
        if device.index == torch.cuda.current_device():
            return implementation(*arguments)
        with torch.cuda.device(device):
            return implementation(*arguments)

    return run


_gradients: dict[torch._ops.OpOverload, tuple[Callable, Callable]] = {}


def differentiable(operator: torch._ops.OpOverload, save: Callable, gradient: Callable) -> None:
    """Give an operator its first derivative in reverse mode.

    Args:
        operator: what `operator` returned.
        save: called as ``save(ctx, inputs, output)`` after the operator, as `torch.autograd.Function.setup_context`;
            `inputs` are the arguments of the schema, ``backend`` included.
        gradient: called as ``gradient(ctx, *grads)`` with the gradients of all results; returns those of the first
            arguments, as many as have one, with those of the tensors of a list one by one. Those that are not needed
            (``ctx.needs_input_grad``, which also has an entry for each tensor of a list) are dropped, so that it may
            return all of them.
    """
    _gradients[operator] = (save, gradient)


def _differentiation(operator: torch._ops.OpOverload, kinds: list[Any]) -> Callable:
    """What an operator does at the level of autograd: it records a gradient, or refuses one that it does not have."""
    name, count = operator.name().partition("::")[2], len(kinds)
    run = operator._op  # without the Python function around it
    lists = [i for i, kind in enumerate(kinds) if kind == list[Tensor]]

    # torch.autograd.Function does not look for tensors inside lists.
    def flattened(given):
        parts = [x if i in lists else [x] for i, x in enumerate(given)]
        return [len(given[i]) for i in lists], list(itertools.chain.from_iterable(parts))

    def nested(lengths, flat):
        it, lengths = iter(flat), iter(lengths)
        given = [list(itertools.islice(it, next(lengths))) if i in lists else next(it) for i in range(count)]
        return (*given, *it)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            *flat, lengths = arguments
            given = nested(lengths, flat) if lists else flat
            with torch._C._AutoDispatchBelowAutograd():
                output = run(*given)
            if operator in _gradients:
                _gradients[operator][0](ctx, given if len(given) > count else (*given, None), output)
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        def backward(ctx, *grads):
            if operator not in _gradients:
                order = "second derivative" if name.endswith("_bwd") else "derivative"
                raise RuntimeError(
                    f"{name.removesuffix('_bwd')} has no {order}: {name} cannot be differentiated. "
                    f"For {order}s write it with PyTorch operations, or drop create_graph=True."
                )
            found = _gradients[operator][1](ctx, *grads)
            found = found if isinstance(found, (tuple, list)) else (found,)
            needs_grad = ctx.needs_input_grad
            return tuple(found[i] if i < len(found) and needs_grad[i] else None for i in range(len(needs_grad)))

    def differentiate(*given):
        lengths, flat = flattened(given) if lists else ((), given)
        if forward_ad._current_level >= 0 and any(isinstance(x, Tensor) and _has_tangent(x) for x in flat):
            raise NotImplementedError(
                f"{name} has no forward-mode derivative (jvp); use reverse mode (torch.autograd.grad)"
            )
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*flat):
            if torch._C._are_functorch_transforms_active():
                # autograd.Function cannot record inside them; around them it would drop their derivatives silently.
                raise NotImplementedError(
                    f"{name} cannot be differentiated by torch.func (grad, vjp, jacrev, ...); use torch.autograd.grad"
                )
            return Gradient.apply(*flat, lengths)
        with torch._C._AutoDispatchBelowAutograd():
            return run(*given)

    return differentiate


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None
