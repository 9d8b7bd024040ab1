"""`tritonkern.patch` on LocoTrack: on a structural twin everywhere, on the official repository where there is one."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from locotrack_like import CMDTop, MultiHeadAttention, Tracker
from official import needs_official, official  # noqa: F401
from torch import nn

import tritonkern


@pytest.fixture
def tracker():
    torch.manual_seed(0)
    return Tracker().eval()


def clip(frames=5, queries=9, size=64):
    video = torch.rand(1, frames, size, size, 3) * 2 - 1
    times = torch.arange(queries) % frames
    # Some queries near the border, where patches and supports leave the map
    return video, torch.cat([times[None, :, None].float(), torch.rand(1, queries, 2) * size], -1)


def assert_same(actual, expected):
    torch.testing.assert_close(actual["tracks"], expected["tracks"], atol=1e-3, rtol=0)
    for name in ("occlusion", "expected_dist"):
        torch.testing.assert_close(actual[name], expected[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [4, 64])
def test_same_results_and_weights(tracker, chunk):
    video, queries = clip()
    keys = list(tracker.state_dict())
    expected = tracker(video, queries, query_chunk_size=chunk)
    with tritonkern.patch(tracker):
        actual = tracker(video, queries, query_chunk_size=chunk)
        assert list(tracker.state_dict()) == keys
    assert_same(actual, expected)
    assert torch.equal(tracker(video, queries, query_chunk_size=chunk)["tracks"], expected["tracks"])
    replaced = ("forward", "refine_pips", "tracks_from_cost_volume")
    assert not any(name in module.__dict__ for module in tracker.modules() for name in replaced)


def test_oblong_videos_and_another_clip():
    """Width and height are not exchanged; the attention's bias is built again for another number of frames."""
    tracker = Tracker(size=(48, 80)).eval()
    with tritonkern.patch(tracker) as handle:
        for frames in (3, 6):
            video, queries = torch.rand(1, frames, 48, 80, 3), torch.rand(1, 5, 3) * torch.tensor([frames - 1, 48, 80])
            actual = tracker(video, queries)
            handle.restore()
            assert_same(actual, tracker(video, queries))
            handle = tritonkern.patch(tracker)
        handle.restore()


def test_clips_of_different_lengths_in_two_threads(tracker):
    """Both want the attention's bias of their own length at the same time."""
    both_attend = threading.Barrier(2, timeout=30)

    def call(inputs):
        with torch.no_grad():
            return tracker(*inputs)

    clips = [clip(frames=4), clip(frames=6)]
    attention = next(module for module in tracker.modules() if isinstance(module, MultiHeadAttention))
    with tritonkern.patch(tracker):
        expected = [call(inputs) for inputs in clips]
        handle = attention.query_proj.register_forward_pre_hook(lambda *_: (both_attend.wait(), None)[1])
        with ThreadPoolExecutor(2) as threads:
            actual = list(threads.map(call, clips))
        handle.remove()
    for x, y in zip(actual, expected, strict=True):
        assert_same(x, y)


def test_cost_volume_without_query_points(tracker):
    query, features = torch.rand(2, 3, 16), torch.rand(2, 4, 8, 8, 16)
    query_hires, features_hires = torch.rand(2, 3, 12), torch.rand(2, 4, 16, 16, 12)
    arguments = (query, query_hires, features, features_hires, None, (2, 4, 64, 64, 3))
    expected = tracker.tracks_from_cost_volume(*arguments)
    with tritonkern.patch(tracker):
        actual = tracker.tracks_from_cost_volume(*arguments)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


def test_same_gradients(tracker):
    """In float64: rounding in float32 moves a random network across its ReLUs' corners."""
    tracker.double()
    video, queries = (x.double() for x in clip())

    def gradients():
        tracker.zero_grad(set_to_none=True)
        output = tracker(video, queries)
        (
            output["tracks"].square().mean() + output["occlusion"].sum() + output["expected_dist"].square().sum()
        ).backward()
        return {name: parameter.grad for name, parameter in tracker.named_parameters()}

    expected = gradients()
    with tritonkern.patch(tracker):
        actual = gradients()
    for name, grad in expected.items():
        if grad is None:
            assert actual[name] is None, name
        else:
            torch.testing.assert_close(actual[name], grad, atol=1e-5 * grad.abs().max().item() + 1e-9, rtol=0, msg=name)
    assert expected["cmdtop.0.conv.0.0.weight"].abs().max() > 0
    assert expected["resnet_torch.0.0.weight"].abs().max() > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_then_training(tracker, mode):
    video, queries = clip()
    with tritonkern.patch(tracker):
        with mode():
            before = tracker(video, queries)
        after = tracker(video, queries)
        after["tracks"].sum().backward()
    assert not before["tracks"].requires_grad
    assert torch.equal(before["tracks"], after["tracks"])


def test_wrapped_and_listed(tracker):
    class Lightning(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tracker

    with tritonkern.patch(Lightning()) as handle:
        assert handle.replaced == [
            *(f"model.resnet_torch.{level}.{layer}.forward" for level in range(3) for layer in (0, 2)),
            *(f"model.cmdtop.{level}.conv.{layer}.0.forward" for level in range(3) for layer in range(3)),
            "model.torch_pips_mixer.transformer.attn.forward",
            "model.cost_conv.forward",
            "model.tracks_from_cost_volume",
            "model.refine_pips",
        ]
        with pytest.raises(ValueError, match=r"restore\(\) the earlier patch"):
            tritonkern.patch(tracker)


def test_only_one_of_two_is_patched(tracker, monkeypatch):
    """None of the model's own correlation is called by a patched model; another model keeps it."""
    video, queries = clip()
    other = Tracker().eval()
    with tritonkern.patch(tracker, verify=False):
        assert other.refine_pips.__func__ is Tracker.refine_pips
        for owner, method in ((Tracker, "refine_pips"), (Tracker, "tracks_from_cost_volume"), (CMDTop, "forward")):
            monkeypatch.setattr(owner, method, None)
        monkeypatch.setattr(MultiHeadAttention, "forward", None)
        tracker(video, queries)
        with pytest.raises(TypeError):
            other(video, queries)


def test_foreign_models():
    with pytest.raises(ValueError, match="cvlab-kaist/Chrono or .*cvlab-kaist/locotrack"):
        tritonkern.patch(nn.Linear(2, 2))
    lacks_a_part = Tracker()
    del lacks_a_part.cmdtop
    with pytest.raises(ValueError, match="model holds no tracker that tritonkern knows: neither Tracker"):
        tritonkern.patch(lacks_a_part)


@needs_official
@pytest.mark.slow
@pytest.mark.parametrize("size", ["base", "small"])
def test_official(official, size):  # noqa: F811
    torch.manual_seed(0)
    model = official("locotrack/locotrack_pytorch", "models.locotrack_model").LocoTrack(model_size=size).eval()
    video, queries = clip(frames=4, queries=70, size=256)
    with torch.no_grad():
        expected = model(video, queries)
        with tritonkern.patch(model) as handle:
            actual = model(video, queries)
    # Attention in three layers; a ResNet of 1 + 4 * (2 + 3) convolutions, those of the encoders and of the costs;
    # two methods
    assert len(handle.replaced) == 3 + 21 + 3 * len(model.cmdtop[0].conv) + 1 + 2
    difference = (actual["tracks"] - expected["tracks"]).abs().max().item()
    print(f"tracks differ by at most {difference:.1e} pixels")
    assert_same(actual, expected)
