"""The head of DiTracker: published names, an independent form of its cost, any maps and clips; the published code."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from official import needs_official, official  # noqa: F401

from tritonkern.models import DiTracker, DiTrackerHead, DiTrackerNano, build_model, packaged
from tritonkern.training import generate_clip
from tritonkern.training.losses import iteration_losses

SIZE = 40, 48


def small_head(**options):
    torch.manual_seed(0)
    sizes = dict(cost_dims=(12, 8), dim=32, num_heads=2, rounds=1, virtual_tracks=3)
    head = DiTrackerHead(SIZE, 16, **{"levels": 3, **sizes, **options}).eval()
    with torch.no_grad():
        head.updateformer.flow_head.weight.mul_(100)
    return head


def inputs(frames=3, points=4, batch=1, channels=8, cells=(5, 6), dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    query, key = (3 * torch.randn(batch, frames, *cells, channels, generator=generator).to(dtype) for _ in range(2))
    video = torch.rand(batch, frames, *SIZE, 3, generator=generator).to(dtype) * 2 - 1
    places = torch.rand(batch, points, 2, generator=generator) * torch.tensor(SIZE)
    times = torch.randint(frames, (batch, points, 1), generator=generator)
    return query, key, video, torch.cat([times, places], -1).to(dtype)


def test_published_names():
    with torch.device("meta"):
        head = DiTrackerHead()
    shapes = {name: tuple(x.shape) for name, x in head.state_dict().items()}
    assert len(shapes) == 188
    parts = {part: sum(p.numel() for p in getattr(head, part).parameters()) / 1e6 for part in head._modules}
    assert parts == pytest.approx({"fnet": 0.66, "corr_mlp": 1.94, "updateformer": 21.73}, abs=0.005)
    assert shapes["updateformer.virual_tracks"] == (1, 64, 1, 384) and shapes["time_emb"] == (1, 60, 1110)
    assert shapes["corr_mlp.fc1.weight"] == (384, 4802) and shapes["corr_mlp.fc2.weight"] == (256, 384)
    assert shapes["fnet.layer2.0.downsample.0.weight"] == (48, 32, 1, 1)
    assert shapes["updateformer.space_point2virtual_blocks.2.cross_attn.to_kv.weight"] == (768, 384)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("cost", ["softmax", "cosine"])
@pytest.mark.parametrize("fuse", ["concat", "add", None])
@torch.no_grad()
def test_the_cost_has_its_formula(fuse, cost, plain):
    """Cell by cell in float64, with two layers and a batch of two; the first axis of a window is x, places sum to 1.

    A first layer with a hook is called, and sees all that it reads.
    """
    head = small_head(fuse=fuse, cost=cost).double()
    query, key, video, queries = inputs(frames=2, points=2, batch=2, dtype=torch.float64)
    layers = [(query, key), (key.flip(-1), query)]
    network = head.network_maps(video)
    evidence = [head._evidence(*pair, queries) for pair in layers]
    if network is not None:
        evidence.append(head._evidence(network, network, queries))
    positions = 12 * torch.rand(2, 2, 2, 2, dtype=torch.float64) - 1
    positions[0, 0, 0] = torch.tensor([-90.0, 1e4])
    seen = []
    if not plain:
        head.corr_mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[-1]))
    for level in range(3):  # 10 x 12, 5 x 6 and 2 x 3 cells
        actual = head._cost(level, evidence, positions)
        for b, t, n in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)):
            own, start = int(queries[b, n, 0]), (queries[b, n, [2, 1]] - 0.5) / 4 / 2**level

            def volume(own_map, map_, normal, b=b, t=t, n=n, own=own, start=start, level=level):
                there = window(pooled(own_map[b, own], level), start)
                here = window(pooled(map_[b, t], level), positions[b, t, n] / 2**level)
                if not normal:
                    return torch.softmax(here @ there.T / there.shape[-1] ** 0.5, 0).flatten()
                return (F.normalize(here, dim=-1) @ F.normalize(there, dim=-1).T).flatten()

            expected = (volume(query, key, False) + volume(key.flip(-1), query, False)) / 2
            if fuse is not None:
                other = volume(network, network, cost == "cosine")
                expected = torch.cat([expected, other]) if fuse == "concat" else (expected + other) / 2
            hidden = F.gelu(head.corr_mlp.fc1.weight @ expected + head.corr_mlp.fc1.bias)
            torch.testing.assert_close(actual[b, t, n], head.corr_mlp.fc2(hidden))
    assert seen == ([] if plain else 3 * [4802 if fuse == "concat" else 2401])


def pooled(image, level):
    """`[h, w, C]` at 10 x 12 cells, then halved."""
    image = F.interpolate(image.movedim(-1, 0)[None], (10, 12), mode="bilinear", align_corners=False)
    for _ in range(level):
        image = F.avg_pool2d(image, 2)
    return image[0].movedim(0, -1)


def window(image, place):
    """49 bilinear samples, one by one."""
    rows, columns = image.shape[:2]
    found = []
    for dx in range(-3, 4):
        for dy in range(-3, 4):
            x = min(max(float(place[0]) + dx, 0.0), columns - 1.0)
            y = min(max(float(place[1]) + dy, 0.0), rows - 1.0)
            left, top = int(x), int(y)
            right, low = min(left + 1, columns - 1), min(top + 1, rows - 1)
            upper = image[top, left] * (1 - x + left) + image[top, right] * (x - left)
            lower = image[low, left] * (1 - x + left) + image[low, right] * (x - left)
            found.append(upper * (1 - y + top) + lower * (y - top))
    return torch.stack(found)


@torch.no_grad()
def test_batches_are_independent_and_maps_serve_any_queries():
    head = small_head()
    query, key, video, queries = inputs(frames=4, batch=2)
    both = head(query, key, video, queries, iterations=2)
    network = head.network_maps(video)
    for b in range(2):
        part = slice(b, b + 1)
        alone = head.refine(query[part], key[part], network[part], queries[part], 2)[-1]
        torch.testing.assert_close(alone.tracks, both.tracks[part], atol=1e-4, rtol=1e-4)
    # One layer given twice is that layer.
    twice = head([query, query], [key, key], video, queries, iterations=2)
    torch.testing.assert_close(twice.tracks, both.tracks, atol=1e-4, rtol=1e-4)
    assert (both.tracks - queries[:, :, None, 1:].flip(-1)).abs().max() > 0.5


@torch.no_grad()
@pytest.mark.parametrize(("frames", "points"), [(1, 2), (2, 1), (3, 0), (65, 1)])
def test_short_long_and_empty(frames, points):
    head = small_head()
    output = head(*inputs(frames, points), iterations=2)
    assert output.tracks.shape == (1, points, frames, 2) and output.tracks.isfinite().all()
    assert output.occlusion.shape == output.expected_distance.shape == (1, points, frames)


def test_positions_are_detached_between_iterations():
    """The bias of the steps, 4 pixels per cell, is added in both iterations, and has the gradient of one addition."""
    head = small_head()
    query, key, video, queries = inputs()
    steps = head.refine(query, key, head.network_maps(video), queries, 2)
    for step in steps:
        (grad,) = torch.autograd.grad(step.tracks.sum(), head.updateformer.flow_head.bias, retain_graph=True)
        torch.testing.assert_close(grad, torch.full((2,), 4.0 * 3 * 4))  # of 3 frames and 4 points


def test_autocast_and_sixteen_bit_maps():
    """Positions stay in float32; gradients reach the maps."""
    head = small_head()
    head.updateformer.flow_head.weight.data.div_(20)
    query, key, video, queries = inputs()
    expected = head(query, key, video, queries, iterations=2).tracks.detach()
    query, key = (x.bfloat16().requires_grad_() for x in (query, key))
    with torch.autocast("cpu", torch.bfloat16):
        output = head(query, key, video, queries, iterations=2)
    assert all(x.dtype == torch.float32 for x in output)
    torch.testing.assert_close(output.tracks, expected, atol=0.05, rtol=0)
    output.tracks.sum().backward()
    assert query.grad.dtype == torch.bfloat16 and query.grad.abs().max() > 0 and key.grad.abs().max() > 0


def test_gradients_reach_all_parameters():
    head = small_head()
    steps = head.refine(*inputs()[:2], head.network_maps(inputs()[2]), inputs()[3], 2)
    sum(x.sum() for x in steps[-1]).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []


def test_wrong_calls():
    query, key, video, queries = inputs()
    head = small_head()
    for given, message in (
        ((query[:, :2], key, video, queries), "query_maps must be"),
        ((query, key[:, :2], video, queries), "must be"),
        ((query[..., :4], key, video, queries), "queries of the shape"),
        (([query], [key, key], video, queries), "same layers"),
        ((query, key, video[:, :, :32], queries), "video must be"),
        ((query, key, video, queries[..., :2]), "queries must be"),
    ):
        with pytest.raises(ValueError, match=message):
            head(*given)
    with pytest.raises(ValueError, match="iterations must be 1"):
        head(query, key, video, queries, iterations=0)
    with pytest.raises(ValueError, match="network_maps must be those of the network, as fuse is 'concat'"):
        head.refine(query, key, None, queries)
    with pytest.raises(ValueError, match="network_maps must be None, as fuse is None"):
        small_head(fuse=None).refine(query, key, head.network_maps(video), queries)
    for options, message in (
        (dict(fuse="sum"), "fuse must be"),
        (dict(cost="dot"), "cost must be"),
        (dict(levels=5), "resolution must be"),
    ):
        with pytest.raises(ValueError, match=message):
            small_head(**options)


class Shrinking(torch.nn.Module):
    """An encoder of fixed projections of patches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(2, 16, 3))

    def forward(self, video):
        cells = F.adaptive_avg_pool2d(video.flatten(0, 1).movedim(-1, 1), (5, 6)).movedim(1, -1)
        return tuple((cells @ weight.T).unflatten(0, video.shape[:2]) for weight in self.weight)


@torch.no_grad()
def test_tracker_in_another_raster(monkeypatch):
    """A raster of twice the size, and many points in groups."""
    torch.manual_seed(0)
    tracker = DiTracker(Shrinking(), small_head(), (80, 96), iterations=2).eval()
    queries, large = inputs(frames=3, points=70)[3], torch.rand(1, 3, 80, 96, 3) * 2 - 1
    video = F.interpolate(large[0].movedim(-1, 1), SIZE, mode="bilinear", antialias=True).movedim(1, -1)[None]
    wide = queries * torch.tensor([1.0, 2, 2])
    maps = tracker.encode(large)
    torch.testing.assert_close(maps[2], tracker.head.network_maps(video), atol=1e-3, rtol=1e-3)
    output = tracker.track(maps, wide)
    few = tracker.head(*tracker.encoder(video), video, queries[:, :32], iterations=2)
    expected = tracker.refine(maps, wide)[-1]
    assert torch.equal(tracker(large, wide).tracks, output.tracks)
    torch.testing.assert_close(expected.tracks, output.tracks, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr("tritonkern.models.ditracker._POSITIONS", 60)
    output = tracker.track(maps, wide)
    assert output.tracks.shape == (1, 70, 3, 2)
    torch.testing.assert_close(output.tracks[:, :32] / 2, few.tracks, atol=1e-2, rtol=1e-3)
    with pytest.raises(ValueError, match="video must be"):
        tracker.encode(video)


@torch.no_grad()
def test_nano_takes_clips_of_any_length():
    """Later passes begin with the first frame; a frame of the first pass does not depend on them."""
    torch.manual_seed(0)
    model = DiTrackerNano().eval()
    video = torch.rand(1, 10, 128, 128, 3) * 2 - 1
    query, key = model.encoder(video)
    assert query.shape == key.shape == (1, 10, 16, 16, 64)
    torch.testing.assert_close(model.encoder(video[:, :8])[0], query[:, :8])
    torch.testing.assert_close(model.encoder(video[:, [0, 8, 9]])[1][:, 1:], key[:, 8:])


@torch.no_grad()
def test_nano_without_a_part():
    """A cost that is left out is its mean, whatever the maps are; adapters are left out by other weights."""
    torch.manual_seed(0)
    model = DiTrackerNano.from_difftrack(packaged("difftrack-nano")).eval()
    model.head.updateformer.flow_head.weight.mul_(100)
    ablations = model.ablations(packaged("difftrack-nano"))
    video, queries = torch.rand(1, 2, 256, 256, 3) * 2 - 1, torch.tensor([[[0.0, 99.0, 120.0]]])
    query, key, network = model.features(video)
    flat = (0 * query, 0 * key, network), (query, key, 0 * network)
    for name, maps in (("network only", flat[0]), ("transformer only", flat[1])):
        tracks = ablations[f"ditracker-nano, {name}"].track((query, key, network), queries).tracks
        torch.testing.assert_close(tracks, model.track(maps, queries).tracks, atol=1e-2, rtol=1e-3)
        assert (tracks - model.track((query, key, network), queries).tracks).abs().max() > 0.1
    model.encoder.transformer.transformer_blocks[0].attn1.to_q.weight.mul_(2)
    off = model.ablations(packaged("difftrack-nano"))["ditracker-nano, adapters off"]
    assert torch.equal(off.features(video)[0], query) and not torch.equal(model.features(video)[0], query)


@torch.no_grad()
def test_packaged_weights():
    """Points of a generated clip that training did not see: less than half of the error of points that do not move."""
    clip = generate_clip((5, 5), frames=8, points=64, speed=0.75)
    points, shown = torch.from_numpy(clip.points)[None], ~torch.from_numpy(clip.occluded)[None]
    shown = shown & shown[..., :1]
    queries = torch.cat([torch.zeros(1, 64, 1), points[:, :, 0].flip(-1)], -1)
    output = build_model("ditracker-nano")(torch.from_numpy(clip.video)[None] / 127.5 - 1, queries)
    moved, error = ((x - points).norm(dim=-1)[shown].mean() for x in (points[:, :, :1], output.tracks))
    assert moved > 5 and error < moved / 2, (moved, error)
    assert (output.visible == shown)[shown[..., 0]].float().mean() > 0.8


# -- The published code ---------------------------------------------------------------------------------------------


@pytest.fixture
def published(official, monkeypatch):  # noqa: F811
    """`published(name)` imports a module of the published head, whose encoder is a projection of patches."""
    stub = types.ModuleType("cotracker.models.core.cotracker.feature_extractor")
    stub.VDMEncoder = PublishedEncoder
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    return lambda name: official("DiTracker", f"cotracker.models.core.cotracker.{name}")


class PublishedEncoder(torch.nn.Module):
    def __init__(self, layer_hooks, **_):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.projections = [torch.randn(2, 64, 3, generator=generator) / 2 for _ in layer_hooks]

    def forward(self, video):
        """`[1, T, 3, H, W]` in [0, 1] -> `[layers, T, 64, 9, 15]` twice."""
        cells = F.adaptive_avg_pool2d(video[0], (9, 15))
        maps = [[torch.einsum("oc,tchw->tohw", w.to(cells), 6 * cells - 3) for w in pair] for pair in self.projections]
        return tuple(torch.stack(side) for side in zip(*maps, strict=True))


@needs_official
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("frames", [5, 15])
@pytest.mark.parametrize(
    ("fuse", "cost", "layers"),
    [
        ("concat", "softmax", 1),
        ("concat", "cosine", 1),
        ("add", "softmax", 1),
        ("add", "cosine", 1),
        (None, "softmax", 1),
        ("concat", "softmax", 2),
    ],
)
def test_published_head(published, monkeypatch, fuse, cost, layers, frames):
    """In float64, and in float32 to 1e-3 px or twice the error of the published code, which 100-fold steps amplify."""
    size = 72, 120
    module = published("ditracker")
    torch.manual_seed(4)
    peer = module.DiTracker(
        window_len=60,
        model_resolution=size,
        latent_dim=64,
        layer_hooks=list(range(layers)),
        cost_softmax=cost == "softmax",
        resnet_fuse_mode=fuse,
    )
    peer.updateformer.flow_head.weight.mul_(100)
    head = DiTrackerHead(size, fuse=fuse, cost=cost)
    head.load_state_dict({name: x for name, x in peer.state_dict().items() if "dit_fnet" not in name})
    video = torch.rand(1, frames, 3, *size) * 255
    queries = torch.tensor([[[0.0, 30.0, 20.0], [4.0, 119.0, 71.0], [2.0, 3.25, 60.5]]])

    def run(dtype):
        """Tracks of both, and visibility and confidence."""
        images, points = video.to(dtype), queries.to(dtype)
        tracks, *certain = peer.to(dtype).eval()(images.clone(), points, iters=3)[:3]
        maps = [[x[None].movedim(2, -1) for x in side] for side in peer.dit_fnet(images / 255)]
        rows = points[..., [0, 2, 1]] + torch.tensor([0, 0.5, 0.5])
        output = head.to(dtype).eval()(*maps, images.movedim(2, -1) / 127.5 - 1, rows, iterations=3)
        for logit, probability in zip(output[1:], certain, strict=True):
            torch.testing.assert_close(torch.sigmoid(-logit), probability.transpose(1, 2), atol=1e-4, rtol=0)
        return output.tracks.double() - 0.5, tracks.transpose(1, 2).double()

    ours, theirs = run(torch.float32)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # which the published code calls
    torch.set_default_dtype(torch.float64)
    try:
        exact, expected = run(torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(exact, expected, atol=1e-8, rtol=0)
    assert (expected - expected[:, :, :1]).abs().max() > 1
    error = (theirs - expected).abs().max()
    print(f"float32: published {error:.1e} px, ours {(ours - expected).abs().max():.1e} px")
    assert (ours - theirs).abs().max() < 1e-3 or (ours - expected).abs().max() < 2 * error


@needs_official
def test_published_losses(published):
    from tritonkern.nn.correlation import TrackerOutput

    module = published("losses")
    torch.manual_seed(5)
    points, occluded = 400 * torch.rand(1, 6, 5, 2), torch.rand(1, 6, 5) < 0.3
    steps = [
        TrackerOutput(points + 12 * torch.randn(1, 6, 5, 2), torch.randn(1, 6, 5), torch.randn(1, 6, 5))
        for _ in range(3)
    ]
    ours = iteration_losses(steps, points, occluded)
    true, shown = points.transpose(1, 2), (~occluded).float().transpose(1, 2)
    tracks, seen, sure = ([x.transpose(1, 2) for x in part] for part in zip(*steps, strict=True))
    seen, sure = ([torch.sigmoid(-x) for x in part] for part in (seen, sure))
    every = [torch.ones_like(shown)]
    theirs = {
        "visible": module.sequence_loss(
            [tracks], [true], every, vis=[shown], add_huber_loss=True, loss_only_for_visible=True
        ),
        "hidden": module.sequence_loss(
            [tracks], [true], every, vis=[1 - shown], add_huber_loss=False, loss_only_for_visible=True
        ),
        "visibility": module.sequence_BCE_loss([seen], [shown]),
        "confidence": module.sequence_prob_loss([tracks], [sure], [true], [shown]).mean(),
    }
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=1e-5, rtol=1e-5)
