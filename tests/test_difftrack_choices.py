"""Tracks by the published formula, written out densely; every choice in it moves points by more than 0.1 px."""

import pytest
import torch
import torch.nn.functional as F

from tritonkern.models import DiffTrack, Preset

FRAMES, ROWS, COLUMNS, HEADS, DIM, SIZE = 4, 6, 9, 3, 16, 16
RASTER = ROWS * SIZE, COLUMNS * SIZE


class Stored:
    """In place of a transformer: two samples of queries and keys, of which the first one is tracked."""

    text_dim, num_heads, transformer_blocks = 4, HEADS, [None]

    def __init__(self):
        cells = torch.randn(2, ROWS, COLUMNS, HEADS, DIM)
        moved = torch.stack([cells.roll((t, 2 * t), (1, 2)) for t in range(FRAMES)], 1).flatten(2, 3)
        self.query, self.key = (moved + 0.8 * torch.randn_like(moved) for _ in range(2))

    def grid(self, latents):
        return ROWS, COLUMNS

    def query_key(self, latents, text, timestep, layers, heads=None):
        return [(self.query[:1], self.key[:1])]


def dense(stored, places, choice=None):
    """`[N, T, 2]`; `choice` names one departure from the published formula."""
    sample = 1 if choice == "other half of the batch" else 0
    query, key = stored.query[sample], stored.key[sample]
    scale = DIM**-0.5 if choice == "scale by channels" else HEADS**-0.5
    heads = (0, 1) if choice == "heads averaged before the softmax" else ()
    tracks = [places]
    for t in range(1, FRAMES):
        there = torch.einsum("shd,thd->hst", query[0], key[t]) * scale
        back = torch.einsum("thd,shd->hst", query[t], key[0]) * scale
        if heads:
            there, back = there.mean(0, keepdim=True), back.mean(0, keepdim=True)
        axes = (1, 2) if choice == "other axis of the softmax" else (2, 1)
        cost = there.softmax(axes[0]).mean(0)
        if choice != "one direction":
            cost = (cost + back.softmax(axes[1]).mean(0)) / 2
        best = cost.argmax(1)
        targets = torch.stack([best % COLUMNS, best // COLUMNS]).float().view(1, 2, ROWS, COLUMNS)
        margin = COLUMNS / 64
        limits = torch.tensor([COLUMNS - margin, ROWS - margin])
        padding = "border" if choice == "border instead of zeros" else "zeros"
        grid = (2 * places / SIZE / limits - 1)[None, None]
        tracks.append(SIZE * F.grid_sample(targets, grid, padding_mode=padding, align_corners=True)[0, :, 0].T)
    return torch.stack(tracks, 1)


@pytest.fixture
def case():
    torch.manual_seed(2)
    stored = Stored()
    return stored, torch.rand(60, 2) * torch.tensor([RASTER[1], RASTER[0]])


def tracks(stored, places, **options):
    published = dict(border="zeros", visibility="all", preset=Preset((0,), (19.0,), HEADS**-0.5, FRAMES))
    model = DiffTrack(stored, resolution=RASTER, **(published | options))
    queries = torch.cat([torch.zeros(len(places), 1), places.flip(-1)], -1)[None]
    return model.track(torch.zeros(1, FRAMES, 1, 1, 1), queries).tracks[0]


def test_as_the_dense_form(case):
    torch.testing.assert_close(tracks(*case), dense(*case), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "choice",
    [
        "one direction",
        "scale by channels",
        "heads averaged before the softmax",
        "other half of the batch",
        "other axis of the softmax",
        "border instead of zeros",
    ],
)
def test_every_choice_shows(case, choice):
    assert (dense(*case, choice) - dense(*case)).norm(dim=-1).max() > 0.1
