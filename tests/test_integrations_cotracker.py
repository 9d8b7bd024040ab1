"""`tritonkern.patch` on CoTracker3: on structural twins everywhere, on the official repository where there is one."""

import copy

import pytest
import torch
from cotracker_like import Attention, Offline, Online, Predictor
from official import needs_official, official  # noqa: F401
from torch import nn

import tritonkern


def clip(frames=6, queries=7, height=64, width=96, batch=1):
    video = torch.rand(batch, frames, 3, height, width) * 255
    times = torch.arange(queries).expand(batch, -1) % min(frames, 6)
    places = torch.rand(batch, queries, 2) * torch.tensor([width - 1, height - 1])
    return video, torch.cat([times[..., None].float(), places], -1)


@pytest.fixture(params=[Offline, Online])
def tracker(request):
    torch.manual_seed(0)
    return request.param().eval()


def assert_same(actual, expected):
    tracks, visibility, confidence = actual[:3]
    torch.testing.assert_close(tracks, expected[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(visibility, expected[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(confidence, expected[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch", [1, 2])
def test_same_results_and_weights(tracker, batch):
    video, queries = clip(batch=batch)
    keys = list(tracker.state_dict())
    expected = tracker(video, queries)
    with tritonkern.patch(tracker):
        actual = tracker(video, queries)
        assert list(tracker.state_dict()) == keys
    assert_same(actual, expected)
    assert torch.equal(tracker(video, queries)[0], expected[0])
    replaced = ("forward", "get_correlation_feat", "init_video_online_processing")
    assert not any(name in module.__dict__ for module in tracker.modules() for name in replaced)


@pytest.mark.parametrize("grad", [False, True])
def test_more_frames_than_the_encoder_takes_at_once(tracker, grad):
    video, queries = clip()
    tracker.requires_grad_(grad)
    expected = tracker(video, queries, fmaps_chunk_size=4)
    with tritonkern.patch(tracker):
        assert_same(tracker(video, queries, fmaps_chunk_size=4), expected)


def test_same_gradients(tracker):
    tracker.double()
    video, queries = (x.double() for x in clip())

    def gradients():
        tracker.zero_grad(set_to_none=True)
        *_, steps = tracker(video, queries, iters=2, is_train=True)
        sum(tracks.square().mean() + vis.sum() + conf.square().sum() for tracks, vis, conf in steps).backward()
        return {name: parameter.grad for name, parameter in tracker.named_parameters()}

    expected = gradients()
    with tritonkern.patch(tracker):
        actual = gradients()
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(actual[name], grad, atol=1e-5 * grad.abs().max().item() + 1e-9, rtol=0, msg=name)


def test_patches_are_never_sampled(tracker, monkeypatch):
    """A patched model calls none of the methods that its patch replaces; another model keeps them."""
    other, (video, queries) = type(tracker)(), clip()
    with tritonkern.patch(tracker, verify=False):
        assert other.get_correlation_feat.__func__ is Offline.get_correlation_feat
        monkeypatch.setattr(Offline, "get_correlation_feat", None)
        monkeypatch.setattr(Attention, "forward", None)
        tracker(video, queries)
        with pytest.raises(TypeError):
            other(video, queries)


def test_a_fork_with_another_use_of_the_patches(tracker):
    """What is not the expected einsum, reshape and linear layer works on the patches themselves."""
    video, queries = clip()
    features, points = torch.rand(2, 3, 8, 9, 12), torch.rand(6, 4, 2) * 9
    support = torch.rand(2, 4, 7, 7, 8)

    def uses():
        patches = tracker.get_correlation_feat(features, points)
        volume = torch.einsum("btnhwc,bnijc->btnhwij", tracker.get_correlation_feat(features, points), support)
        yield patches.shape
        yield patches.mean(-1)
        yield torch.stack([patches, patches])
        yield torch.einsum("btnhwc,bnijc->btnijhw", patches, support)
        yield volume.reshape(24, 49, 49)
        yield torch.relu(volume)
        yield torch.nn.functional.linear(volume.reshape(24, 2401), torch.ones(1, 2401))
        yield volume.reshape(24, 2401).sum(-1)
        yield torch.nn.functional.linear(volume, torch.ones(2, 7))

    expected = list(uses())
    with tritonkern.patch(tracker):
        actual = list(uses())
    for result, value in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-4, atol=1e-5)


def steps(predictor, video, queries):
    """Every window's tracks and visibility, windows of 8 frames each 4 behind the last; the last one is shorter."""
    predictor(video[:, :8], queries, is_first_step=True)
    return [predictor(video[:, start : start + 8]) for start in range(0, video.shape[1] - 4, 4)]


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_online_predictor_encodes_every_frame_once(batch):
    predictor, (video, queries) = Predictor(Online()), clip(frames=18, batch=batch)
    expected = steps(predictor, video, queries)
    encoder = predictor.model.fnet
    assert encoder.frames == 4 * 8 * batch
    with tritonkern.patch(predictor) as handle:
        assert handle.replaced[-1] == "model.fnet.forward"
        for _ in range(2):
            encoder.frames = 0
            actual = steps(predictor, video, queries)
            # 18 frames, and two copies of the last that fill the last window
            assert encoder.frames == 20 * batch
            for (tracks, visible), (before, visible_before) in zip(actual, expected, strict=True):
                torch.testing.assert_close(tracks, before, atol=1e-3, rtol=0)
                assert torch.equal(visible, visible_before)


def test_online_predictor_forgets_features_of_other_frames():
    predictor, (video, queries) = Predictor(Online()), clip(frames=16)
    other = video.clone()
    # A window that does not begin with the frames kept, by one pixel
    other[0, 4, 0, 3, 5] += 40
    predictor(video[:, :8], queries, is_first_step=True)
    expected = [predictor(video[:, :8]), predictor(other[:, 4:12])]
    with tritonkern.patch(predictor):
        predictor(video[:, :8], queries, is_first_step=True)
        actual = [predictor(video[:, :8]), predictor(other[:, 4:12])]
        # New weights and a new video: nothing is left of the old one, of which the last frames come again.
        with torch.no_grad():
            predictor.model.fnet.conv.weight.mul_(torch.rand_like(predictor.model.fnet.conv.weight))
        predictor(video[:, 8:], queries, is_first_step=True)
        renewed = predictor(video[:, 8:])
    for (tracks, _), (before, _) in zip(actual, expected, strict=True):
        torch.testing.assert_close(tracks, before, atol=1e-3, rtol=0)
    predictor(video[:, 8:], queries, is_first_step=True)
    torch.testing.assert_close(renewed[0], predictor(video[:, 8:])[0], atol=1e-3, rtol=0)


def test_evaluation_while_training_online():
    """Outside of the online mode nothing is kept: weights may change between two calls with the same frames."""
    tracker, (video, queries) = Online().eval(), clip(frames=8)
    with tritonkern.patch(tracker), torch.no_grad():
        tracker(video, queries)
        tracker.fnet.conv.weight.mul_(torch.rand_like(tracker.fnet.conv.weight))
        rolled = video.roll(-4, 1)
        actual = tracker(rolled, queries)
    assert_same(actual, tracker(rolled, queries))


def test_a_copy_of_an_online_model_keeps_its_own_features():
    predictor, (video, queries) = Predictor(Online()), clip(frames=16)
    with torch.no_grad(), tritonkern.patch(predictor):
        twin = copy.deepcopy(predictor)
        twin.model.fnet.conv.weight.mul_(torch.rand_like(twin.model.fnet.conv.weight))
        both = predictor, twin
        alone = [steps(model, video, queries) for model in both]
        for model in both:
            model(video[:, :8], queries, is_first_step=True)
        # Window by window in turn: each must find what its own encoder made of the shared frames.
        for index, start in enumerate(range(0, 12, 4)):
            for model, expected in zip(both, alone, strict=True):
                assert torch.equal(model(video[:, start : start + 8])[0], expected[index][0])


def test_offline_predictor():
    predictor, (video, queries) = Predictor(Offline()), clip()
    expected, visible = predictor(video, queries)
    with tritonkern.patch(predictor) as handle:
        assert "model.updateformer.time.forward" in handle.replaced
        assert "model.get_correlation_feat" in handle.replaced
        actual, visible_now = predictor(video, queries)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)
    assert torch.equal(visible, visible_now)


@pytest.mark.parametrize(("sequences", "frames", "fused"), [(64, 16, True), (64, 25, False), (8, 16, False)])
def test_attention_over_time_in_one_window_where_that_is_faster(sequences, frames, fused, monkeypatch):
    """Forward and backward, with the scale of the layer."""
    from tritonkern.nn import _sequence_attention

    calls, window = [], _sequence_attention.temporal_window_attention
    monkeypatch.setattr(
        _sequence_attention, "temporal_window_attention", lambda *args, **kw: calls.append(1) or window(*args, **kw)
    )
    tracker, x = Offline(), torch.randn(sequences, frames, 16, requires_grad=True)
    attention = tracker.updateformer.time
    attention.scale = 0.7

    def run():
        x.grad = None
        result = attention(x)
        result.square().sum().backward()
        return result.detach(), x.grad

    expected = run()
    with tritonkern.patch(tracker, verify=False):
        actual = run()
    assert bool(calls) == fused
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("share", "own"), [(0.0, False), (0.5, True)])
def test_attention_with_dropout(share, own, monkeypatch):
    """Layers of MV-TAP: in training their own method runs if dropout has a share to drop."""
    tracker, x = Offline(), torch.randn(3, 5, 16)
    attention, calls, forward = tracker.updateformer.time, [], Attention.forward
    attention.attn_drop = nn.Dropout(share)
    monkeypatch.setattr(Attention, "forward", lambda *args: calls.append(1) or forward(*args))
    with tritonkern.patch(tracker, verify=False) as handle:
        assert "updateformer.time.forward" in handle.replaced
        attention.eval()(x)
        assert not calls
        attention.train()(x)
        assert bool(calls) == own


def test_foreign_models():
    with pytest.raises(ValueError, match="facebookresearch/co-tracker"):
        tritonkern.patch(nn.Linear(2, 2))
    other_radius = Offline()
    other_radius.corr_radius = 2
    with pytest.raises(ValueError, match="model holds no tracker that tritonkern knows: neither Offline"):
        tritonkern.patch(other_radius)


@needs_official
@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_official_offline(official, grad):  # noqa: F811
    module = official("co-tracker", "cotracker.models.core.cotracker.cotracker3_offline")
    torch.manual_seed(0)
    model = module.CoTrackerThreeOffline(stride=4, corr_radius=3, window_len=60).eval()
    video, queries = clip(height=96, width=128, queries=20)
    with torch.set_grad_enabled(grad):
        expected = model(video, queries)
        with tritonkern.patch(model) as handle:
            actual = model(video, queries)
    assert len(handle.replaced) == 3 + 3 * 3 + 2
    print(f"tracks differ by at most {(actual[0] - expected[0]).abs().max().item():.1e} pixels")
    assert_same(actual, expected)


@needs_official
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["border", "zeros"])
def test_official_mvtap(official, mode):  # noqa: F811
    """Two views of a clip longer than a window, tracked together."""
    module = official("MV-TAP", "models.mvtap")
    torch.manual_seed(0)
    model = module.MVTAP(view_att=True, use_cam_embed=True, bilinear_mode=mode).eval()
    video, queries = clip(frames=24, height=96, width=128, queries=20, batch=2)
    cameras = torch.eye(4).expand(1, 2, 24, 4, 4) + torch.randn(1, 2, 1, 4, 4) * 0.1
    lenses = torch.tensor([[90.0, 0, 64], [0, 90, 48], [0, 0, 1]]).expand(1, 2, 24, 3, 3)

    def run():
        # It divides the queries in place
        return model(video[None], queries[None].clone(), lenses, cameras, iters=2)

    with torch.no_grad():
        expected = run()
        with tritonkern.patch(model) as handle:
            actual = run()
    assert len(handle.replaced) == 3 + 3 + 3 * 3 + 2 and not handle.kept
    print(f"tracks differ by at most {(actual[0] - expected[0]).abs().max().item():.1e} pixels")
    assert_same(actual, expected)


@needs_official
@pytest.mark.slow
def test_official_mvtap_training_step(official):  # noqa: F811
    module = official("MV-TAP", "models.mvtap")
    torch.manual_seed(0)
    model = module.MVTAP(view_att=True, bilinear_mode="border").train()
    video, queries = clip(frames=16, height=96, width=128, queries=12, batch=2)

    def gradients():
        model.zero_grad(set_to_none=True)
        tracks, *_ = model(video[None], queries[None].clone(), None, None, iters=2, is_train=True)
        (tracks.square().mean() * 1e-3).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with tritonkern.patch(model):
        actual = gradients()
    assert actual.keys() == expected.keys() and any(name.startswith("corr_mlp") for name in actual)
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, atol=1e-3 * grad.abs().max().item() + 1e-9, rtol=0, msg=name)


@needs_official
@pytest.mark.slow
def test_official_predictors(official):  # noqa: F811
    predictors = official("co-tracker", "cotracker.predictor")
    torch.manual_seed(0)
    offline = predictors.CoTrackerPredictor(checkpoint=None, offline=True, window_len=60)
    online = predictors.CoTrackerOnlinePredictor(checkpoint=None)
    offline.interp_shape = online.interp_shape = (96, 128)
    video, queries = clip(frames=24, queries=3, height=80, width=100)

    def track():
        yield offline(video[:, :3], grid_size=2)
        online(video[:, :16], is_first_step=True, queries=queries)
        yield online(video[:, :16])
        yield online(video[:, 8:24])

    expected = list(track())
    with tritonkern.patch(offline), tritonkern.patch(online):
        actual = list(track())
    for (tracks, visible), (before, visible_before) in zip(actual, expected, strict=True):
        print(f"tracks differ by at most {(tracks - before).abs().max().item():.1e} pixels")
        torch.testing.assert_close(tracks, before, atol=1e-3, rtol=0)
        assert torch.equal(visible, visible_before)
