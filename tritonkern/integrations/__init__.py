"""Drop-in speed-ups of other people's trackers: `tritonkern.patch(model)` replaces methods of that one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType, TracebackType
from typing import Any

from torch import nn

from tritonkern.integrations import chrono, cotracker, locotrack, tapir
from tritonkern.integrations._precision import Precision

Replacement = tuple[str, nn.Module, str, Callable[..., Any]]
"""Path of a module inside the model, the module, the method's name, and the function that takes the method's place."""

REPOSITORIES: dict[str, Callable[[nn.Module, Precision], Iterator[Replacement]]] = {
    "cvlab-kaist/Chrono": chrono.replacements,
    "cvlab-kaist/locotrack": locotrack.replacements,
    "facebookresearch/co-tracker (CoTracker3)": cotracker.replacements,
    "google-deepmind/tapnet (TAPIR)": tapir.replacements,
}
"""The models that `patch` recognises, each with the function that finds them, wherever they sit in a given module."""

_MISSING = object()


class Patch:
    """What `tritonkern.patch` did to a model. `restore` undoes it; as a context manager it does so at the end."""

    def __init__(self, replacements: list[Replacement], precision: str) -> None:
        self.precision = precision
        """"float32", "tf32" or "bf16"."""
        self.replaced = [f"{path}.{method}" if path else method for path, _, method, _ in replacements]
        """Dotted names of the replaced methods, such as ``"model.forward_dino"``."""
        self._undo: list[tuple[nn.Module, str, Any]] = []
        for _, module, method, function in replacements:
            self._undo.append((module, method, module.__dict__.get(method, _MISSING)))
            setattr(module, method, MethodType(function, module))

    def restore(self) -> None:
        """Give the model its own methods back. A second call does nothing."""
        while self._undo:
            module, method, before = self._undo.pop()
            if before is _MISSING:
                delattr(module, method)
            else:
                setattr(module, method, before)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        state = ", ".join(self.replaced) if self._undo else "restored"
        return f"<tritonkern.Patch, precision={self.precision}: {state}>"


def patch(model: nn.Module, precision: str = "float32") -> Patch:
    """Make a public tracker's model faster where it stands; its weights, state dict and results stay what they are.

    Recognised by structure, also inside wrappers such as a Lightning module:

    - Chrono (cvlab-kaist/Chrono, commit 153b2f2); see `tritonkern.integrations.chrono`;
    - LocoTrack in PyTorch (cvlab-kaist/locotrack, commit 3385a23); see `tritonkern.integrations.locotrack`;
    - CoTracker3, offline and online (facebookresearch/co-tracker, commit 82e02e8); see
      `tritonkern.integrations.cotracker`;
    - TAPIR and BootsTAPIR in PyTorch, offline and online (google-deepmind/tapnet, commit c2cbab8); see
      `tritonkern.integrations.tapir`.

    Methods are replaced on the instances found in `model`; classes, modules and other models are left alone. A patched
    model can be trained, moved and saved by its state dict; restore it before pickling the module itself.

    Args:
        model: of one of these repositories, or what holds one.
        precision: of the local correlation (with CoTracker3's linear layer after it), and of nothing else: not of the
            soft-argmax, nor where the model's own code runs instead, as in TAPIR on maps that are not square.

            - ``"float32"``: that of the model; nothing is lost.
            - ``"tf32"``: on NVIDIA GPUs the factors of matrix products are rounded to TF32, 11 significant bits, in the
              forward pass. PyTorch's setting is changed during each such call, for all threads, and put back after it.
              On a CPU nothing changes.
            - ``"bf16"`` or ``"bfloat16"``: features, support, weights, bias and result are rounded to bfloat16, 8
              significant bits; sums are kept in float32, and the model gets the result in its own dtype. Gradients are
              rounded alike. The rounded features lie beside the model's own for as long as these live.

            What either gains or loses has been measured on no GPU, and with no trained weights.

    Returns:
        A handle that lists what was `replaced`, knows its `precision`, and can `restore()` the model.

    Raises:
        TypeError: `model` is no `torch.nn.Module`.
        ValueError: nothing in `model` is recognised, or it is patched already; another `precision`, or one other than
            "float32" for Chrono, which has no local correlation and chooses bfloat16 itself.
    """
    computed = Precision(precision)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    replacements = [found for find in REPOSITORIES.values() for found in find(model, computed)]
    if not replacements:
        raise ValueError(
            f"model holds no tracker that tritonkern knows: neither {type(model).__name__} nor one of its submodules "
            f"is built like the model of {' or '.join(REPOSITORIES)}; pass the model itself, uncompiled and not "
            "wrapped by FSDP; tritonkern's own models need no patch"
        )
    for path, module, method, _ in replacements:
        if method in module.__dict__:
            where = f"{path}.{method}" if path else method
            raise ValueError(f"model already has a replaced method, {where}; restore() the earlier patch first")
    return Patch(replacements, computed.name)
