"""Track attention among PyTorch's tools: opcheck, compile, export, autocast, checkpointing, bad arguments."""

import pytest
import torch
from oracle import gradients, native_backends
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tritonkern import track_sample_attention, track_splat_attention
from tritonkern.ops.track_attention import op

FWD, BWD = op.track_attention_fwd, op.track_attention_bwd
BOTH = pytest.mark.parametrize("splat", [False, True], ids=["sample", "splat"])


@pytest.fixture(params=native_backends(op.NAME))
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
    query, key, value, tracks = map(LAYOUTS[layout], tensors(splat, device))
    visible = torch.rand(tracks.shape[:-1], device=device) > 0.3
    return query, key, value, tracks, visible, torch.tensor(2.0, device=device)


@BOTH
@pytest.mark.parametrize("layout", ["transposed", "sliced", "empty"])
def test_opcheck(where, splat, layout):
    inputs = arguments(splat, where[1], layout)
    out, lse = FWD(*inputs, 0.3, splat, True, where[0])
    options = (0.3, splat, True, layout == "sliced", where[0])
    torch.library.opcheck(BWD, (torch.randn_like(out), *inputs, out, lse, *options))
    leaves = [x.requires_grad_() if x.dtype != torch.bool else x for x in inputs]
    torch.library.opcheck(FWD, (*leaves, 0.3, splat, True, where[0]))


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_outputs_are_like_real_ones(where, splat, layout):
    inputs = arguments(splat, where[1], layout)
    meta = [x.to("meta") for x in inputs]
    out, lse = FWD(*inputs, 0.3, splat, True, where[0])
    fake_out, fake_lse = FWD(*meta, 0.3, splat, True)
    for positions in (False, True):
        grads = BWD(out, *inputs, out, lse, 0.3, splat, True, positions, where[0])
        fakes = BWD(fake_out, *meta, fake_out, fake_lse, 0.3, splat, True, positions)
        for real, fake in zip((out, lse, *grads), (fake_out, fake_lse, *fakes), strict=True):
            assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@BOTH
def test_log_sum_exp(where, splat):
    """Of scores in which the nearest column's distance counts as zero; -inf where there is no column."""
    query, key, value, tracks, visible, precision = arguments(splat, where[1], "contiguous")
    visible[0, 1] = False
    _, lse = FWD(query, key, value, tracks, visible, precision, 0.3, splat, True, where[0])
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    cells = (torch.stack([x, y], -1).flatten(0, 1) + 0.5).to(where[1])
    for b, t in ((0, 0), (1, 2), (0, 1)):
        seen = visible[b, t]
        points = tracks[b, t][seen]
        q, k = (x[b, t][seen] if x.dim() == 5 else x[b, t].flatten(0, 1) for x in (query, key))
        squared = torch.cdist(cells, points).square() if splat else torch.cdist(points, cells).square()
        if splat and len(points) == 0:
            assert (lse[b, t] == float("-inf")).all()
            continue
        bias = -precision * (squared - squared.amin(-1, keepdim=True))
        expected = (0.3 * torch.einsum("ihd,jhd->ijh", q, k) + bias[..., None]).logsumexp(1)
        torch.testing.assert_close(lse[b, t] if splat else lse[b, t][seen], expected, rtol=1e-5, atol=1e-5)
        assert splat or (lse[b, t][~seen] == float("-inf")).all()


@BOTH
def test_compiled_as_one_graph(where, splat):
    torch._dynamo.reset()
    inputs = tensors(splat, where[1])
    visibility = torch.rand(2, 3, 6, device=where[1]) > 0.3
    function = attend(splat, where[0], visibility=visibility)
    grad_out = torch.randn_like(inputs[0])
    compiled = torch.compile(lambda *x: function(*x) * 2, fullgraph=True, backend="aot_eager")
    plain = gradients(lambda *x: function(*x) * 2, inputs, grad_out)
    for x, y in zip(gradients(compiled, inputs, grad_out), plain, strict=True):
        assert torch.equal(x, y)


@BOTH
def test_sigma_that_is_learned_compiles(where, splat):
    torch._dynamo.reset()
    inputs = [*tensors(splat, where[1]), torch.tensor(0.7, device=where[1])]
    attention = track_splat_attention if splat else track_sample_attention
    function = lambda *x: attention(*x[:4], sigma=x[4], backend=where[0])  # noqa: E731
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
    """Query, key and value go to the dtype of autocast; positions stay as exact as they are."""
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
        seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(function)
            return function(*args, **(kwargs or {}))

    inputs = [x.requires_grad_() for x in tensors(splat, where[1])]
    with Counter() as counter:
        attend(splat, where[0])(*inputs).sum().backward()
    assert [function for function in counter.seen if function.namespace == "tritonkern"] == [FWD, BWD]


@BOTH
def test_derivatives_that_do_not_exist_are_refused(where, splat):
    inputs = [x.requires_grad_() for x in tensors(splat, where[1])]
    out = attend(splat, where[0])(*inputs)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="track_attention has no second derivative"):
        grad.sum().backward()
    plain = [x.detach() for x in inputs]
    for at in range(4):

        def function(x, at=at):
            return attend(splat, where[0])(*plain[:at], x, *plain[at + 1 :])

        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(function, (plain[at],), (plain[at],))


QUERY, KEY, VALUE, TRACKS = tensors(False)
MASK = torch.ones(2, 3, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
        ({"key": KEY.int()}, TypeError, "key must be float64, .* got torch.int32"),
        ({"value": VALUE.double()}, TypeError, "value must have the dtype of query"),
        ({"value": VALUE.to_sparse()}, TypeError, "value must be a dense"),
        ({"value": VALUE.to("meta")}, ValueError, "value must be on the device of query, cpu, got meta"),
        ({"query": QUERY[0]}, ValueError, r"query must have shape \[B, T, M, H, D\]"),
        ({"key": KEY[:, :, 0]}, ValueError, r"key must have shape \[B, T, h, w, H, D\]"),
        ({"key": KEY[:, :2]}, ValueError, "key must have the B, T, H and D of query"),
        ({"value": VALUE[:, :, :3]}, ValueError, "value must have the shape of key"),
        ({"key": KEY[:, :, :0], "value": VALUE[:, :, :0]}, ValueError, "key must have at least one cell"),
        ({"tracks": TRACKS[..., :1]}, ValueError, r"tracks must have shape \(2, 3, 6, 2\)"),
        ({"tracks": TRACKS[:, :, :4]}, ValueError, r"tracks must have shape \(2, 3, 6, 2\)"),
        ({"tracks": TRACKS.long()}, TypeError, "tracks must be float64"),
        ({"sigma": 0.0}, ValueError, "sigma must be positive, got 0.0"),
        ({"sigma": -1}, ValueError, "sigma must be positive"),
        ({"sigma": float("nan")}, ValueError, "sigma must be positive"),
        ({"sigma": "wide"}, TypeError, "sigma must be a number, got str"),
        ({"sigma": torch.ones(2)}, ValueError, "sigma must be a number or a 0-d"),
        ({"sigma": torch.tensor(1)}, ValueError, "sigma must be a number or a 0-d"),
        ({"scale": torch.tensor(1.0)}, TypeError, "scale must be a number"),
        ({"visibility": MASK.float()}, TypeError, "visibility must be a bool tensor"),
        ({"visibility": MASK[:1]}, ValueError, r"visibility must have shape \(2, 3, 6\)"),
        ({"culling": 1}, TypeError, "culling must be a bool"),
        ({"backend": "cuda"}, ValueError, "backend must be one of cpp, triton, reference or None"),
        ({"query": QUERY[..., :4], "key": KEY[..., :4], "value": VALUE[..., :4]}, ValueError, "multiple of 8 .* got 4"),
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
    """Kernels take raw pointers, so whoever calls `torch.ops` must not get past the checks either."""
    precision = torch.tensor(2.0)
    good = (QUERY, KEY, VALUE, TRACKS, MASK, precision)
    out, lse = FWD(*good, 0.3, False, True, "reference")
    for at, bad in ((3, TRACKS.double()), (4, MASK[:1]), (4, MASK.int()), (5, precision.double()), (5, torch.ones(1))):
        with pytest.raises(ValueError):
            FWD(*good[:at], bad, *good[at + 1 :], 0.3, False, True, "reference")
    for bad in ((out[:1], *good, out, lse), (out, *good, out[:1], lse), (out, *good, out, lse.double())):
        with pytest.raises(ValueError):
            BWD(*bad, 0.3, False, True, True, "reference")
