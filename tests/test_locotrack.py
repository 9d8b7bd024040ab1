"""LocoTrackRefiner: the official model's results from its state dict, and other trackers' tracks refined."""

import copy

import pytest
import torch
import torch.nn.functional as F
from official import needs_official, official  # noqa: F401
from torch import nn

from tritonkern.models import (
    Chrono,
    ChronoLocoTrack,
    LocoTrackFeatures,
    LocoTrackRefiner,
    TrackerOutput,
    build_model,
    locotrack,
)
from tritonkern.models.dinov2 import DINOv2Config
from tritonkern.nn import _locotrack


def clip(frames=3, queries=5):
    video = torch.rand(1, frames, 256, 256, 3) * 2 - 1
    times = torch.arange(queries) % frames
    return video, torch.cat([times[None, :, None].float(), torch.rand(1, queries, 2) * 256], -1)


def start(frames=3, queries=5):
    return TrackerOutput(torch.rand(1, queries, frames, 2) * 256, *torch.randn(2, 1, queries, frames))


@pytest.fixture(scope="module")
def refiner():
    torch.manual_seed(0)
    return LocoTrackRefiner("small").eval()


@pytest.mark.slow
@torch.no_grad()
def test_refines_what_it_is_given(refiner):
    video, queries = clip()
    given = start()
    refined = refiner(video, queries, given)
    assert 1e-3 < (refined.tracks - given.tracks).abs().max() < 50
    assert not torch.equal(refined.occlusion, given.occlusion)
    # From its own features, or the same ones computed before
    features = refiner.features(video)
    for again in (refiner.refine(features, queries, given), refiner.refine(tuple(features), queries, given)):
        assert torch.equal(again.tracks, refined.tracks)
    assert torch.equal(refiner.refine(list(features), queries).tracks, refiner(video, queries).tracks)
    # The last two of four steps start where the first two end.
    short = LocoTrackRefiner("small", steps=2)
    short.load_state_dict(refiner.state_dict())
    halfway = short(video, queries, given)
    torch.testing.assert_close(short(video, queries, halfway).tracks, refined.tracks, atol=1e-4, rtol=0)


@torch.no_grad()
def test_hooks_of_the_parts_run_where_features_and_refine_are_called(refiner):
    """As users call them, and not through the module itself."""
    model, ran = copy.deepcopy(refiner), set()
    model.steps = 1
    parts = {
        name: part
        for name, part in model.named_modules()
        if name and not isinstance(part, nn.ModuleList | nn.ModuleDict)
    }
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: ran.add(name))
    video, queries = clip()
    model.refine(model.features(video[:, :, :64, :64]), queries)
    assert ran == set(parts)


@torch.no_grad()
def test_queries_are_independent_and_empty_ones_allowed(refiner):
    video, queries = clip()
    together = refiner(video, queries)
    alone = refiner(video, queries[:, 2:3])
    torch.testing.assert_close(alone.tracks, together.tracks[:, 2:3], atol=1e-3, rtol=0)
    assert refiner(video, queries[:, :0]).tracks.shape == (1, 0, 3, 2)


def test_gradients_reach_every_parameter():
    model = LocoTrackRefiner("base", steps=1)
    video, queries = clip(frames=2, queries=2)
    features = model.features(video)
    match = model.refine(features, queries)
    sum(x.square().mean() for x in match).backward()
    # As in the official code a step's gradient ends at its guess: the first match needs a loss of its own.
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert silent == {"cost_conv.weight", "cost_conv.bias", "occ_linear.weight", "occ_linear.bias"}


def maps(channels=(6, 10, 4), cells=((12, 16), (5, 8), (20, 20)), frames=3):
    return [F.normalize(torch.randn(1, frames, *size, c), dim=-1) for size, c in zip(cells, channels, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("given", [start(), None], ids=["start", "match"])
def test_channels_do_not_matter(refiner, given):
    """Maps of any sizes; channels of zeros, and channels in another order, change no correlation."""
    _, queries = clip()
    features = maps()
    expected = refiner.refine(features, queries, given)
    wider = [F.pad(grid, (0, more)).flip(-1) for grid, more in zip(features, (1, 30, 7), strict=True)]
    actual = refiner.refine(wider, queries, given)
    for result, value in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, value, atol=1e-4, rtol=0)
    other = refiner.refine(maps(), queries, given)
    assert (other.tracks - expected.tracks).abs().max() > 1e-2


def directions(cells):
    """A map `[1, 1, cells, cells, 4]` that says where it is: the angles of two unit vectors grow with x and y."""
    place = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells * 2
    x, y = place.expand(cells, -1), place[:, None].expand(-1, cells)
    return torch.stack([x.cos(), x.sin(), y.cos(), y.sin()], -1)[None, None] / 2**0.5


@pytest.mark.parametrize("cells", [32, 64, 128])
def test_maps_made_of_one_lie_where_it_lies(refiner, cells):
    features = LocoTrackFeatures.of(3 * directions(cells))
    # Seven steps of a coarse cell stay away from the border
    places = 40 + torch.rand(1, 20, 2, dtype=torch.float64) * 176
    queries = torch.cat([torch.zeros(1, 20, 1), places], -1)
    for grid, size in zip(features, (64, 32, 128), strict=True):
        assert grid.shape == (1, 1, size, size, 4)
        torch.testing.assert_close(grid.norm(dim=-1), torch.ones(1, 1, size, size, dtype=torch.float64))
        # [B, N, 7, 7] (y, x)
        cx, sx, cy, sy = refiner._supports(grid, queries).unbind(-1)
        steps = torch.arange(-3, 4) * (256 / size)
        expected_y, expected_x = places[..., 0, None, None] + steps[:, None], places[..., 1, None, None] + steps
        for sine, cosine, expected in ((sy, cy, expected_y), (sx, cx, expected_x)):
            found = torch.atan2(sine, cosine) * 128
            torch.testing.assert_close(found, expected.expand_as(found), atol=0.02, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("level", "tolerance"), [("fine", 0.1), ("coarse", 1)])
def test_positions_matched_on_another_networks_map(level, tolerance):
    """A pattern that moves by whole cells of a 64 x 64 map is found where it went, in pixels of the raster.

    Half a cell is two pixels of the fine map, and four of the coarse one, whose interpolated peak is blunt.
    """
    refiner = LocoTrackRefiner("small", steps=0)
    refiner.cost_conv.weight.zero_()[0, 1 if level == "fine" else 0, 1, 1] = 1
    refiner.cost_conv.bias.zero_()
    # For the map of half the resolution cells of twice the size, so that it knows them apart
    size = 1 if level == "fine" else 2
    pattern = F.normalize(torch.randn(1, 1, 64 // size, 64 // size, 96), dim=-1)
    pattern = pattern.repeat_interleave(size, 2).repeat_interleave(size, 3)
    moves = torch.tensor([[0, 0], [4, -6], [-2, 8]])  # (x, y)
    grid = torch.cat([pattern.roll((int(y), int(x)), (2, 3)) for x, y in moves], 1)
    # Centres of cells well inside: the picture does not wrap around.
    cells = torch.randint(10, 54, (1, 12, 2)) // size
    queries = torch.cat([torch.zeros(1, 12, 1), (cells + 0.5) * 4 * size], -1)
    tracks = refiner.refine(LocoTrackFeatures.of(grid), queries).tracks
    expected = queries[..., 1:].flip(-1)[:, :, None] + moves * 4.0
    torch.testing.assert_close(tracks, expected, atol=tolerance, rtol=0)


def test_refines_on_features_of_chrono(monkeypatch):
    monkeypatch.setattr(Chrono, "cells", 8)
    chrono = Chrono(DINOv2Config(dim=64, depth=2, num_heads=1), hidden=32)
    refiner = LocoTrackRefiner("small", steps=2)
    video, queries = clip(frames=2, queries=3)
    grid = chrono.features(video)
    given = chrono.track(grid, queries)
    better = refiner.refine(LocoTrackFeatures.of(grid), queries, given)
    assert better.tracks.shape == (1, 3, 2, 2)
    assert 0 < (better.tracks - given.tracks).abs().max() < 50
    sum(x.square().mean() for x in better).backward()
    own = ("cost_conv.", "occ_linear.", "resnet_torch.")
    for name, parameter in refiner.named_parameters():
        assert (parameter.grad is None) == name.startswith(own), name
        assert parameter.grad is None or parameter.grad.isfinite().all()
    assert refiner.cmdtop[2].conv[0][0].weight.grad.abs().max() > 0
    # Through the features alone, as a step's gradient ends at its guess
    assert chrono.dino.norm.weight.grad.abs().max() > 0


@torch.no_grad()
def test_behind_chrono_as_one_tracker(monkeypatch):
    monkeypatch.setattr(Chrono, "cells", 8)
    monkeypatch.setattr(locotrack, "_POSITIONS", 4)  # two points at a time
    chrono = Chrono(DINOv2Config(dim=64, depth=2, num_heads=1), hidden=32).eval()
    refiner = LocoTrackRefiner("small", steps=2).eval()
    video, queries = clip(frames=2, queries=3)
    expected = refiner(video, queries, chrono(video, queries))
    actual = ChronoLocoTrack(chrono, refiner)(video, queries)
    for result, value in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, value, atol=1e-3, rtol=0)


def test_by_name(tmp_path):
    model = LocoTrackRefiner("small")
    torch.save(model.state_dict(), tmp_path / "locotrack_small.ckpt")
    loaded = build_model("locotrack-small", tmp_path / "locotrack_small.ckpt")
    assert not loaded.training and torch.equal(loaded.cost_conv.weight, model.cost_conv.weight)
    with pytest.raises(ValueError, match="does not fit LocoTrackRefiner"):
        build_model("locotrack-base", tmp_path / "locotrack_small.ckpt")
    with pytest.raises(ValueError, match=r"chrono-locotrack needs 2 file\(s\), got 1: a Chrono .* and a LocoTrack"):
        build_model("chrono-locotrack", tmp_path / "locotrack_small.ckpt")
    with pytest.raises(FileNotFoundError, match="absent.ckpt"):
        build_model("chrono-locotrack", [tmp_path / "absent.ckpt", tmp_path / "locotrack_small.ckpt"])


@pytest.mark.parametrize("size", ["base", "small"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_checkpoints_of_both_sizes(tmp_path, size, prefix):
    model = LocoTrackRefiner(size)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "locotrack.ckpt")
    loaded = LocoTrackRefiner.from_checkpoint(tmp_path / "locotrack.ckpt")
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    del state[prefix + "cost_conv.bias"]
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match="cost_conv.bias"):
        LocoTrackRefiner.from_checkpoint(tmp_path / "damaged.pth")


def test_errors(refiner):
    video, queries = clip()
    with pytest.raises(ValueError, match="size must be one of base, small"):
        LocoTrackRefiner("large")
    with pytest.raises(ValueError, match=r"video must be \[B, T, 256, 256, 3\]"):
        refiner(video[:, :, :128], queries)
    with pytest.raises(ValueError, match=r"queries must be \[1, N, 3\]"):
        refiner(video, queries[..., :2])
    with pytest.raises(ValueError, match=r"start.tracks must be \[1, 5, 3, 2\]"):
        refiner(video, queries, start(frames=2))
    with pytest.raises(TypeError, match="video must be floating point"):
        refiner(video.int(), queries)
    with pytest.raises(TypeError, match="queries must be floating point"):
        refiner.refine(maps(), queries.int())


def test_errors_of_features(refiner):
    _, queries = clip()
    features = maps()
    with pytest.raises(TypeError, match=r"got one tensor; use LocoTrackFeatures.of\(features\)"):
        refiner.refine(features[0], queries)
    with pytest.raises(ValueError, match=r"features must be 3 maps \[B, T, h, w, C\], got 2"):
        refiner.refine(features[:2], queries, start())
    with pytest.raises(ValueError, match=r"features\[1\] must be \[B, T, h, w, C\] with at least one"):
        refiner.refine([features[0], features[1][0], features[2]], queries, start())
    with pytest.raises(ValueError, match=r"features\[0\] must be .* got \[1, 3, 12, 16, 0\]"):
        refiner.refine([features[0][..., :0], *features[1:]], queries, start())
    with pytest.raises(TypeError, match="grid must be floating point, got list"):
        LocoTrackFeatures.of([1, 2])
    with pytest.raises(TypeError, match=r"features\[2\] must be floating point, got torch.int32"):
        refiner.refine([*features[:2], features[2].int()], queries, start())
    with pytest.raises(ValueError, match=r"features\[2\] must have B and T of features\[0\], \[1, 3\], got \[1, 2\]"):
        refiner.refine([*features[:2], features[2][:, :2]], queries, start())
    with pytest.raises(ValueError, match=r"queries must be \[1, N, 3\]"):
        refiner.refine(features, queries.expand(2, -1, -1), start())
    with pytest.raises(ValueError, match=r"start.tracks must be \[1, 5, 3, 2\]"):
        refiner.refine(features, queries, start(frames=2))
    with pytest.raises(ValueError, match=r"features\[1\] must be the coarser map.* \[5, 8\], got \[12, 16\]"):
        refiner.refine([features[1], features[0], features[2]], queries)
    with pytest.raises(ValueError, match=r"grid must be \[B, T, h, w, C\]"):
        LocoTrackFeatures.of(features[0][0])


@needs_official
@pytest.mark.slow
@pytest.mark.parametrize("size", ["base", "small"])
@torch.no_grad()
def test_official(official, size):  # noqa: F811
    torch.manual_seed(0)
    theirs = official("locotrack/locotrack_pytorch", "models.locotrack_model").LocoTrack(model_size=size).eval()
    ours = LocoTrackRefiner(size).eval()
    ours.load_state_dict(theirs.state_dict())
    video, queries = clip(queries=20)
    expected, actual = theirs(video, queries), ours(video, queries)
    difference = (actual.tracks - expected["tracks"]).abs().max().item()
    print(f"tracks differ by at most {difference:.1e} pixels")
    assert difference < 1e-3
    # Logits: no farther from float64 than twice the official code's own float32
    exact = ours.double()(video.double(), queries.double())
    for logits, theirs_, oracle in (
        (actual.occlusion, expected["occlusion"], exact.occlusion),
        (actual.expected_distance, expected["expected_dist"], exact.expected_distance),
    ):
        error, own_error = ((x - oracle).abs().max().item() for x in (logits, theirs_))
        print(f"logits: error {error:.1e}, the official code's own {own_error:.1e}")
        assert error <= 2 * own_error + torch.finfo(torch.float32).eps * oracle.abs().max().item()


def test_match_does_not_depend_on_how_many_queries_are_taken_at_a_time(monkeypatch):
    coarse, fine = torch.randn(2, 3, 4, 5, 8).double(), torch.randn(2, 3, 8, 10, 6).double()
    query, fine_query = torch.randn(2, 7, 8).double().requires_grad_(), torch.randn(2, 7, 6).double()
    queries = torch.rand(2, 7, 3) * torch.tensor([2.0, 32, 40])
    layers = _locotrack.SameConv2d(2, 1, 3).double(), nn.Linear(6, 2).double()
    results = []
    for limit in (1 << 30, 3 * 2 * 2 * 3 * 8 * 10 * 8):  # all of them, three at a time
        monkeypatch.setitem(_locotrack._MATCH_BYTES, "cpu", limit)
        output, cost = _locotrack.match_two_maps(query, coarse, *layers, 20.0, (32, 40), fine_query, fine, queries)
        (gradient,) = torch.autograd.grad(output.tracks.sum() + output.occlusion.sum(), query)
        results.append((*output, cost, gradient))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)
