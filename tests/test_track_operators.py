"""Track attention with PyTorch's tools: opcheck, compile, export, autocast, checkpointing, bad arguments."""

import pytest
import torch
from oracle import fast_backends, gradients
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tritonkern import track_sample_attention, track_splat_attention
from tritonkern.ops.track_attention import op

FWD, BWD = op.track_attention_fwd, op.track_attention_bwd
BOTH = pytest.mark.parametrize("splat", [False, True], ids=["sample", "splat"])
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=fast_backends(op.NAME))
def where(request):
    return request.param


def tensors(splat, device="cpu", B=2, T=3, M=6, grid=(4, 5), D=8, dtype=torch.float32):
    """query, key, value, tracks."""
    tracked, gridded = (B, T, M, 2, D), (B, T, *grid, 2, D)
    shapes = (gridded, tracked, tracked) if splat else (tracked, gridded, gridded)
    return [*(torch.randn(x, device=device).to(dtype) for x in shapes), torch.rand(B, T, M, 2, device=device) * 5]


def attend(splat, backend=None, **options):
    function = track_splat_attention if splat else track_sample_attention
    return lambda *x: function(*x, backend=backend, **options)


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "empty": lambda x: x[:, :0],
}


def arguments(splat, device, layout):
    """query, key, value, tracks, visible, inverse_variance."""
    query, key, value, tracks = map(LAYOUTS[layout], tensors(splat, device))
    visible = torch.rand(tracks.shape[:-1], device=device) > 0.3
    return query, key, value, tracks, visible, torch.tensor(2.0, device=device)


@BOTH
@pytest.mark.parametrize("layout", ["transposed", "empty"])
def test_opcheck(where, splat, layout):
    inputs = arguments(splat, where[1], layout)
    out = FWD(*inputs, 0.3, splat, True, where[0])
    options = (0.3, splat, True, [True, layout == "empty"], where[0])
    torch.library.opcheck(BWD, (torch.randn_like(out), *inputs, *options))
    leaves = [x.requires_grad_() if x.dtype != torch.bool else None for x in inputs]
    torch.library.opcheck(FWD, (*leaves, 0.3, splat, True, where[0]))


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_outputs_are_like_real_ones(where, splat, layout):
    inputs = arguments(splat, where[1], layout)
    meta = [x.to("meta") for x in inputs]
    out, fake_out = FWD(*inputs, 0.3, splat, True, where[0]), FWD(*meta, 0.3, splat, True)
    results, fakes = [out], [fake_out]
    for needs_grad in ([False, False], [True, False], [False, True], [True, True]):
        results += BWD(out, *inputs, 0.3, splat, True, needs_grad, where[0])
        fakes += BWD(fake_out, *meta, 0.3, splat, True, needs_grad)
    for real, fake in zip(results, fakes, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@BOTH
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_operators_take_no_track_whose_position_is_not_finite(where, splat, bad):
    """Also where the mask says that it is visible, or there is no mask."""
    query, key, value, tracks, _, inverse_variance = arguments(splat, where[1], "contiguous")
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
    *inputs, _ = arguments(splat, where[1], "contiguous")
    inputs = [x if x.dtype == torch.bool else x.double() for x in inputs]
    inputs.append(torch.tensor(inverse_variance, dtype=torch.float64, device=where[1]))
    out = FWD(*inputs, 0.3, splat, True, where[0])
    grads = BWD(out, *inputs, 0.3, splat, True, [True, True], where[0])
    if inverse_variance <= 0:
        expected = FWD(*inputs, 0.3, splat, True, "reference")
        torch.testing.assert_close(out, expected)
        for x, y in zip(grads, BWD(out, *inputs, 0.3, splat, True, [True, True], "reference"), strict=True):
            torch.testing.assert_close(x, y)


@BOTH
def test_compiled_as_one_graph(where, splat):
    """With a visibility, and with a sigma that is learned."""
    torch._dynamo.reset()
    inputs = [*tensors(splat, where[1]), torch.tensor(0.7, device=where[1])]
    visibility = torch.rand(2, 3, 6, device=where[1]) > 0.3
    attention = track_splat_attention if splat else track_sample_attention

    def function(*x):
        return attention(*x[:4], sigma=x[4], visibility=visibility, backend=where[0]) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grad_out = torch.randn_like(inputs[0])
    for x, y in zip(gradients(compiled, inputs, grad_out), gradients(function, inputs, grad_out), strict=True):
        assert torch.equal(x, y)


@BOTH
def test_exported_program_takes_any_clip(where, splat):
    class Attend(torch.nn.Module):
        def forward(self, query, key, value, tracks):
            return attend(splat, where[0])(query, key, value, tracks)

    inputs = tensors(splat, where[1])
    batch, frames = torch.export.Dim("batch"), torch.export.Dim("frames")
    program = torch.export.export(Attend(), tuple(inputs), dynamic_shapes=[{0: batch, 1: frames}] * 4)
    inputs = tensors(splat, where[1], B=3, T=7)
    assert torch.equal(program.module()(*inputs), Attend()(*inputs))


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(where, splat, dtype):
    """Query, key and value are cast to the dtype of autocast; positions keep their dtype."""
    query, key, value, tracks = tensors(splat, where[1])
    query.requires_grad_()
    with torch.autocast(where[1], dtype=dtype):
        out = attend(splat, where[0])(query, key, value.to(dtype), tracks)
    halves = [x.to(dtype) for x in (query, key, value)]
    assert out.dtype == dtype and torch.equal(out, attend(splat, where[0])(*halves, tracks))
    out.sum().backward()
    assert query.grad.dtype == torch.float32


@BOTH
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(where, splat, use_reentrant):
    inputs = tensors(splat, where[1])
    function = attend(splat, where[0])

    def run(wrap):
        leaves = [x.clone().requires_grad_() for x in inputs]
        wrap(*leaves).square().sum().backward()
        return [x.grad for x in leaves]

    saved = run(lambda *x: checkpoint(function, *x, use_reentrant=use_reentrant))
    for x, y in zip(saved, run(function), strict=True):
        assert torch.equal(x, y)


@BOTH
def test_a_dispatch_mode_sees_one_operator(where, splat):
    class Counter(TorchDispatchMode):
        calls = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls.append(function)
            return function(*args, **(kwargs or {}))

    inputs = [x.requires_grad_() for x in tensors(splat, where[1])]
    with Counter() as counter:
        attend(splat, where[0])(*inputs).sum().backward()
    assert [function for function in counter.calls if function.namespace == "tritonkern"] == [FWD, BWD]


QUERY, KEY, VALUE, TRACKS = tensors(False)
MASK = torch.ones(2, 3, 6, dtype=torch.bool)
NESTED = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
        ({"query": None}, TypeError, "query must be a torch.Tensor, got NoneType"),
        ({"query": torch.tensor(1.0)}, ValueError, r"query must have shape \[B, T, M, H, D\], got \(\)"),
        ({"key": NESTED}, TypeError, "key must be a dense .* got a nested one"),
        ({"key": KEY.int()}, TypeError, "key must be float64, .* got torch.int32"),
        ({"value": VALUE.double()}, TypeError, "value must have the dtype of query"),
        ({"value": VALUE.to_sparse()}, TypeError, "value must be a dense"),
        ({"value": VALUE.to("meta")}, ValueError, "value must be on the device of query, cpu, got meta"),
        ({"query": QUERY[0]}, ValueError, r"query must have shape \[B, T, M, H, D\]"),
        ({"key": KEY[:, :, 0]}, ValueError, r"key must have shape \[B, T, h, w, H, D\]"),
        ({"key": KEY[:, :2]}, ValueError, "key must have the B, T, H and D of query"),
        ({"value": VALUE[:, :, :3]}, ValueError, "value must have the shape of key"),
        ({"key": KEY[:, :, :0], "value": VALUE[:, :, :0]}, ValueError, "key must have at least one cell"),
        ({"tracks": None}, TypeError, "tracks must be a torch.Tensor, got NoneType"),
        ({"tracks": TRACKS[..., :1]}, ValueError, r"tracks must have shape \(2, 3, 6, 2\)"),
        ({"tracks": TRACKS[:, :, :4]}, ValueError, r"tracks must have shape \(2, 3, 6, 2\)"),
        ({"tracks": TRACKS.long()}, TypeError, "tracks must be float64"),
        ({"tracks": TRACKS.to_sparse()}, TypeError, "tracks must be a dense"),
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
        ({"visibility": [True]}, TypeError, "visibility must be a torch.Tensor, got list"),
        ({"visibility": MASK.float()}, TypeError, "visibility must be bool, got torch.float32"),
        ({"visibility": MASK.to_sparse()}, TypeError, "visibility must be a dense"),
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


def test_direct_calls_of_the_operators_are_checked():
    """Whoever calls `torch.ops` must not get past the checks."""
    precise = torch.tensor(2.0)
    good = (QUERY, KEY, VALUE, TRACKS, MASK, precise)
    out = FWD(*good, 0.3, False, True)
    for at, bad in ((3, TRACKS.double()), (4, MASK[:1]), (4, MASK.int()), (5, precise.double()), (5, torch.ones(1))):
        with pytest.raises((TypeError, ValueError)):
            FWD(*good[:at], bad, *good[at + 1 :], 0.3, False, True)
    with pytest.raises(ValueError, match="grad_out must be"):
        BWD(out[:1], *good, 0.3, False, True, [True, True])
    with pytest.raises(ValueError, match="needs_grad must have 2 flags"):
        BWD(out, *good, 0.3, False, True, [True])
