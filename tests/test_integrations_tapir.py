"""`tritonkern.patch` on TAPIR: on a structural twin everywhere, on the official repository where there is one."""

import pytest
import torch
import torch.nn.functional as F
from official import needs_official, official, tapir  # noqa: F401
from tapir_like import Block, Tracker
from torch import nn

import tritonkern


def clip(frames=5, queries=7, size=(64, 64)):
    video = F.interpolate(torch.rand(frames, 3, 8, 8) * 2 - 1, size, mode="bicubic").movedim(1, -1)[None]
    places = torch.rand(1, queries, 2) * torch.tensor(size)
    return video, torch.cat([(torch.arange(queries) % frames)[None, :, None].float(), places], -1)


@pytest.fixture
def tracker():
    tracker = Tracker().eval()
    for name in ("hid1", "hid3", "hid4"):  # ReLUs that let something through
        nn.init.constant_(tracker.torch_cost_volume_track_mods[name].bias, 0.5)
    return tracker


def assert_same(actual, expected):
    torch.testing.assert_close(actual["tracks"], expected["tracks"], atol=1e-3, rtol=0)
    for name in ("occlusion", "expected_dist"):
        torch.testing.assert_close(actual[name], expected[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (64, 96)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["offline", "causal"])
def test_same_results_and_weights(size, causal):
    tracker = Tracker(causal).eval()
    video, queries = clip(size=size)
    keys = list(tracker.state_dict())
    expected = tracker(video, queries)
    with tritonkern.patch(tracker):
        actual = tracker(video, queries)
        assert list(tracker.state_dict()) == keys
    assert_same(actual, expected)
    assert torch.equal(tracker(video, queries)["tracks"], expected["tracks"])
    assert not any("forward" in module.__dict__ for module in tracker.modules())


def test_same_gradients(tracker):
    video, queries = clip()

    def gradients():
        tracker.zero_grad(set_to_none=True)
        output = tracker(video, queries)
        (output["tracks"].square().mean() + output["occlusion"].sum() + output["expected_dist"].sum()).backward()
        return {name: parameter.grad for name, parameter in tracker.named_parameters()}

    expected = gradients()
    with tritonkern.patch(tracker):
        actual = gradients()
    for name, grad in expected.items():
        if grad is None:  # the soft-argmax head has none: points are detached
            assert name.startswith("torch_cost_volume_track_mods.hid2") and actual[name] is None
            continue
        assert grad.abs().max() > 0
        torch.testing.assert_close(actual[name], grad, atol=5e-4 * grad.abs().max().item(), rtol=0, msg=name)


def online(tracker, video, queries, frames_a_step=1):
    """Frame by frame, as the live demo runs: features of the queries first, then a state that goes along."""
    grids = tracker.get_feature_grids(video[:, :1], False)
    features = tracker.get_query_features(video[:, :1], False, queries * torch.tensor([0.0, 1, 1]), grids)
    context = tracker.construct_initial_causal_state(queries.shape[1], len(grids.lowres) - 1)
    outputs = []
    for step in video.split(frames_a_step, 1):
        grids = tracker.get_feature_grids(step, False)
        found = tracker.estimate_trajectories(step.shape[2:4], False, grids, features, None, 4, context, True)
        context = found.pop("causal_context")
        outputs.append({name: x[-1] for name, x in found.items()})
    return {name: torch.cat([x[name] for x in outputs], 2) for name in outputs[0]}, context


@pytest.mark.parametrize("frames", [1, 2])
def test_online(frames):
    tracker = Tracker(causal=True).eval()
    video, queries = clip(frames=6)
    with torch.no_grad():
        expected, last = online(tracker, video, queries, frames)
        with tritonkern.patch(tracker):
            actual, after = online(tracker, video, queries, frames)
    assert_same(actual, expected)
    for mine, theirs in zip(after, last, strict=True):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(mine[name], theirs[name], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_gradients_with_a_state_are_the_models_own():
    tracker = Tracker(causal=True).eval()
    video, queries = clip(frames=3)

    def gradient():
        tracker.zero_grad(set_to_none=True)
        online(tracker, video, queries)[0]["tracks"].sum().backward()
        return tracker.torch_pips_mixer.blocks[0].mlp1_up.weight.grad.clone()

    expected = gradient()
    with tritonkern.patch(tracker):
        torch.testing.assert_close(gradient(), expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


def test_handle_lists_what_it_replaced(tracker):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tracker

    other = Tracker()
    with tritonkern.patch(Wrapper()) as handle:
        names = ["torch_pips_mixer.blocks.0.forward", "torch_pips_mixer.blocks.1.forward"]
        names += ["get_feature_grids", "refine_pips", "tracks_from_cost_volume"]
        assert handle.replaced == [f"model.{name}" for name in names]
        assert other.refine_pips.__func__ is Tracker.refine_pips
    assert tracker.refine_pips.__func__ is Tracker.refine_pips


def test_replaced_methods_run(tracker, monkeypatch):
    video, queries = clip()
    with tritonkern.patch(tracker, verify=False):
        for method in ("refine_pips", "tracks_from_cost_volume"):
            monkeypatch.setattr(Tracker, method, None)
        monkeypatch.setattr(Block, "forward", None)
        tracker(video, queries)


def test_blocks_of_another_shape_stay(tracker):
    tracker.torch_pips_mixer.blocks[0] = Block(tracker.dim, False, 0, multiplier=2)
    video, queries = clip()
    expected = tracker(video, queries)
    with tritonkern.patch(tracker) as handle:
        assert "torch_pips_mixer.blocks.0.forward" not in handle.replaced
        assert_same(tracker(video, queries), expected)


@needs_official
@pytest.mark.slow
@pytest.mark.parametrize("size", [(256, 256), (256, 320)], ids=str)
def test_official(tapir, size):  # noqa: F811
    model = tapir(pyramid_level=1).eval()
    video, queries = clip(2, 70, size)
    with torch.no_grad():
        expected = model(video, queries)
        with tritonkern.patch(model) as handle:
            actual = model(video, queries)
    assert len(handle.replaced) == 12 + 3
    assert_same(actual, expected)


@needs_official
@pytest.mark.slow
def test_official_online(tapir):  # noqa: F811
    model = tapir(pyramid_level=1, use_casual_conv=True, extra_convs=False).eval()
    video, queries = clip(3, 20, (256, 256))

    def run():
        grids = model.get_feature_grids(video[:, :1], False)
        features = model.get_query_features(video[:, :1], False, queries * torch.tensor([0.0, 1, 1]), grids)
        context = model.construct_initial_causal_state(20, len(features.resolutions) - 1)
        tracks = []
        for frame in video.split(1, 1):
            grids = model.get_feature_grids(frame, False)
            found = model.estimate_trajectories((256, 256), False, grids, features, None, 64, context, True)
            context = found["causal_context"]
            tracks.append({name: found[name][-1] for name in ("tracks", "occlusion", "expected_dist")})
        return {name: torch.cat([x[name] for x in tracks], 2) for name in tracks[0]}

    with torch.no_grad():
        expected = run()
        with tritonkern.patch(model):
            actual = run()
    assert_same(actual, expected)
