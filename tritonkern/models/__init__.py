"""Reference models: DINOv2, depth on it, Chrono, chrono-nano with weights, LocoTrack; Tracktention for any of them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path

from tritonkern.models.chrono import Chrono
from tritonkern.models.chrono_nano import ChronoNano
from tritonkern.models.depth import DepthModel
from tritonkern.models.dinov2 import DINOv2
from tritonkern.models.locotrack import LocoTrackFeatures, LocoTrackRefiner
from tritonkern.models.matching import MatchingTracker, TrackerOutput
from tritonkern.models.nano import Nano
from tritonkern.models.tracktention import TracktentionModel, insert_tracktention

__all__ = [
    "Chrono",
    "ChronoNano",
    "DINOv2",
    "DepthModel",
    "LocoTrackFeatures",
    "LocoTrackRefiner",
    "MODELS",
    "MatchingTracker",
    "Nano",
    "TrackerOutput",
    "TracktentionModel",
    "build_model",
    "insert_tracktention",
]


def packaged(name: str) -> Path:
    """The file of the weights `name` ("nano", "chrono-nano") that ship with this package."""
    return Path(str(resources.files("tritonkern") / "weights" / f"{name}.safetensors"))


MODELS: dict[str, Callable[[Path | None], MatchingTracker]] = {
    "nano": lambda weights: Nano.from_checkpoint(packaged("nano") if weights is None else weights),
    "chrono-nano": lambda weights: ChronoNano.from_checkpoint(packaged("chrono-nano") if weights is None else weights),
    "chrono-vits14": lambda weights: _official(weights, "vits14"),
    "chrono-vitb14": lambda weights: _official(weights, "vitb14"),
}


def _official(weights: Path | None, variant: str) -> MatchingTracker:
    if weights is None:
        raise ValueError(
            f"weights: chrono-{variant} has no packaged weights; give the path of a Chrono checkpoint (the links stand "
            "in the README of github.com/cvlab-kaist/Chrono), or use model='chrono-nano', which needs none"
        )
    return Chrono.from_checkpoint(weights, variant)


def build_model(name: str, weights: Path | str | None = None) -> MatchingTracker:
    """The tracker `name` in evaluation mode, on the CPU, in float32.

    `weights`: a checkpoint file; "chrono-nano" uses the packaged one if none is given. Raises `ValueError` for an
    unknown name, missing weights, or a checkpoint that does not fit the model, and `FileNotFoundError` if the file
    does not exist.
    """
    if name not in MODELS:
        raise ValueError(f"model: no model is called {name!r}; choose one of {', '.join(MODELS)}")
    path = None if weights is None else Path(weights)
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"weights: {path} does not exist or is not a file")
    return MODELS[name](path).eval()
