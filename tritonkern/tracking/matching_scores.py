"""The metrics of DiffTrack (Nam et al., 2025): accuracy of matches, confidence and attention scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RASTER = (480, 720)
"""(height, width) of the raster in which accuracy is measured."""
DISTANCE = 8.0
"""Pixels of that raster, below which a match is right."""


def harmonic_mean(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Harmonic mean of tables that are each scaled to 0 ... 1; 0 where one of them is 0 or not known."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = [(x - np.nanmin(x)) / (np.nanmax(x) - np.nanmin(x)) for x in tables]
        mean = len(scaled) / sum(1 / x for x in scaled)
    return np.where(np.isfinite(mean), mean, 0.0)


def matching_accuracy(tracks: np.ndarray, points: np.ndarray, visible: np.ndarray, size: tuple[int, int]) -> float:
    """Percent of the visible points that are found within `DISTANCE` pixels of `RASTER`; NaN where none is visible.

    Args:
        tracks, points: `[N, T, 2]` (x, y), found and true, in pixels of a raster of `size` (height, width).
        visible: `[N, T]` bool.
    """
    factor = np.array([RASTER[1] / size[1], RASTER[0] / size[0]])
    hit = (np.linalg.norm((tracks - points) * factor, axis=-1) < DISTANCE) & visible
    return 100 * float(hit.sum()) / float(visible.sum()) if visible.any() else math.nan


def tracks_of_latents(tracks: np.ndarray, frames: int, official: bool = False) -> np.ndarray:
    """Tracks `[N, K, 2]` in the latents of a causal VAE, at every of `frames` frames `[N, frames, 2]`.

    Latent 0 is frame 0, and latent k the r frames that end with frame r k; between the middles of those the position
    is interpolated. `official`: as the published code, which stretches K positions to the frames, and so places latents
    up to 2.7 frames too late.
    """
    count = tracks.shape[1]
    if frames == count:
        return tracks
    ratio = (frames - 1) // (count - 1)
    if official:
        wanted = (np.arange(frames) + 0.5) * count / frames - 0.5
        middle = np.arange(count, dtype=np.float64)
    else:
        wanted = np.arange(frames, dtype=np.float64)
        middle = ratio * np.arange(count) - (ratio - 1) / 2
        middle[0] = 0
    wanted = wanted.clip(middle[0], middle[-1])
    low = np.clip(np.searchsorted(middle, wanted, side="right") - 1, 0, count - 2)
    part = ((wanted - middle[low]) / (middle[low + 1] - middle[low]))[:, None]
    return tracks[:, low] * (1 - part) + tracks[:, low + 1] * part


def attention_scores(
    maximum: np.ndarray, total: np.ndarray, visible: np.ndarray, official: bool = False
) -> list[float]:
    """Confidence and attention scores, each on text, own frame and other frames.

    Args:
        maximum, total: `[N, 1 + K]`, largest weight and sum of the weights of the attention of each point on the text
            and on each of K latents.
        visible: `[N, T]` bool; T = 1 + r (K - 1).
        official: confidence averaged over all points; on other frames, those that are never visible count as 0.
    """
    count = maximum.shape[1] - 2
    # A latent counts where the point is visible in all frames of it.
    seen: np.ndarray = np.all(visible[:, 1:].reshape(len(visible), count, -1), axis=-1)
    first = visible[:, 0]
    cross = (maximum[:, 2:] * seen).sum(1) / np.maximum(seen.sum(1), 1e-8)
    everyone = np.ones_like(first)
    confidence = [(maximum[:, 0], first), (maximum[:, 1], first), (cross, first & seen.any(1))]
    if official:
        confidence = [(values, everyone) for values, _ in confidence]
    attention = [(values, first) for values in (total[:, 0], total[:, 1], total[:, 2:].sum(1))]
    return [float(values[kept].mean()) if kept.any() else math.nan for values, kept in confidence + attention]
