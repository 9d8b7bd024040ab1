"""Reference models: DINOv2, depth on it, trackers, two of them with weights; Tracktention for any of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from tritonkern.models._streaming import FeatureState, StreamedTracker
from tritonkern.models.chrono import Chrono
from tritonkern.models.chrono_nano import ChronoNano
from tritonkern.models.cogvideox import CogVideoX
from tritonkern.models.depth import DepthModel
from tritonkern.models.difftrack import DiffTrack, Preset, preset_of, schedule
from tritonkern.models.difftrack_nano import DiffTrackNano
from tritonkern.models.dinov2 import DINOv2
from tritonkern.models.ditracker import DiTracker, DiTrackerHead
from tritonkern.models.ditracker_encoder import DiTrackerEncoder
from tritonkern.models.ditracker_nano import DiTrackerNano
from tritonkern.models.ditracker_predictor import DiTrackerPredictor
from tritonkern.models.locotrack import ChronoLocoTrack, LocoTrackFeatures, LocoTrackRefiner
from tritonkern.models.low_rank import (
    add_low_rank,
    attention_targets,
    load_low_rank,
    low_rank_parameters,
    merge_low_rank,
    save_low_rank,
)
from tritonkern.models.matching import MatchingTracker, TrackerOutput
from tritonkern.models.nano import Nano
from tritonkern.models.tapir import TAPIR, TAPIRFeatures
from tritonkern.models.tracker import Tracker
from tritonkern.models.tracktention import TracktentionModel, insert_tracktention

__all__ = [
    "Chrono",
    "ChronoLocoTrack",
    "ChronoNano",
    "CogVideoX",
    "DINOv2",
    "DepthModel",
    "DiTracker",
    "DiTrackerEncoder",
    "DiTrackerHead",
    "DiTrackerNano",
    "DiTrackerPredictor",
    "DiffTrack",
    "DiffTrackNano",
    "FeatureState",
    "LocoTrackFeatures",
    "LocoTrackRefiner",
    "MODELS",
    "MatchingTracker",
    "NamedModel",
    "Nano",
    "Preset",
    "StreamedTracker",
    "TAPIR",
    "TAPIRFeatures",
    "Tracker",
    "TrackerOutput",
    "TracktentionModel",
    "add_low_rank",
    "attention_targets",
    "build_model",
    "insert_tracktention",
    "load_low_rank",
    "low_rank_parameters",
    "merge_low_rank",
    "preset_of",
    "save_low_rank",
    "schedule",
]


def packaged(name: str) -> Path:
    """The file of the weights `name` that ship with this package: "nano", or another one that ends in "-nano"."""
    return Path(str(resources.files("tritonkern") / "weights" / f"{name}.safetensors"))


class NamedModel(NamedTuple):
    """A tracker that `build_model` makes."""

    make: Callable[..., Tracker]
    """Called with one path of a weights file, or two."""
    weights: tuple[str, ...]
    """The official weights files and where they are; nothing where the weights are packaged."""


_CHRONO = "a Chrono checkpoint, linked in the README of github.com/cvlab-kaist/Chrono"
_LOCOTRACK = "a LocoTrack checkpoint, linked in the README of github.com/cvlab-kaist/locotrack"
_TAPNET = "linked in the README of github.com/google-deepmind/tapnet"

MODELS = {
    "nano": NamedModel(Nano.from_checkpoint, ()),
    "chrono-nano": NamedModel(ChronoNano.from_checkpoint, ()),
    "tapir": NamedModel(
        partial(TAPIR.from_checkpoint, extra_convs=False), (f"tapir_checkpoint_panning.pt, {_TAPNET}",)
    ),
    "bootstapir": NamedModel(
        partial(TAPIR.from_checkpoint, extra_convs=True), (f"bootstapir_checkpoint_v2.pt, {_TAPNET}",)
    ),
    "bootstapir-causal": NamedModel(
        partial(TAPIR.from_checkpoint, extra_convs=True, causal=True), (f"causal_bootstapir_checkpoint.pt, {_TAPNET}",)
    ),
    "locotrack-small": NamedModel(partial(LocoTrackRefiner.from_checkpoint, size="small"), (_LOCOTRACK,)),
    "locotrack-base": NamedModel(partial(LocoTrackRefiner.from_checkpoint, size="base"), (_LOCOTRACK,)),
    "chrono-vits14": NamedModel(partial(Chrono.from_checkpoint, variant="vits14"), (_CHRONO,)),
    "chrono-vitb14": NamedModel(partial(Chrono.from_checkpoint, variant="vitb14"), (_CHRONO,)),
    "chrono-locotrack": NamedModel(ChronoLocoTrack.from_checkpoints, (_CHRONO, _LOCOTRACK)),
    "difftrack": NamedModel(
        DiffTrack.from_folder, ("a folder of CogVideoX-2B or -5B or HunyuanVideo, as diffusers writes it",)
    ),
    "difftrack-nano": NamedModel(DiffTrackNano.from_checkpoint, ()),
    "ditracker": NamedModel(
        partial(DiTracker.from_folder, merge=True), ("a folder with model.pth and pytorch_lora_weights.safetensors",)
    ),
    "ditracker-nano": NamedModel(DiTrackerNano.from_checkpoint, ()),
}


def build_model(name: str, weights: Path | str | Sequence[Path | str] | None = None) -> Tracker:
    """The tracker `name` in evaluation mode, on the CPU, in float32.

    Args:
        name: a key of `MODELS`.
        weights: the path of the weights file, or of the folder of "difftrack" and "ditracker"; "chrono-locotrack" needs
            two, in this order. None takes the packaged weights of the models whose names end in "nano".

    Raises:
        ValueError: unknown name, missing weights, or a file that does not fit the model.
        FileNotFoundError: a file does not exist.
    """
    if name not in MODELS:
        raise ValueError(f"model: no model is called {name!r}; choose one of {', '.join(MODELS)}")
    make, files = MODELS[name]
    if weights is None:
        if files:
            raise ValueError(
                f"weights: {name} has no packaged weights; give the path of {' and that of '.join(files)}, or use "
                "model='nano', which needs none"
            )
        weights = packaged(name)
    paths = [Path(path) for path in ([weights] if isinstance(weights, (str, Path)) else weights)]
    if len(paths) != max(1, len(files)):
        wanted = f": {' and '.join(files)}" if files else ""
        raise ValueError(f"weights: {name} needs {max(1, len(files))} file(s), got {len(paths)}{wanted}")
    for path in paths:
        kind, there = ("folder", path.is_dir()) if name in ("difftrack", "ditracker") else ("file", path.is_file())
        if not there:
            raise FileNotFoundError(f"weights: {path} does not exist or is not a {kind}")
    return make(*paths).eval()
