"""`tritonkern.patch` on AllTracker: on a structural twin everywhere, on the official repository where there is one."""

import warnings

import alltracker_like
import pytest
import torch
import torch.nn.functional as F
from alltracker_like import Net
from official import needs_official, official  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from tracker_twins import on_a_cpu

import tritonkern
from tritonkern.integrations import alltracker
from tritonkern.nn import _sequence_attention


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def clip(frames=6, height=64, width=96, batch=1):
    return torch.rand(batch, frames, 3, height, width) * 255


def assert_same(actual, expected):
    assert type(actual) is torch.Tensor
    torch.testing.assert_close(actual, expected, atol=1e-3 if expected.abs().max() > 1 else 1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("cells", [4096, 30])
@pytest.mark.parametrize("frames", [6, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_same_results_on_a_cpu(net, batch, frames, cells, monkeypatch):
    """Two windows of four frames, or optical flow; all cells at a time, or few."""
    monkeypatch.setitem(alltracker.CELLS, "cpu", cells)
    video, keys = clip(frames, batch=batch), list(net.state_dict())
    with on_a_cpu():
        expected = net(video)
    with tritonkern.patch(net) as handle:
        for _ in range(2):
            actual = net(video)
            for result, value in zip(actual[:2], expected[:2], strict=True):
                assert_same(result, value)
            for results, values in zip(actual[2] or [], expected[2] or [], strict=True):
                assert_same(results, values)
        assert list(net.state_dict()) == keys and not handle.kept
    with pytest.raises((AssertionError, RuntimeError)):  # as before: PyTorch has no CUDA here
        net(video)


@pytest.mark.parametrize("cells", [4096, 30])
def test_same_gradients(net, cells, monkeypatch):
    monkeypatch.setitem(alltracker.CELLS, "cpu", cells)
    video = clip(4).double()
    net.double().train()

    def gradients():
        net.zero_grad(set_to_none=True)
        *_, flows, visconfs = net(video, iters=2, is_training=True)
        sum(
            flow.square().mean() + visible.mean() for flow, visible in zip(flows[0], visconfs[0], strict=True)
        ).backward()
        return {name: parameter.grad for name, parameter in net.named_parameters()}

    expected = gradients()
    with tritonkern.patch(net):
        actual = gradients()
    for name, grad in expected.items():
        largest = grad.abs().max().item()
        assert largest > 0 or name == "fnet.0.bias", name
        torch.testing.assert_close(actual[name], grad, atol=1e-5 * largest + 1e-9, rtol=0, msg=name)


@torch.no_grad()
def test_neither_volume_nor_products_are_stored(net, monkeypatch):
    """The largest tensor is a map of all frames, in the resolution of the video."""
    monkeypatch.setitem(alltracker.CELLS, "cpu", 96)
    monkeypatch.setattr(alltracker_like, "CorrBlock", pytest.fail)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
            return result

    video = clip()
    with tritonkern.patch(net, verify=False), Sizes():
        net(video)
    assert max(sizes) <= max(video.numel(), 2 * 6 * 2 * 64 * 96)


@torch.no_grad()
def test_predictions_that_are_dropped_are_not_computed(net):
    layer, video, rows = net.upsample_weight[2], clip(), []
    own = layer.forward
    with tritonkern.patch(net, verify=False):
        layer.forward = lambda x: rows.append(len(x)) or own(x)
        net(video, iters=3)
        assert sum(rows) == 2 * 4  # frames of two windows
        rows.clear()
        features = torch.rand(1, 4, 32, 8, 12)
        results = net.forward_window(features[:, 0], features, torch.rand(4, 2, 8, 12), 3, torch.rand(4, 2, 8, 12))
        assert sum(rows) == 3 * 4
        assert all(type(x) is torch.Tensor for x in (*results[0], *results[1], *results[2:]))


class ReadsAll(Net):
    """A fork whose `forward_window` reads all predictions itself."""

    def upsample_data(self, flow, mask):
        return super().upsample_data(flow, mask)


@torch.no_grad()
def test_an_override_of_the_upsampling_stays_in_force():
    net, video = ReadsAll().eval(), clip()
    with on_a_cpu():
        expected = net(video)
    with pytest.warns(UserWarning, match="upsample_data, as ReadsAll overrides the method of Net"):
        handle = tritonkern.patch(net)
    assert_same(net(video)[0], expected[0])
    handle.restore()


@torch.no_grad()
def test_a_fork_with_another_correlation_gets_its_own_back(net, monkeypatch):
    class Zeros(alltracker_like.CorrBlock):
        def __call__(self, coords):
            return 0.5 * super().__call__(coords)

    monkeypatch.setattr(alltracker_like, "CorrBlock", Zeros)
    video = clip()
    with on_a_cpu():
        expected = net(video)
    with tritonkern.patch(net) as handle:
        with pytest.warns(RuntimeWarning, match="forward_window does not compute"):
            assert_same(net(video)[0], expected[0])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_same(net(video)[0], expected[0])
        assert "forward_window" in handle.kept


@torch.no_grad()
def test_a_fork_whose_layers_mix_frames_gets_them_whole(net, monkeypatch):
    monkeypatch.setitem(alltracker.CELLS, "cpu", 96)
    block = net.update_block.refine[1]

    class Mixing(type(block)):
        def forward(self, input, S=None):
            return super().forward(input + input.mean(0), S)

    block.__class__, video = Mixing, clip()
    with on_a_cpu():
        expected = net(video)
    with tritonkern.patch(net):
        with pytest.warns(RuntimeWarning, match=r"refine\.1\.forward does not compute"):
            assert_same(net(video)[0], expected[0])


@torch.no_grad()
def test_attention_over_time_in_one_window(net, monkeypatch):
    calls, window = [], _sequence_attention.temporal_window_attention
    monkeypatch.setattr(
        _sequence_attention, "temporal_window_attention", lambda *args, **kw: calls.append(1) or window(*args, **kw)
    )
    with tritonkern.patch(net, verify=False):
        net(clip())
    assert calls


def test_refused_or_not_recognised(net):
    with pytest.raises(ValueError, match="precision: 'bf16' is not supported for AllTracker"):
        tritonkern.patch(net, precision="bf16")
    del net.visconf_head
    with pytest.raises(ValueError, match="looks like the model of aharley/alltracker but for a submodule visconf_head"):
        tritonkern.patch(net)


def official_net(official, **options):  # noqa: F811
    """With parameters that make every layer count: those of new layer scales are 1e-6."""
    torch.manual_seed(0)
    net = official("alltracker", "nets.alltracker").Net(16, init_weights=False, **options).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("layer_scale"):
                parameter.fill_(0.1)
    return net


@needs_official
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"use_basicencoder": True, "no_split": True}, {"use_relmotion": True, "use_feats8": True}]
)
@pytest.mark.parametrize("frames", [20, 2])
def test_official(official, options, frames):  # noqa: F811
    net, video = official_net(official, **options), clip(frames, 256, 320)
    with on_a_cpu():
        expected = net(video, iters=2)
    with tritonkern.patch(net) as handle:
        actual = net(video, iters=2)
        assert not handle.kept
    difference = (actual[0] - expected[0]).abs().max().item()
    print(f"flows of up to {expected[0].abs().max():.0f} pixels differ by at most {difference:.1e} pixels")
    assert_same(actual[0], expected[0])
    assert_same(actual[1], expected[1])


@needs_official
@pytest.mark.slow
def test_official_training_step(official):  # noqa: F811
    net, video = official_net(official).train(), clip(16, 256, 256)

    def gradients():
        net.zero_grad(set_to_none=True)
        *_, flows, visconfs = net(video, iters=1, is_training=True)
        sum(F.l1_loss(x, torch.ones_like(x)) for x in (*flows[0], *visconfs[0])).backward()
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    expected = gradients()
    with tritonkern.patch(net):
        actual = gradients()
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, atol=1e-3 * grad.abs().max().item() + 1e-9, rtol=0, msg=name)
