"""How methods of one model are replaced, compared with the model's own, and given back.

A patched module gets a subclass of its own class, which has the same name and holds the new methods. A copy, a replica
of `torch.nn.DataParallel` and `super()` therefore work as for any class, and nothing is added to the module's
attributes. Pickling refers to the module's own class, so that the file can be loaded without this package.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

from tritonkern.integrations import _compare, _stream
from tritonkern.nn._plain import has_hooks
from tritonkern.ops import _backends


class Replacement(NamedTuple):
    """A method to be replaced."""

    path: str
    """Of the module inside the model, "" for the model itself."""
    module: nn.Module
    method: str
    functions: tuple[Callable[..., Any], ...]
    """Each is called as ``function(module, own, *args, **kwargs)``, where ``own`` is the module's own bound method. The
    first one that agrees with the module's own method takes its place."""
    compare: _compare.Comparison | None = None
    """None for a function that needs no comparison."""
    calls_own: bool = False
    """Whether the function calls ``own`` for everything that it does not know already, so that overrides take part."""
    overrides: frozenset[str] = frozenset()
    """Classes of the repository itself that override the method of another class."""


class Method:
    """What the class of a patched module knows about one of its new methods. Copies of the module share it."""

    def __init__(self, replacement: Replacement, verify: bool, rounded: bool) -> None:
        self.name = f"{replacement.path}.{replacement.method}" if replacement.path else replacement.method
        self.functions = replacement.functions
        self.function = replacement.functions[0]
        self.compare = replacement.compare
        self.rounded = rounded
        self.unchecked = verify and replacement.compare is not None
        calls_own = replacement.calls_own and replacement.method not in vars(replacement.module)
        self.reason = None if calls_own else override(replacement.module, replacement.method, replacement.overrides)
        """Why the module's own method runs, or None if the new one does."""
        self.patched: list[Method] = []
        """All methods of the patch."""
        self.lock = threading.RLock()

    def check(self, module: nn.Module, own: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Choose the function that agrees with the model's own method, or give the method back."""
        with self.lock:
            if not self.unchecked:  # another thread was faster
                return
            assert self.compare is not None
            outcomes = []
            for function in self.functions:
                outcome = _compare.run(self.compare, module, own, function, args, kwargs, self.rounded)
                if outcome.agrees is None:  # shapes without numbers
                    return
                outcomes.append(outcome)
                if outcome.agrees:
                    self.function = function
                    break
            self.unchecked = False
            if not outcomes[-1].agrees:
                self._differs(outcomes[0])
            elif outcomes[-1].remark:
                self._not_compared(outcomes[-1].remark)

    def _differs(self, outcome: _compare.Outcome) -> None:
        message = f"tritonkern.patch: {self.name} does not compute what the model's own method does: {outcome.remark}"
        if _backends.strict():
            self.unchecked = True
            raise RuntimeError(f"{message}. Unset TRITONKERN_STRICT to let the model's own method run instead")
        alike = [other for other in self.patched if other.functions == self.functions and other.reason is None]
        for method in alike:
            method.reason, method.unchecked = f"its results differ: {outcome.remark}", False
        others = f" (and {len(alike) - 1} methods like it)" if len(alike) > 1 else ""
        warnings.warn(f"{message}. The model's own method runs again{others}", RuntimeWarning, stacklevel=5)

    def _not_compared(self, remark: str) -> None:
        alike = [other for other in self.patched if other.functions == self.functions]
        for method in alike:
            method.unchecked = False
        warnings.warn(
            f"tritonkern.patch: {self.name} was not compared with the model's own method, {remark}. The new method is "
            "used",
            RuntimeWarning,
            stacklevel=5,
        )


class Patch:
    """What `tritonkern.patch` did to a model. `restore` undoes it; as a context manager it does so at the end."""

    def __init__(self, modules: Iterable[nn.Module], precision: str) -> None:
        self.precision = precision
        """"float32", "tf32" or "bf16"."""
        self._modules = list(modules)
        self._methods = [method for module in self._modules for method in _methods(module).values()]

    @property
    def replaced(self) -> list[str]:
        """Dotted names of the replaced methods, such as ``"model.forward_dino"``."""
        return [method.name for method in self._methods if method.reason is None]

    @property
    def kept(self) -> dict[str, str]:
        """Methods that the model keeps although the patch has others for them, each with the reason."""
        return {method.name: method.reason for method in self._methods if method.reason is not None}

    @property
    def stream_difference(self) -> tuple[float, float] | None:
        """How far tracks are from those of the exact schedule, in pixels: on average and at most.

        None without ``patch(stream=True)``, and before there was a window to compare.
        """
        schedules = (getattr(method.function, "__self__", None) for method in self._methods)
        return next((x.difference for x in schedules if isinstance(x, _stream.Stream)), None)

    def restore(self) -> None:
        """Give the model its own methods back. A second call does nothing."""
        while self._modules:
            module = self._modules.pop()
            module.__class__ = _without_patch(type(module))

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        state = ", ".join(self.replaced) if self._modules else "restored"
        return f"<tritonkern.Patch, precision={self.precision}: {state}>"


def install(replacements: Sequence[Replacement], precision: str, verify: bool) -> Patch:
    """Put the new methods into place.

    Raises:
        ValueError: a module is patched already.
    """
    methods: dict[nn.Module, dict[str, Method]] = {}
    for replacement in replacements:
        if _patched_class(type(replacement.module)) is not None:
            raise ValueError(
                f"model is patched already, at {replacement.path or 'its root'}; restore() the earlier patch first "
                "(tritonkern.integrations.find_patch(model) finds it)"
            )
        methods.setdefault(replacement.module, {})[replacement.method] = Method(
            replacement, verify, rounded=precision != "float32"
        )
    everything = [method for of_module in methods.values() for method in of_module.values()]
    for method in everything:
        method.patched, method.lock = everything, everything[0].lock
    for module, of_module in methods.items():
        module.__class__ = _subclass(type(module), of_module, precision)
    return Patch(methods, precision)


def find(modules: Iterable[nn.Module]) -> Patch | None:
    """The patch of these modules, or None if none of them is patched."""
    patched = {module: cls for module in modules if (cls := _patched_class(type(module))) is not None}
    if not patched:
        return None
    return Patch(patched, next(iter(patched.values()))._tritonkern_precision)


def _subclass(own: type[nn.Module], methods: dict[str, Method], precision: str) -> type[nn.Module]:
    """A class that calls `methods` where they are in force, and is `own` otherwise."""
    patched: type[nn.Module]

    def replaced(name: str, method: Method) -> Callable[..., Any]:
        @functools.wraps(getattr(own, name))
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            before = getattr(super(patched, self), name)
            # A trace holds operators of PyTorch alone, so that it can be loaded without this package.
            if method.reason is not None or torch.jit.is_tracing():
                return before(*args, **kwargs)
            if method.unchecked and not torch.compiler.is_compiling() and not _capturing():
                method.check(self, before, args, kwargs)
                if method.reason is not None:
                    return before(*args, **kwargs)
            return method.function(self, before, *args, **kwargs)

        return call

    def reduce(self: nn.Module, protocol: Any) -> Any:
        """Pickled, it is a module of its own class, made by a function of the standard library."""
        made, arguments, *state = _reduced(super(patched, self), protocol)
        if arguments != (patched,):  # a class derived from this one, or one that pickles itself in another way
            return made, arguments, *state
        return copyreg._reconstructor, (own, object, None), *state  # type: ignore[attr-defined]

    def copied(self: nn.Module, convert: Callable[[Any], Any], register: Callable[[Any], None]) -> Any:
        made, arguments, state, *_ = _reduced(super(patched, self), 4)
        twin = made(*arguments)
        register(twin)
        twin.__setstate__(convert(state))
        return twin

    def shallow(self: nn.Module) -> Any:
        if hasattr(own, "__copy__"):
            return super(patched, self).__copy__()  # type: ignore[misc]
        return copied(self, copy.copy, lambda twin: None)

    def deep(self: nn.Module, memo: dict[int, Any]) -> Any:
        if hasattr(own, "__deepcopy__"):
            return super(patched, self).__deepcopy__(memo)  # type: ignore[misc]
        return copied(self, lambda x: copy.deepcopy(x, memo), lambda twin: memo.__setitem__(id(self), twin))

    def fill(namespace: dict[str, Any]) -> None:
        namespace.update({name: replaced(name, method) for name, method in methods.items()})
        namespace.update(__reduce_ex__=reduce, __copy__=shallow, __deepcopy__=deep)
        namespace.update(__module__=own.__module__, __qualname__=own.__qualname__, __doc__=own.__doc__)
        namespace.update(_tritonkern_methods=methods, _tritonkern_precision=precision)

    patched = types.new_class(own.__name__, (own,), exec_body=fill)
    return patched


def _reduced(thing: Any, protocol: Any) -> Any:
    return thing.__reduce_ex__(protocol)


def _patched_class(cls: type) -> Any:
    """The class that `_subclass` made among the classes of a module: PyTorch derives others from it (FSDP)."""
    return next((base for base in cls.__mro__ if "_tritonkern_methods" in vars(base)), None)


def _methods(module: nn.Module) -> dict[str, Method]:
    return _patched_class(type(module))._tritonkern_methods


def _without_patch(cls: type) -> type:
    if "_tritonkern_methods" in vars(cls):
        return cls.__bases__[0]
    if _patched_class(cls) is None:
        return cls
    # Derived from the patched class after the patch, such as by `fully_shard` or a parametrization: the same, of the
    # module's own class.
    content = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(_without_patch(base) for base in cls.__bases__), content)


def in_force(module: nn.Module, name: str) -> bool:
    """Whether a call of the method may be replaced by what the new method computes."""
    patched = _patched_class(type(module))
    method = patched and patched._tritonkern_methods.get(name)
    return method is not None and method.reason is None and name not in vars(module) and not has_hooks(module)


def override(module: nn.Module, name: str, known: frozenset[str] = frozenset()) -> str | None:
    """Who has overridden the method of a module's class, or None. `known`: names of classes that may do so."""
    if name in vars(module):
        return f"the module has an attribute {name} of its own, {_described(vars(module)[name])}"
    definitions = (base for base in type(module).__mro__ if name in vars(base) and not _made_here(base, name))
    first, *others = (base for base in definitions if base.__module__.partition(".")[0] != "torch")
    return (
        f"{first.__name__} overrides the method of {others[0].__name__}"
        if others and first.__name__ not in known
        else None
    )


def only_calls(module: nn.Module) -> bool:
    """Whether calling `module` is calling the `forward` of its class: no hooks and no override are left out."""
    return not has_hooks(module) and override(module, "forward") is None


def _made_here(cls: type, name: str) -> bool:
    return name in vars(cls).get("_tritonkern_methods", ())


def _described(function: Any) -> str:
    inner = getattr(function, "__func__", function)
    code = getattr(inner, "__code__", None)
    name = getattr(inner, "__qualname__", type(inner).__name__)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else name


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
