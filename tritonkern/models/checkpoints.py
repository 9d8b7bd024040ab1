"""Reading of weight files, and loading that says exactly what does not fit."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritonkern._optional import how_to_install

# Where training frameworks put the weights among the other things of a checkpoint.
_WRAPPERS = ("state_dict", "model", "teacher")
_LISTED = 8


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file, a plain PyTorch state dict, or a checkpoint that wraps one.

    Nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: a .safetensors file, and the package safetensors is not installed.
        ValueError: the file is damaged, holds Python objects that PyTorch does not load safely, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    state = read_pytorch(path)
    for wrapper in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict: a mapping from parameter names to tensors is needed")
    return dict(state)


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
                raise ValueError(f"{path} is not a readable PyTorch file; was the download cut short?") from error
            raise ValueError(
                f"{path} holds Python objects beside its tensors, which only running its code could load. If you trust "
                "its origin, write its tensors out once: "
                "torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pth')"
            ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs the package {error.name}: {how_to_install('track')}", name=error.name
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads `state` into `model`, in float32, if keys and shapes agree exactly.

    Raises:
        ValueError: they do not; the message names `source` and lists what is missing, unexpected or of another shape.
    """
    expected = model.state_dict()
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} {list(state[key].shape)} (needs {list(value.shape)})"
            for key, value in expected.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    found = [f"{len(keys)} {kind}: {_shortened(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{source} does not fit {type(model).__name__}: {'; '.join(found)}")
    # Whatever the default dtype is, and the dtype that the file was compressed to.
    model.float().load_state_dict(state)


def _shortened(keys: list[str]) -> str:
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more
