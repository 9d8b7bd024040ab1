"""What all patches have in common: the comparison at the first call, overrides, copies, files, wrappers, errors."""

import copy
import io
import pickle
import sys
import threading
import types
import warnings

import chrono_like
import cotracker_like
import locotrack_like
import pytest
import torch
import torch.nn.functional as F
from cotracker_like import Offline, Online, Predictor
from einops import rearrange
from torch import nn
from torch.nn.utils import parametrize
from tracker_twins import TWINS, ChronoTwin, CoTrackerTwin

import tritonkern
from tritonkern.integrations import find_patch
from tritonkern.integrations.chrono import without_xformers


@pytest.fixture(params=["alltracker", "chrono", "tapir", "locotrack", "cotracker", "cotracker-online"])
def twin(request):
    return TWINS[request.param]()


@pytest.fixture
def strict_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def assert_same(actual, expected, atol=1e-3):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


class Dilated(Offline):
    """A fork whose patches are twice as wide."""

    def get_support_points(self, points, r):
        return points[..., None, None, :] + 2 * (super().get_support_points(points, r) - points[..., None, None, :])


class Zeros(Offline):
    """A fork that reads zeros outside of the map, as MV-TAP can."""

    def get_track_feat(self, fmaps, queried_frames, queried_coords, support_radius=0):
        self.padding = "border"
        return super().get_track_feat(fmaps, queried_frames, queried_coords, support_radius)

    def sample(self, features, points):
        size = torch.tensor([features.shape[-1] - 1, features.shape[-2] - 1])
        grid = (points * (2 / size) - 1).flatten(1, -2)[:, None]
        sampled = F.grid_sample(features, grid, padding_mode="zeros", align_corners=True)
        return sampled[:, :, 0].mT.unflatten(1, points.shape[1:-1])


@torch.no_grad()
def test_first_calls_agree_and_draw_no_random_number(twin, strict_warnings):
    expected = twin.outputs()
    state = torch.get_rng_state()
    with tritonkern.patch(twin.model) as handle:
        assert_same(twin.outputs(), expected)
        assert_same(twin.outputs(), expected)
        assert torch.equal(torch.get_rng_state(), state)
        assert handle.replaced and not handle.kept


@torch.no_grad()
def test_a_fork_with_other_results_gets_its_own_method_back():
    twin = CoTrackerTwin(kind=Dilated)
    expected = twin.outputs()
    with tritonkern.patch(twin.model, verify=False):
        assert (twin.outputs() - expected).abs().max() > 1e-2
    with tritonkern.patch(twin.model) as handle:
        with pytest.warns(RuntimeWarning, match=r"get_correlation_feat does not compute .* \(tolerance") as found:
            assert_same(twin.outputs(), expected)
        assert len(found) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_same(twin.outputs(), expected)
        assert "get_correlation_feat" not in handle.replaced and "fnet.forward" in handle.replaced
        assert "differ" in handle.kept["get_correlation_feat"]


@torch.no_grad()
def test_strict_mode_raises_where_results_differ(monkeypatch):
    twin = CoTrackerTwin(kind=Dilated)
    monkeypatch.setenv("TRITONKERN_STRICT", "1")
    with tritonkern.patch(twin.model):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="get_correlation_feat does not compute"):
                twin.outputs()


@torch.no_grad()
def test_many_layers_that_differ_cause_one_warning():
    twin = CoTrackerTwin()

    class Temperature(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.heads, self.scale = attention.heads, attention.scale
            self.to_q, self.to_kv, self.to_out = attention.to_q, attention.to_kv, attention.to_out

        def forward(self, x, context=None, attn_bias=None):
            attended = cotracker_like.Attention.forward(self, x, context, attn_bias)
            return attended + 0.01 * x

    former = twin.model.updateformer
    former.time, former.gather, former.spread = map(Temperature, (former.time, former.gather, former.spread))
    expected = twin.outputs()
    with tritonkern.patch(twin.model) as handle:
        with pytest.warns(RuntimeWarning, match=r"updateformer\.time\.forward .*and 2 methods like it") as found:
            assert_same(twin.outputs(), expected)
        assert len(found) == 1 and len(handle.kept) == 3


@torch.no_grad()
def test_zeros_outside_of_the_map(strict_warnings):
    twin = CoTrackerTwin(kind=Zeros)
    twin.arguments[1][..., 1:] *= 0.1  # near a corner
    expected = twin.outputs()
    with tritonkern.patch(twin.model) as handle:
        assert_same(twin.outputs(), expected)
        assert "get_correlation_feat" in handle.replaced


class Fused(Offline):
    """As DiTracker: correlations of another network are added, patches are normalised, einops reorders them."""

    def refine(self, levels, supports, coords, vis, conf, iters):
        real, side = self.get_correlation_feat, 2 * self.corr_radius + 1

        def heard(fmaps, points):
            patches = real(fmaps, points)
            assert isinstance(patches, torch.Tensor)
            by_einops = rearrange(patches, "b t n h w c -> (b t) n h w c")
            patches = F.normalize(rearrange(by_einops, "(b t) n h w c -> b t n h w c", b=len(fmaps)), dim=-1)
            support = torch.ones(*patches.shape[:1], patches.shape[2], side, side, patches.shape[-1])
            volume = torch.einsum("btnhwc,bnijc->btnhwij", real(fmaps, points), support)
            volume = F.softmax(volume.flatten(-4, -3), dim=-3).unflatten(-3, (side, side))
            return patches * (1 + volume.mean((-2, -1)))[..., None]

        self.__dict__["get_correlation_feat"] = heard
        try:
            return super().refine(levels, supports, coords, vis, conf, iters)
        finally:
            del self.__dict__["get_correlation_feat"]


def test_a_fork_that_does_more_with_patches_gets_real_tensors():
    twin = CoTrackerTwin(kind=Fused)

    def run():
        twin.model.zero_grad()
        result = twin.outputs()
        result.square().mean().backward()
        return result, twin.model.fnet.conv.weight.grad.clone()

    expected, gradient = run()
    with tritonkern.patch(twin.model):
        actual, actual_gradient = run()
    assert_same(actual, expected)
    assert_same(actual_gradient, gradient, atol=1e-4 * gradient.abs().max().item())


def test_gradients_reach_features_whoever_reads_the_patches():
    """Also code that autograd functions hide from PyTorch's Python functions."""
    tracker, points = Offline(), torch.rand(2, 3, 2) * 8
    features = torch.rand(1, 2, 8, 9, 12, requires_grad=True)
    uses = (
        lambda patches: patches.exp(),
        lambda patches: torch.utils.checkpoint.checkpoint(torch.exp, patches, use_reentrant=True),
        lambda patches: torch.utils.checkpoint.checkpoint(torch.exp, patches, use_reentrant=False),
        lambda patches: torch.stack([patches, patches])[0].exp(),
    )
    for use in uses:

        def gradient(use=use):
            features.grad = None
            use(tracker.get_correlation_feat(features, points)).sum().backward()
            return features.grad

        expected = gradient()
        with tritonkern.patch(tracker, verify=False):
            assert_same(gradient(), expected, atol=1e-4)


class Counting(Offline):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def get_correlation_feat(self, fmaps, queried_coords):
        self.calls += 1
        return super().get_correlation_feat(fmaps, queried_coords)


@torch.no_grad()
def test_a_method_that_a_subclass_overrides_stays_in_force():
    twin = CoTrackerTwin(kind=Counting)
    expected, calls = twin.outputs(), twin.model.calls
    message = "get_correlation_feat, as Counting overrides the method of Offline"
    with pytest.warns(UserWarning, match=message):
        handle = tritonkern.patch(twin.model)
    assert_same(twin.outputs(), expected)
    assert twin.model.calls == 2 * calls
    assert handle.kept == {"get_correlation_feat": "Counting overrides the method of Offline"}
    handle.restore()


@torch.no_grad()
def test_an_attribute_of_the_module_stays_in_force():
    """A wrapper that had put a `forward` of its own on the instance."""
    twin, calls = CoTrackerTwin(), []
    time, own = twin.model.updateformer.time, twin.model.updateformer.time.forward
    expected = twin.outputs()
    time.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    with pytest.warns(UserWarning, match=r"time\.forward, as the module has an attribute forward of its own, .*lambda"):
        handle = tritonkern.patch(twin.model)
    assert_same(twin.outputs(), expected)
    assert calls and "updateformer.time.forward" not in handle.replaced
    handle.restore()
    assert "forward" in vars(time)


def test_subclasses_in_modules_of_their_own():
    module = types.ModuleType("a_module_of_its_own")
    sys.modules[module.__name__] = module
    try:
        twin = ChronoTwin()
        exec("class Mine(Base): pass", vars(module) | {"Base": chrono_like.Tracker}, vars(module))
        module.Mine.__module__ = module.__name__
        twin.model.__class__ = module.Mine
        with torch.no_grad():
            expected = twin.outputs()
            with tritonkern.patch(twin.model):
                assert_same(twin.outputs(), expected)
    finally:
        del sys.modules[module.__name__]


def test_forks_are_told_what_they_lack():
    fork = Offline()
    fork.corr_mlp = cotracker_like.Mlp(2 * 49 * 49, 24, 12)
    with pytest.raises(ValueError) as error:
        tritonkern.patch(nn.ModuleDict({"tracker": fork}))
    message = "tracker (Offline) looks like the model of facebookresearch/co-tracker (CoTracker3) but for corr_mlp.fc1"
    assert f"{message} with 2401 inputs (it has 4802)" in str(error.value)
    del fork.fnet
    with pytest.raises(ValueError, match=r"but for a submodule fnet, corr_mlp\.fc1"):
        tritonkern.patch(fork)
    with pytest.raises(ValueError) as error:
        tritonkern.patch(nn.Linear(2, 2))
    assert "looks like" not in str(error.value)


class Front:
    """As sinapsis-cotracker's templates and the tracker of track-4dgs: no module, with a predictor as an attribute."""

    def __init__(self, predictor, name="cotracker"):
        setattr(self, name, predictor)
        self.attributes = {"device": "cpu"}


def test_objects_that_hold_a_module():
    twin = CoTrackerTwin()
    for front, path in (
        (Front(Predictor(twin.model)), "cotracker.model"),
        (Front(Front(twin.model, "model"), "tracker"), "tracker.model"),
        ({"offline": twin.model}, "offline"),
        ([twin.model], "0"),
    ):
        with tritonkern.patch(front) as handle:
            assert f"{path}.get_correlation_feat" in handle.replaced
            assert sorted(find_patch(front).replaced) == sorted(handle.replaced)
    assert find_patch(twin.model) is None
    with pytest.raises(TypeError, match=r"got Front, whose attributes \(attributes, keypoints\) hold none; pass"):
        tritonkern.patch(Front([1, 2], "keypoints"))
    with pytest.raises(ValueError, match="neither Front nor one of its submodules"):
        tritonkern.patch(Front(nn.Linear(2, 2)))


@torch.no_grad()
def test_copies_are_patched_and_independent(twin):
    expected = twin.outputs()
    with tritonkern.patch(twin.model):
        shallow, deep = copy.copy(twin.model), copy.deepcopy(twin.model)
    original = twin.model
    for made in (shallow, deep):
        twin.model = made
        assert_same(twin.outputs(), expected)
        handle = find_patch(made)
        assert handle.replaced
        with pytest.raises(ValueError, match=r"patched already, at .*find_patch\(model\)"):
            tritonkern.patch(made)
    # Attributes of a shallow copy are its own.
    shallow.softmax_temperature = shallow.stride = 0.123
    assert getattr(original, "softmax_temperature", None) != 0.123 and getattr(original, "stride", None) != 0.123
    for parameter in deep.parameters():
        parameter.mul_(1.1)
    twin.model = deep
    changed = twin.outputs()
    find_patch(deep).restore()
    assert find_patch(deep) is None
    assert_same(twin.outputs(), changed)
    assert (changed - expected).abs().max() > 1e-3
    twin.model = original
    assert torch.equal(twin.outputs(), expected)


@torch.no_grad()
def test_a_shallow_copy_runs_its_own_layers():
    tracker, (features, points) = Offline(), (torch.rand(1, 2, 8, 9, 12), torch.rand(2, 3, 2) * 8)
    with tritonkern.patch(tracker):
        twin = copy.copy(tracker)
        twin.corr_radius = 1
        assert twin.get_correlation_feat(features, points).shape == (1, 2, 3, 3, 3, 8)
        attention = copy.copy(tracker.updateformer.time)
        attention._modules = {name: copy.deepcopy(child) for name, child in attention._modules.items()}
        attention.to_out.weight.zero_(), attention.to_out.bias.zero_()
        assert not attention(torch.rand(2, 5, 16)).any()


@torch.no_grad()
def test_replicas_of_data_parallel_run_on_their_own_tensors():
    """`torch.nn.DataParallel` copies modules so, and gives each copy the parameters on its device."""
    attention = Offline().updateformer.time
    tracker = Offline()
    tracker.updateformer.time = attention
    x = torch.rand(2, 5, 16)
    with tritonkern.patch(tracker):
        replica = attention._replicate_for_data_parallel()
        for name, layer in attention.named_children():
            other = layer._replicate_for_data_parallel()
            other.weight, other.bias = layer.weight * 2, layer.bias * 2
            replica._modules[name] = other
        actual = replica(x)
    for parameter in attention.parameters():
        parameter.mul_(2)
    assert_same(actual, attention(x), atol=1e-5)


@torch.no_grad()
def test_files_hold_the_unpatched_model(twin):
    expected = twin.outputs()
    buffer = io.BytesIO()
    with tritonkern.patch(twin.model), without_xformers():
        torch.save(twin.model, buffer)
        loaded = [pickle.loads(pickle.dumps(twin.model)), torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)]
        assert find_patch(twin.model) is not None
    for model in loaded:
        assert type(model) is type(twin.model) and find_patch(model) is None
        twin.model = model
        assert torch.equal(twin.outputs(), expected)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_traces_hold_operators_of_pytorch_alone():
    attention, x = Offline(), torch.rand(2, 5, 16)
    with tritonkern.patch(attention):
        time = attention.updateformer.time
        traced = torch.jit.trace(time, (x,))
        assert "tritonkern" not in str(traced.inlined_graph)
        assert_same(traced(x), time(x), atol=1e-5)


@torch.no_grad()
def test_parametrized_after_the_patch_and_restored():
    class Shifted(nn.Module):
        def forward(self, x):
            return x + 0.1

    twin = CoTrackerTwin()
    twin.model.updateformer.time.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    handle = tritonkern.patch(twin.model)
    time = twin.model.updateformer.time
    parametrize.register_parametrization(time, "weight", Shifted())
    patched = twin.outputs()
    handle.restore()
    assert find_patch(twin.model) is None and parametrize.is_parametrized(time)
    assert time.weight.item() == pytest.approx(0.1)
    assert isinstance(time, cotracker_like.Attention)
    assert_same(twin.outputs(), patched)


@torch.no_grad()
def test_tensors_without_numbers_are_compared_later():
    from torch._subclasses.fake_tensor import FakeTensorMode

    twin = CoTrackerTwin(kind=Dilated)
    with tritonkern.patch(twin.model):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            twin.model.get_correlation_feat(mode.from_tensor(torch.rand(1, 2, 8, 9, 12)), torch.rand(2, 3, 2)).sum()
        with pytest.warns(RuntimeWarning, match="get_correlation_feat does not compute"):
            twin.outputs()


@torch.no_grad()
def test_first_calls_of_two_threads():
    twin = CoTrackerTwin()
    expected, results = twin.outputs(), []
    with tritonkern.patch(twin.model):
        threads = [threading.Thread(target=lambda: results.append(twin.outputs())) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for actual in results:
        assert_same(actual, expected)
    assert len(results) == 3


@torch.no_grad()
@pytest.mark.parametrize("name", ["locotrack", "cotracker"])
def test_moved_to_another_dtype_after_the_patch(name):
    twin = TWINS[name]()
    with tritonkern.patch(twin.model):
        twin.outputs()
        twin.model.double()
        twin.arguments = tuple(x.double() for x in twin.arguments)
        patched = twin.outputs()
    assert_same(patched, twin.outputs())


def test_one_of_two_models_is_patched():
    one, other = locotrack_like.Tracker(), locotrack_like.Tracker()
    before = type(one)
    with tritonkern.patch(one):
        assert type(other) is before and one.__class__.__name__ == "Tracker" and isinstance(one, before)
    assert type(one) is before


def test_online_windows_of_an_encoder_that_mixes_frames():
    """Features of shared frames are kept only if a frame's features do not depend on the frames beside it."""

    class Mixing(cotracker_like.Encoder):
        def forward(self, images):
            features = super().forward(images)
            return features + features.mean(0, keepdim=True)

    tracker = Online()
    tracker.fnet.__class__ = Mixing
    predictor, video = Predictor(tracker), torch.rand(1, 12, 3, 64, 96) * 255
    queries = torch.tensor([[[0, 20.0, 30.0], [2, 50.0, 40.0]]])

    def run():
        predictor(video[:, :8], queries, is_first_step=True)
        return [predictor(video[:, :8])[0], predictor(video[:, 4:])[0]]

    expected = run()
    with tritonkern.patch(predictor), pytest.warns(RuntimeWarning, match=r"model\.fnet\.forward does not compute"):
        actual = run()
    assert_same(actual, expected)
