"""DiTracker with unusual input, under autocast, and with points beside the queries."""

import math

import pytest
import torch
from test_ditracker import SIZE, Shrinking, inputs, small_head

from tritonkern.models import DiTracker


def tracker(**options):
    torch.manual_seed(0)
    return DiTracker(Shrinking(), small_head(), iterations=2, **options).eval()


@pytest.mark.parametrize(
    "query, message",
    [
        ([float("nan"), 1, 1], "queries must be finite"),
        ([0, float("inf"), 1], "queries must be finite"),
        ([-1, 1, 1], "queries must have t from 0 to 2, got -1"),
        ([3, 1, 1], "queries must have t from 0 to 2, got 3"),
    ],
    ids=str,
)
def test_queries_without_a_place(query, message):
    queries = torch.tensor([[[0.0, 1, 1], query]])
    key, other, video, _ = inputs()
    with pytest.raises(ValueError, match=message):
        small_head()(key, other, video, queries)
    with pytest.raises(ValueError, match=message):
        tracker()(video, queries)


@torch.no_grad()
def test_queries_outside_the_frame_read_its_border():
    query, key, video, queries = inputs()
    queries[0, 0, 1:] = torch.tensor([-1e4, 1e4])
    assert small_head()(query, key, video, queries, iterations=2).tracks.isfinite().all()


@torch.no_grad()
def test_a_map_that_is_not_finite():
    """Attention joins all frames of a point and all points of a clip, so that these are lost, and no other clip."""
    query, key, video, queries = inputs(batch=2)
    clean = small_head()(query, key, video, queries, iterations=2)
    key[1, 2] = torch.nan
    output = small_head()(query, key, video, queries, iterations=2)
    torch.testing.assert_close(output.tracks[0], clean.tracks[0], atol=1e-4, rtol=1e-4)
    assert all(x[1].isnan().all() for x in output)


@torch.no_grad()
def test_autocast():
    head, given = small_head(), inputs()
    head.updateformer.flow_head.weight.div_(100)
    exact = head(*given, iterations=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(*given, iterations=2)
    assert found.tracks.dtype == torch.float32
    assert 0 < (found.tracks - exact.tracks).abs().max() < 0.5
    assert 0 < (found.occlusion - exact.occlusion).abs().max() < 0.1


@torch.no_grad()
def test_points_beside_the_queries():
    """A grid of the first frame goes along, and its tracks are dropped."""
    _, _, video, queries = inputs()
    plain, helped = tracker(), tracker(support=5)
    maps = plain.encode(video)
    h, w = SIZE
    y, x = (torch.linspace(w / 64, side - w / 64, 5) + 0.5 for side in (h, w))
    grid = torch.cartesian_prod(torch.zeros(1), y, x)[None]
    found, expected = helped.track(maps, queries), plain.track(maps, torch.cat([queries, grid], 1))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs[:, :4])
    assert (found.tracks - plain.track(maps, queries).tracks).abs().max() > 1e-3
    assert helped.track(maps, queries[:, :0]).tracks.shape == (1, 0, 3, 2)


@torch.no_grad()
def test_another_threshold():
    """Confidence stays in order, and is 0.5 where the product of visibility and confidence is the threshold."""
    _, _, video, queries = inputs(points=30)
    plain, other = tracker(), tracker()
    for model in (plain, other):
        model.head.updateformer.vis_conf_head.weight.mul_(100)
    maps = plain.encode(video)
    product = plain.track(maps, queries).confidence
    other.threshold = float((product.min() + product.max()) / 2)
    found = other.track(maps, queries)
    assert torch.equal(found.visible, product >= other.threshold) and 0 < found.visible.float().mean() < 1
    expected = torch.sigmoid(torch.logit(product.double()) - math.log(other.threshold / (1 - other.threshold)))
    torch.testing.assert_close(found.confidence, expected.float(), atol=1e-4, rtol=0)


def test_wrong_options():
    for options, message in (
        (dict(support=-1), "support must be 0 or more, got -1"),
        (dict(threshold=1.0), "threshold must be between 0 and 1, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            tracker(**options)
