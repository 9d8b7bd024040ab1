"""Which layers of a video diffusion transformer match points between frames, and at which noise level.

The metrics of DiffTrack (Nam et al., "Emergent Temporal Correspondences from Video Diffusion Transformers", 2025) by
layer and sampling step, on clips with tracks: how often the best match is right, and how much of the attention goes to
the other frames.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tritonkern._optional import how_to_install
from tritonkern.files import atomic_paths
from tritonkern.functional import attention_row_statistics, query_key_matching
from tritonkern.models._cells import Corners
from tritonkern.models.difftrack import DiffTrack
from tritonkern.tracking.matching_scores import attention_scores, harmonic_mean, matching_accuracy, tracks_of_latents
from tritonkern.tracking.predictor import Progress
from tritonkern.tracking.tapvid import TapVidClip

METRICS = (
    "query_key_accuracy",
    "feature_accuracy",
    "confidence_text",
    "confidence_self",
    "confidence_cross",
    "attention_text",
    "attention_self",
    "attention_cross",
)
FILES = ("mean.csv", "clips.csv", "heat-map.png")
SAMPLER_STEPS = 50
STEPS = tuple(range(4, SAMPLER_STEPS, 5))
"""The steps that `analyse` looks at unless others are given."""
# Metrics whose harmonic mean is taken.
_TOGETHER = ("query_key_accuracy", "confidence_cross", "attention_cross")


def timestep_of(step: int) -> int:
    """The timestep of step 0, 1, ..., 49 of a sampler with trailing spacing: 999, 979, ..., 19."""
    return 999 - 1000 // SAMPLER_STEPS * step


@dataclass(frozen=True)
class Analysis:
    """`METRICS` by clip, layer and step: `values` `[clips, layers, steps, metrics]`, NaN where a metric has no data.

    Accuracies are in percent; confidence is the largest attention weight, and attention the sum of the weights, on the
    text, on the frame of the query (self) and on the other frames (cross).
    """

    clips: list[str]
    layers: list[int]
    steps: list[int]
    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Plain means over the clips `[layers, steps, metrics]`; a clip in which a metric is NaN is left out of it."""
        known = ~np.isnan(self.values)
        total = np.where(known, self.values, 0.0).sum(0)
        return np.where(known.any(0), total / np.maximum(known.sum(0), 1), math.nan)

    @property
    def harmonic_mean(self) -> np.ndarray:
        """`[layers, steps]`: of query-key accuracy, cross confidence and cross attention, each scaled to 0 ... 1."""
        return harmonic_mean([self.mean[..., METRICS.index(name)] for name in _TOGETHER])

    def save(self, folder: str | PathLike[str]) -> list[Path]:
        """Writes ``mean.csv``, ``clips.csv`` and ``heat-map.png`` into `folder`, all of them or none."""
        paths = [Path(folder) / name for name in FILES]
        mean, together = self.mean, self.harmonic_mean
        cells = [(i, j) for i in range(len(self.layers)) for j in range(len(self.steps))]

        def place(i: int, j: int) -> list[int]:
            return [self.layers[i], self.steps[j], timestep_of(self.steps[j])]

        with atomic_paths(paths) as parts:
            with open(parts[0], "w", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["layer", "step", "timestep", *METRICS, "harmonic_mean"])
                rows.writerows([*place(*cell), *map(_number, (*mean[cell], together[cell]))] for cell in cells)
            with open(parts[1], "w", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["clip", "layer", "step", "timestep", *METRICS])
                for name, table in zip(self.clips, self.values, strict=True):
                    rows.writerows([name, *place(*cell), *map(_number, table[cell])] for cell in cells)
            self._draw(parts[2])
        return paths

    def _draw(self, path: Path) -> None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"the heat map needs the package {error.name}: {how_to_install('eval')}", name=error.name
            ) from error
        names = ("query_key_accuracy", "feature_accuracy", "confidence_cross", "attention_cross")
        tables = {name.replace("_", " "): self.mean[..., METRICS.index(name)] for name in names}
        tables["harmonic mean"] = self.harmonic_mean
        figure = Figure((4 * len(tables), 1.6 + 0.32 * len(self.layers)), layout="constrained")
        for axis, (title, table) in zip(figure.subplots(1, len(tables)), tables.items(), strict=True):
            shown = axis.imshow(table, aspect="auto", cmap="viridis", vmin=0)
            axis.set(title=title, xlabel="noise: timestep", ylabel="layer")
            axis.set_xticks(range(len(self.steps)), [timestep_of(step) for step in self.steps], rotation=90)
            axis.set_yticks(range(len(self.layers)), self.layers)
            figure.colorbar(shown, ax=axis)
        FigureCanvasAgg(figure).print_png(str(path))


@torch.inference_mode()
def analyse(
    model: DiffTrack,
    clips: Iterable[TapVidClip],
    *,
    layers: Sequence[int] | None = None,
    steps: Sequence[int] = STEPS,
    official: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Analysis:
    """The metrics of a model on clips with tracks.

    A clip is encoded (by a causal VAE all frames together, otherwise as many evenly spaced frames as a pass takes),
    noised to each step by the model's scheduler, and passed through the transformer once per step. Points that are
    visible in the first frame are followed.

    Args:
        model: a CogVideoX with its scheduler.
        clips: with videos of any size; points in pixels of their video.
        layers: numbers of blocks; None for all.
        steps: of the sampler, as `timestep_of` takes them.
        official: repeats the choices of the published code: in the attention rows x and y are exchanged, confidence is
            averaged over points that are not visible too, positions beyond the outermost cells are mixed with zero,
            latents are stretched to frames as in `tracks_of_latents`, and scores are rounded to four decimals.
        seed: of the noise, which differs between clips and steps.
        progress: called as `progress("analysing", clips done, clips in all or None)` after each clip.

    Raises:
        ValueError: no clip, no step, a layer or step that does not exist, a clip of fewer than two frames, or a model
            without a scheduler.
    """
    count = len(model.transformer.transformer_blocks)
    layers, steps = list(range(count) if layers is None else layers), list(steps)
    for name, numbers, limit in (("layers", layers, count), ("steps", steps, SAMPLER_STEPS)):
        if not numbers or not all(0 <= number < limit for number in numbers):
            raise ValueError(f"{name} must be some from 0 to {limit - 1}, got {numbers}")
    if model.scheduler is None:
        raise ValueError("model has no scheduler, by which noise is added: give DiffTrack one")
    total = len(clips) if isinstance(clips, Sized) else None
    names, values = [], []
    for number, clip in enumerate(clips):
        if len(clip.video) < 2:
            raise ValueError(f"clip {clip.name!r} must have two frames or more, got {len(clip.video)}")
        sample = _Sample.of(model, clip, official)
        table = np.full((len(layers), len(steps), len(METRICS)), math.nan)
        for column, step in enumerate(steps if len(sample.places) else ()):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + number) * SAMPLER_STEPS + step)

            def score(
                layer: int, state: _State, column: int = column, table: np.ndarray = table, sample=sample
            ) -> None:
                table[layers.index(layer), column] = _scores(model, sample, state, official)

            _pass(model, sample.latents, timestep_of(step), generator, layers, score)
        names.append(clip.name)
        values.append(table)
        if progress is not None:
            progress("analysing", number + 1, total)
    if not names:
        raise ValueError("clips: there is none")
    return Analysis(names, layers, steps, np.stack(values))


class _State(NamedTuple):
    """What an attention layer computed: of text and video, and before the projection of its output."""

    query: Tensor
    """[1, L + K S, H, D]"""
    key: Tensor
    feature: Tensor
    """[1, L + K S, H D]"""


class _Sample(NamedTuple):
    """A clip as the metrics need it."""

    latents: Tensor
    """[1, K, C, h, w]"""
    places: Tensor
    """[N, 2] (x, y) in the first frame, in pixels of the model's raster."""
    points: np.ndarray
    """[N, T, 2] in these pixels."""
    visible: np.ndarray
    """[N, T]"""

    @classmethod
    def of(cls, model: DiffTrack, clip: TapVidClip, official: bool) -> _Sample:
        latents, frames = model.encode_clip(torch.from_numpy(clip.video[None]).to(model.prompt.device))
        height, width = clip.video.shape[1:3]
        factor = np.array([model.resolution[1] / width, model.resolution[0] / height])
        visible = ~clip.occluded
        # The published code follows all points: those that are not visible count in some of its means.
        chosen = np.isfinite(clip.points[:, 0]).all(-1) if official else visible[:, 0]
        points, visible = clip.points[chosen][:, frames] * factor, visible[chosen][:, frames]
        return cls(latents, torch.from_numpy(points[:, 0]).to(latents), points, visible)


def _pass(
    model: DiffTrack,
    latents: Tensor,
    timestep: int,
    generator: torch.Generator,
    layers: Sequence[int],
    score: Callable[[int, _State], None],
) -> None:
    """One pass of noised latents; `score` is called with the attention of each layer while it runs."""
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    time = torch.tensor([timestep], device=latents.device)
    noised = model.scheduler.add_noise(latents, noise, time)
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def before(layer: int) -> Callable[..., None]:
        def look(attention: Any, args: tuple) -> None:
            seen[layer] = attention.query_key(*args, None)

        return look

    def after(layer: int) -> Callable[..., None]:
        def look(_: Any, args: tuple) -> None:
            score(layer, _State(*seen.pop(layer), args[0]))

        return look

    handles = []
    try:
        for layer in dict.fromkeys(layers):
            attention: Any = model.transformer.transformer_blocks[layer].attn1
            handles.append(attention.register_forward_pre_hook(before(layer)))
            handles.append(attention.to_out[0].register_forward_pre_hook(after(layer)))
        model.transformer(noised, model.prompt.to(latents.dtype), time.to(latents.dtype))
    finally:
        for handle in handles:
            handle.remove()


def _scores(model: DiffTrack, sample: _Sample, state: _State, official: bool) -> list[float]:
    """`METRICS` of one layer."""
    frames, grid = sample.latents.shape[1], model.transformer.grid(sample.latents)
    corners = Corners.of(sample.places, grid, model.resolution, "zeros" if official else "border")
    start = state.query.shape[1] - frames * grid[0] * grid[1]
    query, key, feature = (x[:, start:].unflatten(1, (frames, -1)) for x in state)

    def accuracy(query: Tensor, key: Tensor, symmetric: bool) -> float:
        cells = corners.cells.flatten()[None]
        # The tracker's grid may be finer than that of one pass.
        coarser = grid[0] / model.grid(sample.latents)[0]
        radius = None if official or model.radius is None else model.radius * coarser
        match = query_key_matching(query, key, grid=grid, cells=cells, symmetric=symmetric, radius=radius)
        tracks = corners.blend(match.points[0].unflatten(1, corners.cells.shape).to(sample.places))
        tracks[:, 0] = sample.places
        found = tracks_of_latents(tracks.double().cpu().numpy(), sample.points.shape[1], official)
        return matching_accuracy(found, sample.points, sample.visible, model.resolution)

    # Features have one head; their scale does not change which cell is best.
    feature = feature[..., None, :]
    values = [accuracy(query, key, True), accuracy(feature, feature, False)]
    rows = state.query[:, start + _row_cells(sample.places, grid, corners.size, official)]
    ends = range(start, state.query.shape[1] + 1, grid[0] * grid[1])
    segments = [(0, start), *zip(ends, ends[1:], strict=False)]
    maximum, total = (x[0].double().cpu().numpy() for x in attention_row_statistics(rows, state.key, segments))
    values += attention_scores(maximum, total, sample.visible, official)
    return [round(x, 4) for x in values] if official else values


def _row_cells(places: Tensor, grid: tuple[int, int], size: tuple[float, float], official: bool) -> Tensor:
    """The cell of each point `[N]`."""
    x, y = (places / places.new_tensor(size)).unbind(-1)
    if official:
        # x is taken as the row, y as the column.
        row, column = x.round(), y.round()
    else:
        row, column = y.floor(), x.floor()
    return (row.clamp(0, grid[0] - 1) * grid[1] + column.clamp(0, grid[1] - 1)).long()


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
