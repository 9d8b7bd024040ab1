"""Drop-in acceleration of public trackers: `tritonkern.patch(model)` replaces methods of one model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from tritonkern.integrations import (
    _patch,
    _recognise,
    alltracker,
    chrono,
    cotracker,
    ditracker,
    locotrack,
    tapir,
    tapnext,
)
from tritonkern.integrations._patch import Patch
from tritonkern.integrations._precision import Precision

REPOSITORIES: Mapping[str, Any] = MappingProxyType(
    {
        "aharley/alltracker": alltracker,
        "cvlab-kaist/Chrono": chrono,
        "cvlab-kaist/DiTracker": ditracker,
        "cvlab-kaist/locotrack": locotrack,
        "facebookresearch/co-tracker (CoTracker3)": cotracker,
        "google-deepmind/tapnet (TAPIR)": tapir,
        "google-deepmind/tapnet (TAPNext)": tapnext,
    }
)
"""The models that `patch` recognises, each with the file that has its parts and replacements; the first one counts."""


def patch(model: Any, precision: str = "float32", *, verify: bool = True, stream: bool = False) -> Patch:
    """Make a public tracker's model faster in place; its weights, state dict and results stay what they are.

    Recognised by structure, also inside wrappers such as a Lightning module:

    - AllTracker (aharley/alltracker, commit c1ed462); see `tritonkern.integrations.alltracker`;
    - Chrono (cvlab-kaist/Chrono, commit 153b2f2); see `tritonkern.integrations.chrono`;
    - DiTracker (cvlab-kaist/DiTracker, commit 2ed2933); see `tritonkern.integrations.ditracker`;
    - LocoTrack in PyTorch (cvlab-kaist/locotrack, commit 3385a23); see `tritonkern.integrations.locotrack`;
    - CoTracker3, offline and online (facebookresearch/co-tracker, commit 82e02e8), and forks of it such as MV-TAP; see
      `tritonkern.integrations.cotracker`;
    - TAPIR and BootsTAPIR in PyTorch, offline and online (google-deepmind/tapnet, commit c2cbab8); see
      `tritonkern.integrations.tapir`;
    - TAPNext and TAPNext++ in PyTorch (google-deepmind/tapnet, July 2026); see `tritonkern.integrations.tapnext`.

    Methods are replaced on the modules found in `model`, each of which gets a subclass of its own class with the same
    name; its class, Python modules and other models are not changed. A patched model can be trained, moved, copied
    (copies are patched, see `find_patch`), replicated, saved by its state dict and pickled (the file holds the model
    without the patch). A method that the model overrides (in a subclass, or by an attribute of the module) stays in
    force, with a warning. Layers that do more than the official ones, such as those with LoRA, hooks, parametrizations
    or quantised weights, are called, or the model's own method runs.

    Args:
        model: of one of these repositories, or an object that holds one in its attributes.
        precision: of the local correlation (with CoTracker3's linear layer after it), and of nothing else: not of the
            soft-argmax, nor where the model's own code runs instead, as in TAPIR on maps that are not square.

            - ``"float32"``: that of the model; nothing is lost.
            - ``"tf32"``: on NVIDIA GPUs the factors of matrix products are rounded to TF32, 11 significant bits, in the
              forward pass. PyTorch's setting is changed during each such call, for all threads, and restored after it.
              On a CPU nothing changes.
            - ``"bf16"`` or ``"bfloat16"``: features, support, weights, bias and result are rounded to bfloat16, 8
              significant bits; sums are kept in float32, and the model gets the result in its own dtype. Gradients are
              rounded alike. The rounded features are stored beside the model's own for as long as these exist.

            The effect of either on speed and accuracy has not been measured on a GPU or with trained weights.
        verify: whether the first call of each replaced method compares one point in one or two frames with the model's
            own method. Results may differ by 1e-4 of their largest value, and by 3e-2 in 16 bits, under autocast, in
            float32 on GPUs, and with another `precision`. Where they differ by more, the model's own method runs from
            then on, with one warning (`RuntimeWarning`; an error under ``TRITONKERN_STRICT=1``). The cost is stated in
            `docs/integrations.md`.
        stream: of CoTracker3's online model alone: a faster schedule, whose **tracks differ**. A window takes the
            correlation embeddings of the frames that it shares with the last one from there, and does one iteration,
            whatever its caller asks for. A window in which a point is queried, or whose frames are not those of the
            last one, is computed in full, as the first one. With `verify`, the second window is computed by both
            schedules; a warning and the handle's `stream_difference` state how far their tracks are apart.

    Returns:
        A handle that lists what was `replaced` and `kept`, knows its `precision`, and can `restore()` the model.

    Raises:
        TypeError: `model` is no `torch.nn.Module` and holds none.
        ValueError: nothing in `model` is recognised (the error lists the parts that the most similar module lacks), or
            it is patched already; another `precision`, or one other than "float32" for AllTracker, Chrono, DiTracker
            and TAPNext; `stream` without CoTracker3's online model.
    """
    computed = Precision(precision)
    replacements = []
    for prefix, part in _modules(model).items():
        for path, module in part.named_modules(prefix=prefix):
            for repository in REPOSITORIES.values():
                if not _recognise.lacking(module, repository.PARTS):
                    options = {"stream": stream, "verify": verify} if repository is cotracker else {}
                    replacements += repository.replacements(path, module, computed, **options)
                    break  # DiTracker has the parts of CoTracker3, too
    if not replacements:
        raise ValueError(_unknown(model))
    if stream and not any(replacement.method == "init_video_online_processing" for replacement in replacements):
        raise ValueError("stream: only CoTracker3's online model has windows that share frames, and model holds none")
    handle = _patch.install(replacements, computed.name, verify)
    if handle.kept:
        kept = "; ".join(f"{name}, as {reason}" for name, reason in handle.kept.items())
        warnings.warn(f"tritonkern.patch leaves methods in force that the model overrides: {kept}", stacklevel=2)
    return handle


def find_patch(model: Any) -> Patch | None:
    """The handle of a patched model or of a copy of one, whoever patched it; None if nothing in `model` is patched."""
    return _patch.find(module for part in _modules(model).values() for module in part.modules())


def _modules(model: Any) -> dict[str, nn.Module]:
    if isinstance(model, nn.Module):
        return {"": model}
    found = _recognise.modules_of(model)
    if not found:
        holds = ", ".join(sorted(vars(model))) if hasattr(model, "__dict__") else ""
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}, "
            + (f"whose attributes ({holds}) hold none; pass the module that it calls" if holds else "which holds none")
        )
    return found


def _unknown(model: Any) -> str:
    parts = {name: repository.PARTS for name, repository in REPOSITORIES.items()}
    alike = [line for module in _modules(model).values() for line in _recognise.resemblances(module, parts)]
    return (
        f"model holds no tracker that tritonkern knows: neither {type(model).__name__} nor one of its submodules "
        f"is built like the model of {' or '.join(REPOSITORIES)}; "
        + "".join(f"{line}; " for line in alike)
        + "pass the model itself, uncompiled and not wrapped by FSDP; tritonkern's own models need no patch"
    )
