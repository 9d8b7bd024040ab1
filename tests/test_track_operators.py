"""Operators of track attention: positions and variances that are not finite, bad arguments."""

import pytest
import torch
from functions import tracks_and_grid
from oracle import fast_backends

from tritonkern import track_sample_attention, track_splat_attention
from tritonkern.ops.track_attention import op

FWD, BWD = op.track_attention_fwd, op.track_attention_bwd
BOTH = pytest.mark.parametrize("splat", [False, True], ids=["sample", "splat"])
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=fast_backends(op.NAME))
def where(request):
    return request.param


def arguments(splat, device):
    """query, key, value, tracks, visible, inverse_variance."""
    *tensors, inverse_variance, visible = (x.to(device) for x in tracks_and_grid(splat).values())
    return *tensors, visible, inverse_variance


@BOTH
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_operators_take_no_track_whose_position_is_not_finite(where, splat, bad):
    """Also where the mask says that it is visible, or there is no mask."""
    query, key, value, tracks, _, inverse_variance = arguments(splat, where[1])
    visible = torch.ones(tracks.shape[:-1], dtype=torch.bool, device=where[1])
    visible[:, 1:, 2:4] = visible[0, 0] = False
    poisoned = tracks.masked_fill(~visible[..., None], bad)
    poisoned[..., 0] = torch.where(visible | (torch.rand(visible.shape, device=where[1]) < 0.5), poisoned[..., 0], 1.0)
    options = 0.3, splat, True

    def run(tracks, visible):
        inputs = query, key, value, tracks, visible, inverse_variance
        out = FWD(*inputs, *options, where[0])
        return out, *BWD(query, *inputs, *options, [True, True], where[0])

    expected = run(tracks, visible)
    for mask in (visible, torch.ones_like(visible), None):
        for x, y in zip(run(poisoned, mask), expected, strict=True):
            assert torch.equal(x, y)
    none = run(torch.full_like(tracks, bad), None)
    assert all((x == 0).all() for x in none)


@BOTH
@pytest.mark.parametrize("inverse_variance", [-3.0, 0.0, INF, NAN])
def test_operators_with_any_inverse_variance_stay_in_bounds(where, splat, inverse_variance):
    """No check reads this value. Zero means no bias, and a negative one gives the formula's result."""
    *inputs, _ = arguments(splat, where[1])
    inputs = [x if x.dtype == torch.bool else x.double() for x in inputs]
    inputs.append(torch.tensor(inverse_variance, dtype=torch.float64, device=where[1]))
    out = FWD(*inputs, 0.3, splat, True, where[0])
    grads = BWD(out, *inputs, 0.3, splat, True, [True, True], where[0])
    if inverse_variance <= 0:
        expected = FWD(*inputs, 0.3, splat, True, "reference")
        torch.testing.assert_close(out, expected)
        for x, y in zip(grads, BWD(out, *inputs, 0.3, splat, True, [True, True], "reference"), strict=True):
            torch.testing.assert_close(x, y)


QUERY, KEY, VALUE, TRACKS, _, MASK = tracks_and_grid(splat=False).values()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"value": VALUE.double()}, TypeError, "value must have the dtype of query"),
        ({"query": QUERY[0]}, ValueError, r"query must have shape \[B, T, M, H, D\]"),
        ({"key": KEY[:, :, 0]}, ValueError, r"key must have shape \[B, T, h, w, H, D\]"),
        ({"key": KEY[:, :2]}, ValueError, "key must have the B, T, H and D of query"),
        ({"value": VALUE[:, :, :3]}, ValueError, "value must have the shape of key"),
        ({"key": KEY[:, :, :0], "value": VALUE[:, :, :0]}, ValueError, "key must have at least one cell"),
        ({"tracks": TRACKS[..., :1]}, ValueError, r"tracks must have shape \(2, 3, 6, 2\)"),
        ({"tracks": TRACKS[:, :, :4]}, ValueError, r"tracks must have shape \(2, 3, 6, 2\)"),
        ({"sigma": 0.0}, ValueError, "sigma must be positive, got 0.0"),
        ({"sigma": -1}, ValueError, "sigma must be positive"),
        ({"sigma": NAN}, ValueError, "sigma must be positive"),
        ({"sigma": "wide"}, TypeError, "sigma must be a number, got str"),
        ({"sigma": None}, TypeError, "sigma must be a number, got NoneType"),
        ({"sigma": torch.ones(2)}, ValueError, "sigma must be a number or a 0-d"),
        ({"sigma": torch.tensor(1)}, TypeError, "sigma must be float64, .* got torch.int64"),
        ({"scale": torch.tensor(1.0)}, TypeError, "scale must be a number"),
        ({"scale": 1e20}, ValueError, r"scale must be from -2\*\*64 to 2\*\*64"),
        ({"scale": -INF}, ValueError, r"scale must be from -2\*\*64 to 2\*\*64"),
        ({"scale": NAN}, ValueError, r"scale must be from -2\*\*64 to 2\*\*64"),
        ({"visibility": MASK[:1]}, ValueError, r"visibility must have shape \(2, 3, 6\)"),
        ({"visibility": MASK.to("meta")}, ValueError, r"visibility must have shape \(2, 3, 6\) on cpu"),
        ({"culling": 1}, TypeError, "culling must be a bool"),
        ({"backend": "cuda"}, ValueError, "backend must be one of cpp, triton, reference or None"),
        ({"query": QUERY[..., :4], "key": KEY[..., :4], "value": VALUE[..., :4]}, ValueError, "multiple of 8 .* got 4"),
        ({"query": QUERY[..., :0], "key": KEY[..., :0], "value": VALUE[..., :0]}, ValueError, "multiple of 8 .* got 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments(arguments, error, message):
    good = {"query": QUERY, "key": KEY, "value": VALUE, "tracks": TRACKS}
    with pytest.raises(error, match=message):
        track_sample_attention(**{**good, **arguments})


def test_splatting_names_its_own_shapes():
    with pytest.raises(ValueError, match=r"query must have shape \[B, T, h, w, H, D\]"):
        track_splat_attention(QUERY, KEY, VALUE, TRACKS)
    with pytest.raises(ValueError, match="query must have at least one cell"):
        track_splat_attention(KEY[:, :, :0], QUERY, QUERY, TRACKS)
