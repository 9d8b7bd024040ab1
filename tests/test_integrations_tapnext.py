"""`tritonkern.patch` on TAPNext: on a structural twin everywhere, on the official repository where there is one."""

import copy
import sys
import types
import warnings

import pytest
import tapnext_like
import torch
from official import needs_official, official  # noqa: F401
from tapnext_like import Tracker
from torch import nn
from torch.nn.utils import parametrize

import tritonkern
from tritonkern.integrations import tapnext


def clip(frames=5, queries=6, size=32):
    times = torch.arange(queries)[:, None] % 2
    return torch.rand(1, frames, size, size, 3) * 2 - 1, torch.cat([times, torch.rand(queries, 2) * size], 1)[None]


def streamed(tracker, video, queries):
    """Frame by frame, the first two at once."""
    *found, state = tracker(video[:, :2], queries)
    outputs = [found]
    for t in range(2, video.shape[1]):
        *found, state = tracker(video[:, t : t + 1], state=state)
        outputs.append(found)
    return [torch.cat(x, 1) for x in zip(*outputs, strict=True)], state


def assert_same(actual, expected, atol=1e-4):
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=atol, rtol=1e-4)


def assert_same_state(actual, expected):
    assert (actual.step, len(actual.hidden_state)) == (expected.step, len(expected.hidden_state))
    for mine, theirs in zip(actual.hidden_state, expected.hidden_state, strict=True):
        assert type(mine) is type(theirs) and [x.dtype for x in mine] == [x.dtype for x in theirs]
        assert_same(mine, theirs)


@pytest.fixture
def tracker():
    return Tracker().eval()


@torch.no_grad()
def test_same_results_and_state(tracker):
    video, queries = clip()
    keys = list(tracker.state_dict())
    *expected, last = tracker(video, queries)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = tritonkern.patch(tracker)
        *actual, after = tracker(video, queries)
    assert handle.replaced == [f"blocks.{i}.ssm_block.recurrent_block.forward" for i in range(2)] and not handle.kept
    assert_same(actual, expected)
    assert_same_state(after, last)
    assert list(tracker.state_dict()) == keys
    handle.restore()
    assert torch.equal(tracker(video, queries)[0], expected[0])


@torch.no_grad()
def test_streaming_with_the_official_state(tracker):
    """Also with the state of an unpatched model, which a patched one carries on, and the other way round."""
    video, queries = clip()
    expected, last = streamed(tracker, video, queries)
    plain = copy.deepcopy(tracker)
    tritonkern.patch(tracker)
    actual, after = streamed(tracker, video, queries)
    assert_same(actual, expected)
    assert_same_state(after, last)
    for first, second in ((plain, tracker), (tracker, plain)):
        state = first(video[:, :4], queries)[-1]
        assert_same(second(video[:, 4:], state=state)[:3], [x[:, 4:] for x in expected])


@pytest.mark.parametrize("training", [False, True])
def test_same_gradients_also_through_the_state(tracker, training):
    tracker.train(training)
    video, queries = clip()

    def gradients():
        tracker.zero_grad(set_to_none=True)
        (tracks, _, visible), _ = streamed(tracker, video, queries)
        (tracks.square().mean() + visible.sum()).backward()
        return {name: p.grad for name, p in tracker.named_parameters() if p.grad is not None}

    expected = gradients()
    with tritonkern.patch(tracker):
        actual = gradients()
    assert actual.keys() == expected.keys() and any("rg_lru.a_param" in name for name in actual)
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, atol=5e-4 * grad.abs().max().item() + 1e-7, rtol=0, msg=name)


@torch.no_grad()
def test_the_new_method_runs(tracker, monkeypatch):
    tritonkern.patch(tracker, verify=False)
    for kind in (tapnext_like.Convolution, tapnext_like.Unit, tapnext_like.Recurrent):
        monkeypatch.setattr(kind, "forward", None)
    monkeypatch.setattr(tapnext, "_fits", lambda block: True)
    tracker(*clip())


def with_hooks(unit, conv):
    unit.input_gate.register_forward_hook(lambda module, args, output: output + 1)


def with_lora(unit, conv):
    class Added(nn.Module):
        def forward(self, x):
            return x + 0.3

    parametrize.register_parametrization(conv, "w", Added())


def with_another_layer(unit, conv):
    class Doubled(tapnext_like.Heads):
        def forward(self, x):
            return 2 * super().forward(x)

    unit.a_gate.__class__ = Doubled


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [with_hooks, with_lora, with_another_layer])
def test_changed_layers_count(tracker, change, when):
    video, queries = clip()
    plain, changed = tracker(video, queries)[0], copy.deepcopy(tracker)
    of = lambda m: (m.blocks[1].ssm_block.recurrent_block.rg_lru, m.blocks[1].ssm_block.recurrent_block.conv_1d)  # noqa: E731
    change(*of(changed))
    expected = changed(video, queries)[0]
    assert (expected - plain).abs().max() > 1e-2
    if when == "before":
        change(*of(tracker))
    handle = tritonkern.patch(tracker)
    assert len(handle.replaced) == 1 + (when == "after")
    if when == "after":
        tracker(video, queries)
        change(*of(tracker))
    torch.testing.assert_close(tracker(video, queries)[0], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_kernels_of_other_lengths_stay():
    tracker = Tracker().eval()
    block = tracker.blocks[0].ssm_block
    block.recurrent_block = tapnext_like.Recurrent(32, 2, temporal_width=3)
    expected = tracker(*(arguments := clip()))[0]
    assert len(tritonkern.patch(tracker).replaced) == 1
    torch.testing.assert_close(tracker(*arguments)[0], expected, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(tracker, dtype):
    tracker.to(dtype)
    x = torch.randn(6, 3, 32, dtype=dtype)
    block = tracker.blocks[0].ssm_block.recurrent_block
    expected, cache = block(x)
    expected = [expected, block(x, cache)[0]]
    tritonkern.patch(tracker)
    actual, cache = block(x)
    tolerance = 1e-9 if dtype == torch.float64 else 3e-2
    torch.testing.assert_close([actual, block(x, cache)[0]], expected, atol=tolerance, rtol=tolerance)


def test_precision_and_a_similar_model_are_refused(tracker):
    with pytest.raises(ValueError, match="precision: 'bf16' has no meaning for TAPNext"):
        tritonkern.patch(tracker, precision="bf16")
    del tracker.visible_head
    with pytest.raises(ValueError, match=r"TAPNext\) but for a submodule visible_head"):
        tritonkern.patch(tracker)


class EncoderBlock(nn.Module):
    """As much of torchvision's as TAPNext asks for."""

    def __init__(self, num_heads, hidden_dim, mlp_dim, dropout, attention_dropout):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(hidden_dim, 1e-6), nn.LayerNorm(hidden_dim, 1e-6)
        self.self_attention = nn.MultiheadAttention(hidden_dim, num_heads, dropout=attention_dropout, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(hidden_dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, hidden_dim))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


@pytest.fixture
def official_tracker(official, monkeypatch):  # noqa: F811
    """The official class with random weights, narrower than the official ones, in evaluation."""
    models = types.ModuleType("torchvision.models")
    models.vision_transformer = types.SimpleNamespace(EncoderBlock=EncoderBlock)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    tracker = official("tapnet", "tapnet.tapnext.tapnext_torch").TAPNext(
        (64, 64), width=128, num_heads=2, lru_width=128
    )
    for name, parameter in tracker.named_parameters():
        # Most of them are uninitialised memory.
        scale = 1.0 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
        nn.init.normal_(parameter, std=scale if "norm" not in name else 0.1)
        if name.endswith("a_param"):
            nn.init.uniform_(parameter, -6, -1)
    return tracker.eval()


@needs_official
@pytest.mark.slow
def test_official(official_tracker):
    video, queries = clip(6, 20, 64)
    with torch.no_grad():
        *expected, last = official_tracker(video, queries)
        expected_stream, _ = streamed(official_tracker, video, queries)
        with tritonkern.patch(official_tracker) as handle:
            *actual, after = official_tracker(video, queries)
            stream, _ = streamed(official_tracker, video, queries)
            assert len(handle.replaced) == 12 and not handle.kept
    for mine, theirs in ((actual, expected), (stream, expected_stream)):
        assert theirs[0].std() > 1
        torch.testing.assert_close(mine[0], theirs[0], atol=1e-3, rtol=0)
        torch.testing.assert_close(mine[2], theirs[2], atol=1e-3, rtol=0)
    assert_same_state(after, last)

    def gradients():
        official_tracker.zero_grad(set_to_none=True)
        tracks, logits, visible, _ = official_tracker(video, queries)
        (logits.square().mean() + visible.sum()).backward()
        return {name: p.grad for name, p in official_tracker.named_parameters() if p.grad is not None}

    expected = gradients()
    with tritonkern.patch(official_tracker):
        actual = gradients()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, atol=1e-3 * grad.abs().max().item() + 1e-7, rtol=0, msg=name)
