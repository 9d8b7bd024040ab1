"""How models are recognised: by their parts, so that the error can name the parts that a model lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import nn

Part = Callable[[Any], str | None]
"""Something that the module of a tracker must have: None of a module that has it, else what to print."""


def methods(*names: str) -> tuple[Part, ...]:
    def part(name: str) -> Part:
        return lambda module: None if callable(getattr(type(module), name, None)) else f"a method {name}"

    return tuple(map(part, names))


def child(path: str, kind: type[nn.Module] = nn.Module, **attributes: Any) -> Part:
    """The submodule at `path`, of the class `kind`, whose `attributes` have these values (or functions of the module).

    Of a layer that peft wraps, the layer inside is examined.
    """

    def part(module: Any) -> str | None:
        found = module
        for name in path.split("."):
            found = getattr(found, name, None)
        found = getattr(found, "base_layer", found)
        if not isinstance(found, kind):
            what = "a submodule" if kind is nn.Module else f"a {kind.__name__}"
            return f"{what} {path}" + ("" if found is None else f" (it is a {type(found).__name__})")
        for key, value in attributes.items():
            wanted, value = value(module) if callable(value) else value, getattr(found, key, None)
            if value != wanted:
                needs = f"{wanted} inputs" if key == "in_features" else f"{key} {wanted}"
                return f"{path} with {needs} (it has {value})"
        return None

    return part


def value(name: str, *kinds: type) -> Part:
    """The attribute `name`, of one of these types."""

    def part(module: Any) -> str | None:
        found = getattr(module, name, None)
        if isinstance(found, kinds):
            return None
        return f"an attribute {name} of type {kinds[0].__name__}" + ("" if found is None else f" (it is {found!r})")

    return part


def lacking(module: Any, parts: Iterable[Part]) -> list[str]:
    """The parts that `module` lacks, in words."""
    return [words for part in parts if (words := part(module)) is not None]


def resemblances(model: nn.Module, repositories: Mapping[str, Sequence[Part]]) -> Iterator[str]:
    """For each repository the submodule with most of its model's parts, at least half of them, and what it lacks."""
    for repository, parts in repositories.items():
        candidates = [(lacking(module, parts), path, module) for path, module in model.named_modules()]
        lacks, path, module = min(candidates, key=lambda candidate: len(candidate[0]))
        if 2 * len(lacks) <= len(parts):
            where = f"{path} ({type(module).__name__})" if path else type(module).__name__
            yield f"{where} looks like the model of {repository} but for {', '.join(lacks)}"


def modules_of(holder: Any) -> dict[str, nn.Module]:
    """The modules that an object which is none holds: in its attributes, or in lists and dictionaries of them."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def search(path: str, thing: Any, depth: int) -> None:
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found[path] = thing
        elif depth:
            for name, inner in islice(_contents(thing), 1000):
                search(f"{path}.{name}" if path else name, inner, depth - 1)

    search("", holder, 3)
    return found


def _contents(thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, Mapping):
        yield from ((str(name), inner) for name, inner in thing.items())
    elif isinstance(thing, (list, tuple)):
        yield from ((str(index), inner) for index, inner in enumerate(thing))
    elif hasattr(thing, "__dict__") and not isinstance(thing, type):
        yield from vars(thing).items()
