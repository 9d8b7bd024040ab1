"""TAPIR and BootsTAPIR: the results of the structural twin and of the official code, from the same state dict.

The twin stays beside the model: it is eager PyTorch in the structure of the official code, with the methods that
`tritonkern.patch` replaces, and calls none of the operations that both are made of.
"""

import numpy as np
import pytest
import tapir_like
import torch
from clips import square_clip
from official import needs_official, official, tapir  # noqa: F401
from torch import nn

from tritonkern.models import TAPIR, TAPIRFeatures, build_model
from tritonkern.models import tapir as module
from tritonkern.tracking import PointTracker


def clip(frames=3, queries=5):
    coarse = torch.rand(frames, 3, 32, 32) * 2 - 1
    video = nn.functional.interpolate(coarse, (256, 256), mode="bicubic").movedim(1, -1)[None]
    times = torch.arange(queries) % frames
    return video, torch.cat([times[None, :, None].float(), torch.rand(1, queries, 2) * 256], -1)


@pytest.fixture(scope="module", params=[False, True], ids=["offline", "causal"])
def pair(request):
    """The model, and a twin of its width with the same weights but for the network of features."""
    torch.manual_seed(0)
    options = dict(dim=512, blocks=12, initial=(256, 256), maps=(128, 256), heads=(16, 32, 16), steps=4)
    twin = tapir_like.Tracker(request.param, **options).eval()
    model = TAPIR(causal=request.param).eval()
    for name in ("hid1", "hid3", "hid4"):  # ReLUs that let something through
        nn.init.constant_(twin.torch_cost_volume_track_mods[name].bias, 0.5)
    shared = {k: v for k, v in twin.state_dict().items() if k.startswith("torch_")}
    missing, unexpected = model.load_state_dict(shared, strict=False)
    assert not unexpected and all(key.startswith(("resnet_torch.", "extra_convs.")) for key in missing)
    return model, twin


def maps(twin, video):
    grids = twin.get_feature_grids(video, False)
    return TAPIRFeatures(grids.hires[1], grids.lowres[1])


@torch.no_grad()
def test_same_tracks_as_the_twin(pair, monkeypatch):
    model, twin = pair
    video, queries = clip()
    expected = twin(video, queries)
    monkeypatch.setattr(module, "_MATCHED", 6)  # two points at a time
    monkeypatch.setattr(module, "_REFINED", 9)
    actual = model.track(maps(twin, video), queries)
    torch.testing.assert_close(actual.tracks, expected["tracks"], atol=1e-3, rtol=0)
    torch.testing.assert_close(actual.occlusion, expected["occlusion"], atol=1e-4, rtol=0)
    torch.testing.assert_close(actual.expected_distance, expected["expected_dist"], atol=1e-4, rtol=0)
    assert model.track(maps(twin, video), queries[:, :0]).tracks.shape == (1, 0, 3, 2)


@torch.no_grad()
def test_batches(pair):
    model, twin = pair
    video, queries = clip(frames=4, queries=6)
    features = maps(twin, torch.cat([video[:, :2], video[:, 2:]]))
    queries = torch.cat([queries[:, :3], queries[:, 3:]]) * torch.tensor([0.5, 1, 1])
    together = model.track(features, queries)
    alone = model.track(TAPIRFeatures(*(grid[1:] for grid in features)), queries[1:])
    torch.testing.assert_close(together.tracks[1:], alone.tracks, atol=1e-3, rtol=0)


@torch.no_grad()
def test_frame_by_frame(pair, monkeypatch):
    model, twin = pair
    video, queries = clip(frames=4)
    features = maps(twin, video)
    query = model.query_features(features, queries)
    if not model.torch_pips_mixer.causal:
        with pytest.raises(ValueError, match="step needs a causal model"):
            model.step(features, query, model.initial_state(1, 5))
        return
    whole, _ = model.step(features, query, model.initial_state(1, 5))
    monkeypatch.setattr(module, "_REFINED", 2)
    state, found = model.initial_state(1, 5), []
    for start, stop in ((0, 1), (1, 3), (3, 4)):
        output, state = model.step(TAPIRFeatures(*(grid[:, start:stop] for grid in features)), query, state)
        found.append(output.tracks)
    torch.testing.assert_close(torch.cat(found, 2), whole.tracks, atol=1e-3, rtol=0)
    # The same as the track of the clip, but in the frames of the queries and those that see them.
    late = queries * torch.tensor([0.0, 1, 1]) + torch.tensor([3.0, 0, 0])
    again, _ = model.step(features, model.query_features(features, late), model.initial_state(1, 5))
    torch.testing.assert_close(again.tracks[:, :, :3], model.track(features, late).tracks[:, :, :3], atol=1e-3, rtol=0)


@torch.no_grad()
def test_layers_that_are_not_plain_are_called(pair):
    model, twin = pair
    video, queries = clip()
    features = maps(twin, video)
    expected = model.track(features, queries)
    calls = []
    block = model.torch_pips_mixer.blocks[3]
    hook = block.mlp1_up.register_forward_hook(lambda *call: calls.append(1))
    actual = model.track(features, queries)
    hook.remove()
    assert len(calls) == 4
    torch.testing.assert_close(actual.tracks, expected.tracks, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_gradients_reach_every_parameter():
    model = TAPIR()
    for name in ("hid1", "hid3", "hid4"):
        nn.init.constant_(model.torch_cost_volume_track_mods[name].bias, 0.5)
    video, queries = clip(frames=2, queries=2)
    output = model(video, queries)
    (output.tracks.square().mean() + output.occlusion.sum() + output.expected_distance.sum()).backward()
    # Positions of the match carry no gradient, as in the official code.
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert silent == {"torch_cost_volume_track_mods.hid2.weight", "torch_cost_volume_track_mods.hid2.bias"}


def test_parameters():
    counts = {boots: sum(p.numel() for p in TAPIR(boots, 1).parameters()) for boots in (False, True)}
    assert [round(count / 1e6, 1) for count in counts.values()] == [31.1, 54.7]


@pytest.mark.parametrize(
    "name", ["tapir", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bootstapir", "bootstapir-causal"))]
)
def test_checkpoints(tmp_path, name):
    model = TAPIR(name != "tapir", 0 if name == "tapir" else 1)
    torch.save(model.state_dict(), tmp_path / "official.pt")
    loaded = build_model(name, tmp_path / "official.pt")
    assert not loaded.training and loaded.torch_pips_mixer.causal == (name == "bootstapir-causal")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    other = "bootstapir" if name == "tapir" else "tapir"
    with pytest.raises(ValueError, match="extra_convs.blocks.0.layer_norm.weight"):
        build_model(other, tmp_path / "official.pt")
    with pytest.raises(ValueError, match=r"no packaged weights; give the path of .*_checkpoint.*\.pt"):
        build_model(name)


@pytest.mark.slow
def test_long_clips(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(TAPIR, "span", 4)
    monkeypatch.setattr(TAPIR, "steps", 1)
    model, lengths = TAPIR(extra_convs=False), []
    features = model.features
    monkeypatch.setattr(model, "features", lambda video: lengths.append(video.shape[1]) or features(video))
    tracks = PointTracker(model, device="cpu")(square_clip(10), queries=np.array([[0, 20, 30], [9, 40, 20.0]]))
    assert tracks.tracks.shape == (2, 10, 2) and np.isfinite(tracks.tracks).all()
    assert lengths == [4, 2, 4, 4, 2]


def same_as_official(theirs, ours, video, queries):
    with torch.no_grad():
        expected, actual = theirs(video, queries), ours(video, queries)
        exact = ours.double()(video.double(), queries.double())
    difference = (actual.tracks - expected["tracks"]).abs().max().item()
    print(f"tracks differ by at most {difference:.1e} pixels")
    assert difference < 1e-3
    # Logits: no farther from float64 than twice the official code's own float32
    for logits, theirs_, oracle in (
        (actual.occlusion, expected["occlusion"], exact.occlusion),
        (actual.expected_distance, expected["expected_dist"], exact.expected_distance),
    ):
        error, own_error = ((x - oracle).abs().max().item() for x in (logits, theirs_))
        print(f"logits: error {error:.1e}, the official code's own {own_error:.1e}")
        assert error <= 2 * own_error + torch.finfo(torch.float32).eps * oracle.abs().max().item()


@needs_official
@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True], ids=["offline", "causal"])
@pytest.mark.parametrize("kind", ["tapir", "bootstapir"])
def test_official(tapir, kind, causal):  # noqa: F811
    torch.manual_seed(0)
    options = {"pyramid_level": 0 if kind == "tapir" else 1, "extra_convs": kind == "bootstapir"}
    theirs = tapir(**options, use_casual_conv=causal).eval()
    ours = TAPIR(**options, causal=causal).eval()
    ours.load_state_dict(theirs.state_dict())
    same_as_official(theirs, ours, *clip(frames=4, queries=20))


@needs_official
@pytest.mark.slow
@torch.no_grad()
def test_official_frame_by_frame(tapir):  # noqa: F811
    torch.manual_seed(0)
    theirs = tapir(pyramid_level=1, use_casual_conv=True, extra_convs=False).eval()
    ours = TAPIR(extra_convs=False, causal=True).eval()
    ours.load_state_dict(theirs.state_dict())
    video, queries = clip(frames=4, queries=20)
    queries[..., 0] = 0
    grids = theirs.get_feature_grids(video[:, :1], False)
    features = theirs.get_query_features(video[:, :1], False, queries, grids)
    context = theirs.construct_initial_causal_state(20, len(features.resolutions) - 1)
    query, state = ours.query_features(ours.features(video[:, :1]), queries), ours.initial_state(1, 20)
    for frame in video.split(1, 1):
        grids = theirs.get_feature_grids(frame, False)
        expected = theirs.estimate_trajectories((256, 256), False, grids, features, None, 64, context, True)
        context = expected["causal_context"]
        output, state = ours.step(ours.features(frame), query, state)
        torch.testing.assert_close(output.tracks, expected["tracks"][-1], atol=1e-3, rtol=0)
        torch.testing.assert_close(output.occlusion, expected["occlusion"][-1], atol=1e-3, rtol=0)
