"""Query shapes of real models, `[B, T, H, D]`, each with where it comes from."""

from typing import NamedTuple


class WindowShape(NamedTuple):
    """A call of temporal window attention."""

    name: str
    query: tuple[int, int, int, int]
    source: str


WINDOW = 13  # Chrono's, models/locotrack_model.py: six frames on each side

TEMPORAL_WINDOW_ATTENTION = [
    WindowShape("chrono", (256, 24, 4, 32), "Chrono adapter: 16 x 16 positions, Kubric clips of 24 frames"),
    WindowShape("rgb-stacking", (256, 250, 4, 32), "Chrono on a TAP-Vid RGB-Stacking clip of 250 frames"),
    WindowShape("wide", (1024, 48, 8, 64), "32 x 32 positions of a ViT-B wide adapter (512 = 8 x 64), 48 frames"),
    WindowShape("long", (64, 2000, 4, 64), "a clip of 2000 frames (80 s at 25 frames/s), 8 x 8 positions"),
]

# Large enough to show the bandwidth of a data-centre GPU.
TEMPORAL_WINDOW_ATTENTION_GPU = WindowShape("gpu", (4096, 64, 8, 64), "64 x 64 positions, 64 frames")

# [B, T, N, H, D]: a video in memory order, which peers must first permute and copy.
TEMPORAL_WINDOW_VIDEO = (1, 24, 256, 4, 32)


class MatchingShape(NamedTuple):
    """A call of the correlation with soft-argmax."""

    name: str
    queries: int
    frames: int
    grid: tuple[int, int]
    channels: int
    source: str

    @property
    def size(self) -> tuple[int, ...]:
        return (self.queries, self.frames, *self.grid, self.channels)


CORRELATION_SOFT_ARGMAX = [
    MatchingShape("chrono-s", 64, 24, (64, 64), 384, "Chrono ViT-S, its default chunk of queries, Kubric clips"),
    MatchingShape("chrono-b", 256, 24, (64, 64), 768, "Chrono ViT-B, a training batch of 256 queries"),
]

# Large enough to show the matrix rate of a data-centre GPU.
CORRELATION_SOFT_ARGMAX_GPU = MatchingShape("gpu", 1024, 24, (64, 64), 768, "Chrono ViT-B, 1024 queries")

# Of LocoTrack (64 x 64, models/locotrack_model.py) behind its convolution; `channels` means nothing here.
SOFT_ARGMAX_2D = MatchingShape("locotrack", 256, 24, (64, 64), 0, "LocoTrack's cost volume, 256 queries")


class TrackShape(NamedTuple):
    """A call of track attention."""

    name: str
    frames: int
    tracks: int
    grid: tuple[int, int]
    heads: int
    head_dim: int
    source: str

    @property
    def size(self) -> tuple[int, ...]:
        return (self.frames, self.tracks, *self.grid, self.heads, self.head_dim)


TRACK_ATTENTION = [
    TrackShape("vit-b", 24, 576, (37, 37), 12, 64, "Tracktention: 576 tracks, ViT-B/14 at 518 x 518, 24 frames"),
    TrackShape("conv", 24, 576, (64, 64), 8, 32, "Tracktention on a ConvNet's stage of 64 x 64 cells, C 256"),
]

# Weights and bias of the eager form would take more than 9 GB a direction.
TRACK_ATTENTION_DENSE = TrackShape("dense", 1, 4096, (64, 64), 8, 32, "a track a cell, 64 x 64 cells")
