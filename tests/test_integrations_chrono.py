"""`tritonkern.patch` on Chrono: on a structural twin everywhere, on the official repository where there is one."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from chrono_like import TemporalAdapter, Tracker
from official import needs_official, official  # noqa: F401
from torch import nn

import tritonkern
from tritonkern.integrations import find_patch
from tritonkern.integrations.chrono import without_xformers


def randomise(model):
    """New adapters add nothing; these do."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def clip(frames=4, queries=7, size=64):
    video = torch.rand(1, frames, size, size, 3) * 2 - 1
    times = torch.arange(queries) % frames
    return video, torch.cat([times[None, :, None].float(), torch.rand(1, queries, 2) * size], -1)


@pytest.fixture
def tracker():
    with without_xformers():
        yield randomise(Tracker())


def assert_same(actual, expected):
    torch.testing.assert_close(actual["tracks"], expected["tracks"], atol=1e-3, rtol=0)
    for name in ("occlusion", "expected_dist"):
        torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=0)


def test_same_results_and_weights(tracker):
    video, queries = clip()
    keys = list(tracker.state_dict())
    expected = tracker(video, queries)
    handle = tritonkern.patch(tracker)
    try:
        actual = tracker(video, queries)
        assert list(tracker.state_dict()) == keys
    finally:
        handle.restore()
    assert_same(actual, expected)
    assert torch.equal(tracker(video, queries)["tracks"], expected["tracks"])
    assert not any("forward" in module.__dict__ for module in tracker.modules())


def test_same_gradients(tracker):
    video, queries = clip()
    frozen = [name for name, parameter in tracker.named_parameters() if name.startswith("dino.")]
    tracker.dino.requires_grad_(False)

    def gradients():
        tracker.zero_grad(set_to_none=True)
        output = tracker(video, queries)
        (output["tracks"].square().mean() + output["occlusion"].sum()).backward()
        return {name: parameter.grad for name, parameter in tracker.named_parameters()}

    expected = gradients()
    with tritonkern.patch(tracker):
        actual = gradients()
    assert all(actual[name] is None for name in frozen)
    for name, grad in expected.items():
        if grad is not None:
            assert grad.abs().max() > 0 or "mask_token" in name
            torch.testing.assert_close(actual[name], grad, atol=2e-4 * grad.abs().max().item(), rtol=0, msg=name)


def test_handle_lists_what_it_replaced(tracker):
    class Lightning(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tracker

    with tritonkern.patch(Lightning()) as handle:
        assert "model.adapter.0.forward" in handle.replaced
        assert "model.tracks_from_cost_volume" in handle.replaced
        assert handle.replaced[0] in repr(handle)
        assert tracker.tracks_from_cost_volume.__func__ is not Tracker.tracks_from_cost_volume
    assert tracker.tracks_from_cost_volume.__func__ is Tracker.tracks_from_cost_volume
    assert "restored" in repr(handle)
    handle.restore()


class EagerAttention(nn.Module):
    """As DINOv2's."""

    def __init__(self, attention):
        super().__init__()
        self.num_heads, self.qkv, self.proj = attention.num_heads, attention.qkv, attention.proj

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


def test_attention_of_the_backbone(tracker, monkeypatch):
    for block in tracker.dino.blocks:
        block.attn = EagerAttention(block.attn).eval()
    video, queries = clip()
    expected = tracker(video, queries)
    asked, real = [], tritonkern.integrations.chrono.full_attention
    monkeypatch.setattr(tritonkern.integrations.chrono, "full_attention", lambda *x: asked.append(x) or real(*x))
    handle = tritonkern.patch(tracker, verify=False)
    assert "dino.blocks.0.attn.forward" in handle.replaced
    assert_same(tracker(video, queries), expected)
    assert len(asked) == len(tracker.dino.blocks)
    tracker.train()(video, queries)  # dropout is the model's own
    assert len(asked) == len(tracker.dino.blocks)
    handle.restore()
    assert not any("forward" in module.__dict__ for module in tracker.modules())


def test_copy_of_a_patched_model_has_layers_of_its_own(tracker):
    video, queries = clip()
    with torch.no_grad(), tritonkern.patch(tracker):
        twin = copy.deepcopy(tracker)
        for parameter in twin.adapter.parameters():
            parameter.mul_(1.5)
        for layers in (twin.adapter, tracker.adapter):
            layers[0].conv2 = nn.Conv2d(*reversed(layers[0].conv2.weight.shape[:2]), 3, padding=1)
        results = [model(video, queries)["tracks"] for model in (twin, tracker)]
    find_patch(twin).restore()
    assert find_patch(twin) is None
    with torch.no_grad():
        for model, actual in zip((twin, tracker), results, strict=True):
            torch.testing.assert_close(actual, model(video, queries)["tracks"], atol=1e-3, rtol=0)
    assert not torch.equal(*results)


def test_calls_of_two_threads_are_independent(tracker):
    """Their adapters hang on the same blocks at the same time, and clips differ in length."""
    both_hang = threading.Barrier(2, timeout=30)

    def call(inputs):
        with torch.no_grad():
            return tracker(*inputs)["tracks"]

    with tritonkern.patch(tracker):
        clips = [clip(frames=3), clip(frames=5)]
        expected = [call(inputs) for inputs in clips]
        handle = tracker.dino.blocks[0].register_forward_pre_hook(lambda *_: (both_hang.wait(), None)[1])
        with ThreadPoolExecutor(2) as threads:
            actual = list(threads.map(call, clips))
        handle.remove()
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=0)


def test_no_random_number_is_drawn(tracker):
    before = torch.get_rng_state()
    with torch.no_grad(), tritonkern.patch(tracker):
        tracker(*clip())
    drawn = torch.get_rng_state()
    torch.set_rng_state(before)
    clip()
    assert torch.equal(drawn, torch.get_rng_state())


def test_what_the_patch_would_leave_out_is_refused(tracker):
    tracker.adapter[1].attn_temp.q_norm = nn.LayerNorm(8)
    with pytest.raises(ValueError, match=r"adapter\.1\.attn_temp has query and key norms"):
        tritonkern.patch(tracker)


def test_other_models_are_left_alone(tracker):
    other = Tracker()
    with tritonkern.patch(tracker):
        assert other.tracks_from_cost_volume.__func__ is Tracker.tracks_from_cost_volume


def test_replaced_methods_run(tracker, monkeypatch):
    """None of the model's own matching or of xformers is called by a patched model."""
    video, queries = clip()
    with tritonkern.patch(tracker, verify=False):
        monkeypatch.delitem(sys.modules, "xformers.ops")
        for method in ("forward_dino", "tracks_from_cost_volume"):
            monkeypatch.setattr(Tracker, method, None)
        monkeypatch.setattr(TemporalAdapter, "forward", None)
        tracker(video, queries)


def test_errors(tracker):
    with pytest.raises(ValueError, match="model holds no tracker that tritonkern knows: neither Linear"):
        tritonkern.patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        tritonkern.patch("chrono")
    with tritonkern.patch(tracker), pytest.raises(ValueError, match="restore"):
        tritonkern.patch(tracker)


def test_stand_in_for_xformers_leaves_no_trace():
    before = {name for name in sys.modules if name.startswith("xformers")}
    with without_xformers():
        from xformers.ops import fmha, memory_efficient_attention

        with pytest.raises(ImportError):
            from xformers.ops import unbind  # noqa: F401
    assert {name for name in sys.modules if name.startswith("xformers")} == before
    # [B, T, H, D], seven frames back and none ahead
    query, key, value = torch.randn(3, 2, 9, 3, 8)
    mask = fmha.attn_bias.LocalAttentionFromBottomRightMask(window_left=7, window_right=0)
    expected = tritonkern.temporal_window_attention(query, key, value, (7, 0))
    assert torch.equal(memory_efficient_attention(query, key, value, attn_bias=mask), expected)


@needs_official
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:xFormers", "ignore:CUDA is not available")
def test_official(official, monkeypatch):  # noqa: F811
    hub = official("dinov2", "dinov2.hub.backbones")
    monkeypatch.setattr(torch.hub, "load", lambda repo_or_dir, model: getattr(hub, model)(pretrained=False))
    model = official("Chrono", "models.locotrack_model").LocoTrack(dino_size="small")
    randomise(model.adapter), randomise(model.occ_linear)
    model.eval()
    video, queries = clip(frames=2, queries=70, size=256)
    with torch.no_grad():
        expected = model(video, queries)
        with tritonkern.patch(model) as handle:
            actual = model(video, queries)
    assert len(handle.replaced) == 11 + 12 + 3
    assert_same(actual, expected)
