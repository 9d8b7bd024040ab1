"""`tritonkern.patch(model, precision=...)` on the structural twins of the models with a local correlation.

Most tests count or change the calls of the correlation: the comparison at the first call is switched off there.
"""

import warnings
from functools import partial

import chrono_like
import locotrack_like
import pytest
import torch
from torch import nn
from tracker_twins import TWINS

import tritonkern
from tritonkern.integrations import _precision
from tritonkern.integrations.chrono import without_xformers

NAMES = ("tapir", "locotrack", "cotracker", "cotracker-online")


@pytest.fixture(params=NAMES)
def twin(request):
    return TWINS[request.param]()


def correlating(twin, monkeypatch, change):
    """Has what the patched model calls go through `change(operation, *arguments, **options)`."""
    operation = getattr(tritonkern, twin.operation)
    monkeypatch.setattr(twin.module, twin.operation, partial(change, operation))


@torch.no_grad()
def test_bf16_is_used_and_close(twin, monkeypatch):
    """Within a twentieth of what the correlation contributes to the tracks: eight bits keep a hundredth or so."""
    own = twin.tracks()
    with tritonkern.patch(twin.model, verify=False):
        exact = twin.tracks()
    with tritonkern.patch(twin.model, precision="bf16", verify=False):
        rounded = twin.tracks()
    assert rounded.dtype == torch.float32
    assert torch.equal(twin.tracks(), own)

    correlating(twin, monkeypatch, lambda operation, *tensors, **options: 0 * operation(*tensors, **options))
    with tritonkern.patch(twin.model, verify=False):
        contribution = (twin.tracks() - exact).abs().max()
    error = (rounded - exact).abs().max()
    assert 0 < error < contribution / 20


@torch.no_grad()
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_rounding_is_no_difference(twin, precision):
    with warnings.catch_warnings(), tritonkern.patch(twin.model, precision=precision) as handle:
        warnings.simplefilter("error")
        twin.tracks()
        assert not handle.kept


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "dtype"),
    # TAPIR itself converts what it has correlated to float32.
    [*((name, torch.float32) for name in NAMES), ("locotrack", torch.float64), ("cotracker", torch.float64)],
)
def test_bf16_rounds_the_correlation_and_nothing_else(name, dtype, monkeypatch):
    twin, seen = TWINS[name](dtype), []

    def record(operation, features, support, coords, *layer, **options):
        result = operation(features, support, coords, *layer, **options)
        seen.append(result)
        assert all(x.dtype == torch.bfloat16 for x in (features, support, *layer, result))
        # Positions are not rounded.
        assert coords.dtype == dtype
        return result

    correlating(twin, monkeypatch, record)
    with tritonkern.patch(twin.model, precision="bf16", verify=False):
        assert twin.tracks().dtype == dtype
    assert seen


@torch.no_grad()
def test_features_are_rounded_once(twin, monkeypatch):
    """Every iteration and chunk of queries reads the same rounded maps; another video has others."""
    maps = []

    def record(operation, features, *arguments, **options):
        maps.append(features)
        return operation(features, *arguments, **options)

    correlating(twin, monkeypatch, record)
    with tritonkern.patch(twin.model, precision="bf16", verify=False):
        first = twin.tracks()
        places = {x.data_ptr() for x in maps}
        assert len(places) < len(maps)
        video, queries = twin.arguments
        twin.arguments = video.flip(1), queries
        assert not torch.equal(twin.tracks(), first)
        twin.arguments = video, queries
        assert torch.equal(twin.tracks(), first)


def test_features_that_were_written_to_are_rounded_again():
    precision, features = _precision.Precision("bf16"), torch.ones(3)
    first = precision.rounded(features)
    assert precision.rounded(features) is first
    features.mul_(2)
    assert torch.equal(precision.rounded(features), torch.full((3,), 2.0, dtype=torch.bfloat16))


def gradients(twin):
    twin.model.zero_grad(set_to_none=True)
    twin.tracks().square().mean().backward()
    return {name: p.grad for name, p in twin.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_gradients(twin, precision):
    with tritonkern.patch(twin.model, verify=False):
        expected = gradients(twin)
    with tritonkern.patch(twin.model, precision=precision, verify=False):
        actual = gradients(twin)
    assert actual.keys() == expected.keys()
    # What is left of gradients that are zero, such as that of the keys' bias
    rounding = 1e-6 * max(grad.norm() for grad in expected.values())
    for name, grad in expected.items():
        assert actual[name].dtype == torch.float32
        if precision == "tf32":  # on a CPU nothing changes
            assert torch.equal(actual[name], grad), name
        else:
            difference = (actual[name] - grad).norm()
            assert difference <= 0.1 * grad.norm() + rounding, (name, difference / grad.norm())
    assert precision == "tf32" or any(not torch.equal(actual[name], grad) for name, grad in expected.items())


def allowed():
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


@torch.no_grad()
@pytest.mark.parametrize("before", ["highest", "high"])
def test_tf32_is_allowed_during_the_call_alone(twin, monkeypatch, before):
    seen, asked = [], torch.get_float32_matmul_precision()

    def record(operation, *arguments, **options):
        seen.append(allowed())
        return operation(*arguments, **options)

    def fail(operation, *arguments, **options):
        raise RuntimeError("out of memory")

    try:
        torch.set_float32_matmul_precision(before)
        setting = allowed()
        expected = twin.tracks()
        correlating(twin, monkeypatch, record)
        with tritonkern.patch(twin.model, precision="tf32", verify=False):
            actual = twin.tracks()
            assert set(seen) <= {"tf32", True} and seen
            assert allowed() == setting and torch.get_float32_matmul_precision() == before
        correlating(twin, monkeypatch, fail)
        with (
            tritonkern.patch(twin.model, precision="tf32", verify=False),
            pytest.raises(RuntimeError, match="out of memory"),
        ):
            twin.tracks()
        assert allowed() == setting and torch.get_float32_matmul_precision() == before
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)
        seen.clear()
        correlating(twin, monkeypatch, record)
        with tritonkern.patch(twin.model, verify=False):
            twin.tracks()
        assert set(seen) == {setting}
    finally:
        torch.set_float32_matmul_precision(asked)


def test_a_users_inherited_setting_stays():
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this PyTorch has one setting")
    torch.backends.fp32_precision = "tf32"
    try:
        with _precision.tf32():
            assert matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = "none"


@pytest.mark.parametrize(("asked", "name"), [("float32", "float32"), ("tf32", "tf32"), ("bfloat16", "bf16")])
def test_the_handle_shows_the_precision(asked, name):
    with tritonkern.patch(locotrack_like.Tracker(), precision=asked) as handle:
        assert handle.precision == name
        assert f"precision={name}: " in repr(handle) and handle.replaced[0] in repr(handle)
    assert repr(handle) == f"<tritonkern.Patch, precision={name}: restored>"


@torch.no_grad()
def test_bfloat16_is_bf16(twin):
    with tritonkern.patch(twin.model, precision="bf16", verify=False):
        expected = twin.tracks()
    with tritonkern.patch(twin.model, precision="bfloat16"):
        assert torch.equal(twin.tracks(), expected)


def test_errors(twin):
    for name in ("float16", "TF32", None, True):
        with pytest.raises(ValueError, match=rf"one of float32, tf32, bf16 \(or bfloat16\), got {name!r}"):
            tritonkern.patch(twin.model, precision=name)
    assert not any("forward" in module.__dict__ for module in twin.model.modules())


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_chrono_has_no_local_correlation(precision):
    with without_xformers():
        tracker = chrono_like.Tracker()
    for model in (tracker, nn.ModuleList([locotrack_like.Tracker(), tracker])):
        with pytest.raises(ValueError, match=f"{precision}' has no meaning for the official Chrono"):
            tritonkern.patch(model, precision=precision)
        assert not any("forward" in module.__dict__ for module in model.modules())
