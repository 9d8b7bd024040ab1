"""Reading of weight files, and loading that says exactly what does not fit."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritonkern._optional import how_to_install

# Where training frameworks put the weights among the other contents of a checkpoint.
_WRAPPERS = ("state_dict", "model", "teacher")
# What torch.compile, DistributedDataParallel and training frameworks put before the names of parameters.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LISTED = 8


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file, a plain PyTorch state dict, or a checkpoint that wraps one.

    Nothing in the file is executed. The prefixes `module.`, `_orig_mod.` and `model.` are removed where most names have
    them.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: a .safetensors file, and the package safetensors is not installed.
        ValueError: the file is damaged, holds Python objects that PyTorch does not load safely, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    state: Any = _read_safetensors(path) if path.suffix == ".safetensors" else read_pytorch(path)
    for wrapper in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    needed = "a mapping from parameter names to tensors is needed"
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds no state dict but a {type(state).__name__}: {needed}")
    if not state:
        raise ValueError(f"{path} holds no state dict but an empty mapping: {needed}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} holds no state dict: {name!r} is a {type(value).__name__}; {needed}")
    return _without_prefixes(state, path)


def _without_prefixes(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    result = dict(state)
    while True:
        # Most names, not all, so that a single foreign name is reported by itself.
        prefix = next((p for p in _PREFIXES if 2 * sum(name.startswith(p) for name in result) > len(result)), None)
        if prefix is None:
            return result
        shorter = {name.removeprefix(prefix): value for name, value in result.items()}
        if len(shorter) < len(result):
            twice = next(name for name in result if name.startswith(prefix) and name.removeprefix(prefix) in result)
            raise ValueError(f"{path} holds {twice} as well as {twice.removeprefix(prefix)}: two models in one file?")
        result = shorter


def read_pytorch(path: Path) -> Any:
    """What `torch.save` wrote: tensors, on the CPU, in built-in containers. Nothing in the file is executed.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is damaged, or holds Python objects that PyTorch does not load safely.
    """
    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        # Damaged bytes make torch.load fail with nearly any exception class (KeyError, IndexError, AssertionError).
        except Exception as error:
            if not isinstance(error, pickle.UnpicklingError) or "GLOBAL" not in str(error):
                reason = (str(error) or type(error).__name__).partition("\n")[0][:200]
                raise ValueError(
                    f"{path} is not a readable PyTorch file ({reason}); was the download cut short?"
                ) from error
            raise ValueError(
                f"{path} holds Python objects as well as tensors, which only running its code could load. If you trust "
                "its origin, write its tensors out once: "
                "torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pth')"
            ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import torch as safetensors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs the package {error.name}: {how_to_install('track')}", name=error.name
        ) from error
    try:
        return safetensors.load_file(path)
    # Damaged headers raise several classes besides SafetensorError.
    except Exception as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error or type(error).__name__}") from error


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads `state` into `model`, in float32, if it is exactly a state dict of such a model; else nothing is loaded.

    A model on the meta device gets its memory, on the CPU, after `state` was checked.

    Raises:
        ValueError: keys, shapes or kinds of tensors differ; the message names `source` and lists what is missing,
            unexpected, of another shape, or not a dense floating-point tensor of 16 bits or more.
    """
    expected = model.state_dict()
    both = [key for key in expected if key in state]
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} {list(state[key].shape)} (needs {list(expected[key].shape)})"
            for key in both
            if state[key].shape != expected[key].shape
        ],
        "of another kind": [f"{key} ({kind})" for key in both if (kind := unusable(state[key]))],
    }
    found = [f"{len(keys)} {kind}: {shortened(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{source} does not fit {type(model).__name__}: {'; '.join(found)}")
    if any(value.is_meta for value in expected.values()):
        model.to_empty(device="cpu")
    # Whatever the default dtype is, and the dtype that the file was compressed to.
    model.float().load_state_dict(state)


def unusable(value: Tensor) -> str | None:
    """Why the values of this tensor are not those of a parameter; None if they are."""
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_nested:
        return "sparse, quantised, nested or without data"
    if value.dtype not in _DTYPES:
        return f"{value.dtype}, needs floating point of 16 bits or more"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return "an expanded tensor, with fewer values in the file than it shows"
    return None


def shortened(keys: list[str]) -> str:
    """The first names of a long list, and the number of the others."""
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more
