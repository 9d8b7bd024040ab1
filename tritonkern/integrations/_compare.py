"""The comparison of a new method with the model's own, at the first call."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_map

Comparison = Callable[..., tuple[Callable[[], Any], Callable[[], Any]]]
"""``comparison(module, own, function, *args, **kwargs)`` of the arguments of the first call returns two functions that
compute the same small part (one point, one frame or two) by `function` and by `own`."""

TOLERANCE = 1e-4
"""Largest difference that rounding may cause, relative to the largest value of the model's own result. It is that of
float32 for float64 too, as the official repositories compute coordinates in float32."""
LOOSE_TOLERANCE = 3e-2
"""Of results in 16 bits, under autocast, where `patch` was asked for a lower precision, and in float32 on GPUs, whose
convolutions PyTorch rounds to TF32."""


class Outcome(NamedTuple):
    agrees: bool | None
    """None if there are no numbers to compare: no points, or the tensors of `FakeTensorMode`."""
    remark: str = ""


def arguments(module: nn.Module, own: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """A `Comparison` of the arguments as they are."""

    def call(method: Callable[..., Any]) -> Any:
        # Lists and dictionaries of its own: TAPIR writes into the state that it is given.
        mine, named = tree_map(lambda x: x, (args, kwargs))
        return method(*mine, **named)

    return lambda: call(partial(function, module, own)), lambda: call(own)


def random(shape: Sequence[int], like: Tensor) -> Tensor:
    """Numbers between -1 and 1, always the same ones, of the dtype and device of `like`. Consumes none of PyTorch's."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1).to(like.device, like.dtype)


def map_of_features(shape: Sequence[int], like: Tensor) -> Tensor:
    """Unit vectors `[..., C]` that resemble each other, so that a soft-argmax has a maximum and much beside it."""
    return torch.nn.functional.normalize(1 + random(shape, like), dim=-1)


def bare(module: nn.Module) -> Any:
    """A module with the same parameters, in evaluation, without the hooks of `module` and its submodules.

    A comparison then draws no random number, and users' hooks and counters do not see it.
    """
    made: dict[int, nn.Module] = {}

    def stripped(part: nn.Module) -> nn.Module:
        if id(part) not in made:
            made[id(part)] = twin = type(part).__new__(type(part))
            twin.__dict__.update({name: _apart(name, value) for name, value in vars(part).items()})
            twin.__dict__["training"] = False
            children = {name: None if child is None else stripped(child) for name, child in part._modules.items()}
            twin.__dict__["_modules"] = children
        return made[id(part)]

    return stripped(module)


def _apart(name: str, value: Any) -> Any:
    """An attribute of a module, so that what a method adds to it does not reach the module."""
    if name.endswith("_hooks") and isinstance(value, OrderedDict):
        return OrderedDict()
    return copy.copy(value) if type(value) in (dict, OrderedDict, list, set) else value


@torch.no_grad()
def run(comparison: Comparison, module: Any, own: Any, function: Any, args: Any, kwargs: Any, rounded: bool) -> Outcome:
    """Whether `function` and `own`, a method of `module`, compute the same; `rounded`: up to lower precision."""
    if any(isinstance(x, FakeTensor) or (isinstance(x, Tensor) and x.is_meta) for x in tree_flatten((args, kwargs))[0]):
        return Outcome(None)
    with warnings.catch_warnings():
        # Those of the model's own methods; the warnings of this package are of another class.
        warnings.simplefilter("ignore", UserWarning)
        return _run(comparison, module, own, function, args, kwargs, rounded)


def _run(
    comparison: Comparison, module: Any, own: Any, function: Any, args: Any, kwargs: Any, rounded: bool
) -> Outcome:
    try:
        alike = bare(module)
        ours, theirs = comparison(alike, MethodType(own.__func__, alike), function, *args, **kwargs)
        expected = theirs()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return Outcome(True, f"which cannot run here ({_short(error)})")
    try:
        actual = ours()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return Outcome(False, f"it fails ({_short(error)})")
    return _compared(actual, expected, rounded)


def _compared(actual: Any, expected: Any, rounded: bool) -> Outcome:
    pairs = [[x for x in tree_flatten(tree)[0] if isinstance(x, Tensor)] for tree in (actual, expected)]
    if len(pairs[0]) != len(pairs[1]):
        return Outcome(False, f"{len(pairs[0])} results instead of {len(pairs[1])}")
    if not any(x.numel() for x in pairs[1]):
        return Outcome(None)
    for mine, other in zip(*pairs, strict=True):
        if mine.shape != other.shape:
            return Outcome(False, f"shape {list(mine.shape)} instead of {list(other.shape)}")
        if not other.numel():
            continue
        mine, other = (x.detach().to("cpu", torch.float64) for x in (mine, other))
        largest = other.nan_to_num(0, 0, 0).abs().max().item()
        same = (mine == other) | (mine.isnan() & other.isnan())
        difference = torch.where(same, 0, mine - other).abs().max().item()
        allowed = (LOOSE_TOLERANCE if rounded else _tolerance(pairs[1])) * largest
        if not difference <= allowed:
            return Outcome(
                False,
                f"in a comparison of one point they differ by up to {difference:.2g} in values of up to {largest:.2g} "
                f"(tolerance {allowed:.1g})",
            )
    return Outcome(True)


def _tolerance(results: Sequence[Tensor]) -> float:
    device = results[0].device.type
    dtypes = {x.dtype for x in results if x.is_floating_point()}
    exact = dtypes <= {torch.float64} or (dtypes <= {torch.float32, torch.float64} and device == "cpu")
    return TOLERANCE if exact and not torch.is_autocast_enabled(device) else LOOSE_TOLERANCE


def _short(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"
