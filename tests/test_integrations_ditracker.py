"""`tritonkern.patch` on DiTracker: on a structural twin everywhere, on the official code where there is some."""

import sys
import types

import pytest
import torch
from cotracker_like import Offline
from ditracker_like import DiTracker
from official import needs_official, official  # noqa: F401
from test_integrations_cotracker import assert_same, clip
from torch import nn

import tritonkern
from tritonkern.integrations import ditracker

FORMS = [("concat", True), ("add", True), (None, True), ("concat", False), ("add", False)]
EVERY_FORM = pytest.mark.parametrize(("fuse", "cost_softmax"), FORMS)


@EVERY_FORM
@pytest.mark.parametrize("layers", [1, 2])
def test_same_results_and_gradients(fuse, cost_softmax, layers):
    torch.manual_seed(0)
    tracker = DiTracker(fuse, cost_softmax, layers).double()
    video, queries = (x.double() for x in clip(frames=3, queries=4, batch=layers))

    def run():
        tracker.zero_grad(set_to_none=True)
        *results, steps = tracker(video, queries, is_train=True)
        sum(tracks.square().mean() + vis.sum() + conf.square().sum() for tracks, vis, conf in steps).backward()
        return results, {name: x.grad for name, x in tracker.named_parameters()}

    expected, expected_grads = run()
    with tritonkern.patch(tracker) as handle:
        actual, grads = run()
        assert "get_correlation_feat" in handle.replaced and not handle.kept
    assert (expected[0] - queries[:, None, :, 1:]).abs().mean() > 0.5  # points move
    assert_same(actual, expected)
    for name, grad in expected_grads.items():
        if grad is None:
            assert grads[name] is None
        else:
            torch.testing.assert_close(grads[name], grad, atol=1e-5 * grad.abs().max().item() + 1e-9, rtol=0, msg=name)


@EVERY_FORM
def test_costs_are_never_stored(fuse, cost_softmax, monkeypatch):
    """One call per level and iteration, of as many pairs as there are costs; the cosine is the model's own."""
    calls, linear = [], ditracker.local_correlation_linear
    monkeypatch.setattr(
        ditracker, "local_correlation_linear", lambda maps, *x, **kw: calls.append(len(maps)) or linear(maps, *x, **kw)
    )
    tracker, (video, queries) = DiTracker(fuse, cost_softmax), clip(frames=3, queries=4)
    with tritonkern.patch(nn.ModuleDict({"model": tracker}), verify=False) as handle, torch.no_grad():
        assert "model.get_correlation_feat" in handle.replaced
        if cost_softmax:
            monkeypatch.setattr(Offline, "get_correlation_feat", None)
        tracker(video, queries)
    assert calls == ([2 if fuse else 1] * 4 if cost_softmax else [])


def test_the_last_block_ends_before_its_attention():
    tracker, (video, queries) = DiTracker(), clip(frames=3, queries=4)
    blocks = tracker.dit_fnet.transformer.transformer_blocks
    with tritonkern.patch(tracker, verify=False) as handle, torch.no_grad():
        assert "dit_fnet.transformer.transformer_blocks.2.forward" in handle.replaced
        tracker(video, queries, iters=1)
        assert [block.attended for block in blocks] == [1, 1, 0, 0]
        tracker.dit_fnet.layer_hooks = [3]  # the third one is not the last any more
        actual = tracker(video, queries, iters=1)
        assert [block.attended for block in blocks] == [2, 2, 1, 1]
    with torch.no_grad():
        assert_same(actual, tracker(video, queries, iters=1))


def test_hooks_behind_the_attention_of_the_last_block_run():
    tracker, (video, queries) = DiTracker(), clip(frames=3, queries=4)
    block, seen = tracker.dit_fnet.transformer.transformer_blocks[2], []
    with tritonkern.patch(tracker, verify=False), torch.no_grad():
        handles = [x.register_forward_hook(lambda *_: seen.append(1)) for x in list(block.modules())[1:]]
        tracker(video, queries, iters=1)
        assert block.attended == 1 and seen
        for handle in handles:
            handle.remove()


def test_other_uses_of_the_costs():
    """What is none of the model's steps works on real numbers, through which gradients flow."""
    tracker = DiTracker()
    features, points = torch.rand(2, 3, 8, 9, 12), torch.rand(6, 4, 2) * 9
    support, weight = torch.rand(2, 4, 7, 7, 8, requires_grad=True), torch.rand(5, 2401)

    def uses():
        patches = tracker.get_correlation_feat(features, points)
        layered = patches.reshape(1, 2, 3, 4, 7, 7, 8)
        product = torch.einsum("btnhwc,bnijc->btnhwij", patches, support)
        flat = (product / 3).flatten(-4, -3)
        cost = flat.softmax(-3)
        rows = cost.reshape(24, -1)
        yield layered.mean(-1)
        yield torch.einsum("bktnhwc,bknijc->bktnijhw", layered, support[None])
        yield torch.einsum("bktnhwc,bknijc->bktnhwij", layered, support[None]).mean(1)
        yield product + 1
        yield product / product
        yield flat.softmax(-1)
        yield flat.softmax(2).sum(-3)
        yield torch.nn.functional.softmax(flat, dim=-3, dtype=torch.float64)
        yield cost.mean(1)
        yield cost + product.flatten(-4, -3)
        yield cost * 2
        yield torch.cat([rows, rows])
        yield torch.cat([rows, rows, rows], -1)
        yield torch.nn.functional.linear(product.reshape(24, -1), weight)
        yield torch.nn.functional.linear(cost, torch.rand(2, 7, generator=torch.Generator().manual_seed(0)))
        moved = tracker.get_correlation_feat(features, points + 1)
        other = (torch.einsum("btnhwc,bnijc->btnhwij", moved, support) / 3).flatten(-4, -3).softmax(-3)
        yield torch.nn.functional.linear(other.reshape(24, -1) + rows, weight)
        yield torch.nn.functional.linear((2 * cost / 2).reshape(24, -1), weight, None)

    def results():
        made = list(uses())
        return made, torch.autograd.grad(sum(x.double().sin().sum() for x in made if x.requires_grad), support)[0]

    expected, grad = results()
    with tritonkern.patch(tracker):
        actual, patched_grad = results()
    for result, value in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(patched_grad, grad, rtol=1e-3, atol=1e-4)


def test_what_is_not_supported():
    with pytest.raises(ValueError, match="'bf16' is not supported for DiTracker"):
        tritonkern.patch(DiTracker(), precision="bf16")
    tracker = DiTracker()
    tracker.corr_radius = 2
    with pytest.raises(
        ValueError, match="looks like the model of cvlab-kaist/DiTracker but for corr_mlp.fc1 with 1250"
    ):
        tritonkern.patch(tracker)


class Maps(nn.Module):
    """Queries and keys of the transformer, at random."""

    def forward(self, video):
        generator = torch.Generator().manual_seed(video.shape[1])
        size = (*video.shape[:2], 64, video.shape[-2] // 16, video.shape[-1] // 16)
        return [3 * torch.randn(size, generator=generator) for _ in range(2)]


@needs_official
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fuse", "cost_softmax", "frames"), [(*FORMS[0], 15), (*FORMS[1], 5), (*FORMS[2], 5), (*FORMS[3], 5)]
)
def test_official(official, monkeypatch, fuse, cost_softmax, frames):  # noqa: F811
    """Without the transformer, with a refiner of random weights whose points move; three iterations."""
    stub = types.ModuleType("cotracker.models.core.cotracker.feature_extractor")
    stub.VDMEncoder = lambda **_: Maps()
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    module = official("DiTracker", "cotracker.models.core.cotracker.ditracker")
    torch.manual_seed(0)
    options = dict(latent_dim=64, window_len=60, model_resolution=(480, 720), head_hooks=[2])
    model = module.DiTracker(**options, resnet_fuse_mode=fuse, cost_softmax=cost_softmax).eval()
    model.updateformer.flow_head.weight.data *= 100
    video, queries = clip(frames=frames, height=96, width=144, queries=8)
    with torch.no_grad():
        expected = model(video, queries, iters=3)
        with tritonkern.patch(model) as handle:
            actual = model(video, queries, iters=3)
    assert len(handle.replaced) == 3 + 3 * 3 + 1 + (fuse is not None) and not handle.kept
    difference = (actual[0] - expected[0]).abs().max().item()
    moved = (expected[0] - queries[:, None, :, 1:]).abs().max().item()
    print(f"tracks differ by at most {difference:.1e} pixels; points move by up to {moved:.1f}")
    assert moved > 1
    assert_same(actual, expected)
