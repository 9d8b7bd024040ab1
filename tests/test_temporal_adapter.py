"""The two ends of a temporal adapter, and the adapter as a whole, against plain modules in float64."""

import functools

import pytest
import torch
import torch.nn.functional as F
from official import needs_official, official  # noqa: F401
from oracle import assert_as_exact_as_eager, eager, fast_backends, native_backends

from tritonkern.functional._adapter import adapter_in, adapter_out
from tritonkern.nn import TemporalAdapter
from tritonkern.ops.temporal_adapter import op

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# `test_temporal_adapter_triton.py` runs this file in Triton's interpreter.
EVERY = list(native_backends(op.NAME))
# The reference is compared with the plain modules in float64 alone.
WHERE_AND_DTYPE = [
    pytest.param(*where.values, dtype, id=f"{where.id}-{dtype}", marks=where.marks)
    for where in EVERY
    for dtype in DTYPES
    if where.id != "reference" or dtype == torch.float64
]


@pytest.fixture(params=fast_backends(op.NAME))
def native(request):
    return request.param


def skip_wrong_bfloat16(where, dtype):
    if where == ("triton", "cpu") and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates what is stored in bfloat16")


def patch_rows(image, pool):
    """[B, T, h, w, O] -> [B, T, h/p * w/p, p * p * O]"""
    batch, frames, height, width, channels = image.shape
    x = image.reshape(batch, frames, height // pool, pool, width // pool, pool, channels).transpose(3, 4)
    return x.reshape(batch, frames, height // pool * (width // pool), pool * pool * channels)


def plain_in(tokens, grid, norm_weight, norm_bias, weight, bias, pool, eps=1e-5, backwards=False):
    """What a PyTorch user writes: views, GroupNorm, Conv2d, ReLU. `backwards` reverses the order of all sums."""
    batch, frames, _, channels = tokens.shape
    x = tokens[:, :, tokens.shape[2] - grid[0] * grid[1] :].unflatten(2, grid).movedim(-1, 1)
    if backwards:
        x, norm_weight, norm_bias, weight = (
            x.flip(1, 3, 4),
            norm_weight.flip(0),
            norm_bias.flip(0),
            weight.flip(1, 2, 3),
        )
    x = F.group_norm(x, 1, norm_weight, norm_bias, eps).transpose(1, 2).flatten(0, 1)
    x = F.conv2d(x, weight, bias, padding=1).relu()
    if backwards:
        x = x.flip(2, 3)
    return patch_rows(x.unflatten(0, (batch, frames)).movedim(2, -1), pool)


def plain_out(hidden, grid, weight, bias, tokens, pool, backwards=False):
    batch, frames, _, width = hidden.shape
    x = hidden.reshape(batch, frames, grid[0] // pool, grid[1] // pool, pool, pool, width // pool**2).transpose(3, 4)
    x = x.reshape(batch * frames, *grid, width // pool**2).movedim(-1, 1).relu()
    if backwards:
        x, weight = x.flip(1, 2, 3), weight.flip(1, 2, 3)
    x = F.conv2d(x, weight, bias, padding=1)
    if backwards:
        x = x.flip(2, 3)
    x = x.movedim(1, -1).flatten(1, 2).unflatten(0, (batch, frames))
    if tokens is None:
        return x
    prefix = tokens.shape[2] - grid[0] * grid[1]
    return tokens + torch.cat([x.new_zeros(*tokens.shape[:2], prefix, tokens.shape[3]), x], dim=2)


def results(function, tensors, grad_out):
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad_out.to(out.dtype))]


def check(ours, plain, tensors, grad_out):
    """Results and gradients of ours, and of the plain form at the same dtype, against the plain form in float64.

    The plain form sums forwards and backwards. Float64 has no better judge than itself: its error is what these two
    differ by, or the plain form's error in float32 times the ratio of their ulps. A hidden value within rounding of
    zero may pass ReLU in one and not in the other, which is not an error; the inputs are such that none is.
    """
    exact = results(plain, [x.double().cpu() for x in tensors], grad_out.double().cpu())
    eager = [results(functools.partial(plain, backwards=order), tensors, grad_out) for order in (False, True)]
    if grad_out.dtype == torch.float64:
        single = [x.float() for x in tensors]
        truth = results(plain, [x.double() for x in single], grad_out)
        errors = (x - y for x, y in zip(results(plain, single, grad_out), truth, strict=True))
        eager.append([x + error.cpu() * 2.0**-29 for x, error in zip(exact, errors, strict=True)])
    found = results(ours, tensors, grad_out)
    # Parameters' gradients are sums over the clip that may cancel; one rounding of a term is allowed, as in oracle.py.
    largest = grad_out.abs().max() * tensors[0].abs().max()
    for number, (actual, *simple, truth) in enumerate(zip(found, *eager, exact, strict=True)):
        simple, term = [x.cpu() for x in simple], largest.cpu() if number else 0
        assert_as_exact_as_eager(actual.cpu(), simple, truth, term, f"result {number}")


def in_tensors(shape, grid, prefix, out_channels, dtype, device="cpu"):
    """tokens, norm_weight, norm_bias, weight, bias; biases keep hidden values away from zero."""
    batch, frames, channels = shape
    generator = torch.Generator().manual_seed(3)
    random = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    tokens = random(batch, frames, prefix + grid[0] * grid[1], channels) * 2 + 1
    weight = random(out_channels, channels, 3, 3) / (9 * channels) ** 0.5
    sign = torch.where(torch.arange(out_channels) % 2 == 0, 8.0, -8.0).double()
    parameters = (random(channels) * 0.3 + 1, random(channels) * 0.3, weight, sign + random(out_channels) * 0.1)
    return [x.to(device, dtype) for x in (tokens, *parameters)]


def out_tensors(shape, grid, pool, prefix, channels, dtype, device="cpu"):
    """hidden (away from zero), weight, bias, tokens"""
    batch, frames, inner = shape
    generator = torch.Generator().manual_seed(4)
    random = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    hidden = random(batch, frames, grid[0] * grid[1] // pool**2, pool**2 * inner)
    hidden = hidden + hidden.sign() * 0.1
    weight = random(channels, inner, 3, 3) / (9 * inner) ** 0.5
    tokens = random(batch, frames, prefix + grid[0] * grid[1], channels)
    tensors = [x.to(device, dtype) for x in (hidden, weight, random(channels), tokens)]
    tensors[0] = tensors[0].to(op.hidden_dtype(tensors[0].device, dtype))
    return tensors


# (B, T, C), grid, prefix, O, pool: more than one block of tiles, sizes that no vector or tile divides, one pixel, more
# than one program's pixels (Triton: 16 tiles of a frame), more than one's channels
SHAPES = [
    ((1, 2, 24), (8, 8), 1, 32, 4),
    ((2, 3, 13), (5, 7), 0, 19, 1),
    ((1, 1, 8), (1, 1), 5, 8, 1),
    ((2, 5, 64), (12, 20), 5, 40, 2),
    ((1, 1, 3), (2, 18), 1, 1, 2),
    ((2, 1, 3), (48, 46), 1, 5, 2),
    ((1, 2, 300), (4, 4), 1, 7, 2),
]


@pytest.mark.parametrize("where, dtype", WHERE_AND_DTYPE)
@pytest.mark.parametrize("shape, grid, prefix, out_channels, pool", SHAPES)
def test_in(where, shape, grid, prefix, out_channels, pool, dtype):
    skip_wrong_bfloat16(where, dtype)
    backend, device = where
    tensors = in_tensors(shape, grid, prefix, out_channels, dtype, device)
    rows = grid[0] * grid[1] // pool**2
    grad_out = torch.randn(*shape[:2], rows, pool**2 * out_channels, dtype=torch.float64).to(device, dtype)
    ours = lambda tokens, *rest: adapter_in(tokens, grid, *rest, pool=pool, backend=backend)  # noqa: E731

    def plain(tokens, *rest, backwards=False):
        return plain_in(tokens, grid, *rest, pool, backwards=backwards)

    check(ours, plain, tensors, grad_out)


@pytest.mark.parametrize("where, dtype", WHERE_AND_DTYPE)
@pytest.mark.parametrize("shape, grid, prefix, out_channels, pool", SHAPES)
@pytest.mark.parametrize("add", [True, False])
def test_out(where, shape, grid, prefix, out_channels, pool, dtype, add):
    skip_wrong_bfloat16(where, dtype)
    backend, device = where
    tensors = out_tensors(shape, grid, pool, prefix, out_channels, dtype, device)
    if not add:
        del tensors[3]
    rows = grid[0] * grid[1] + (prefix if add else 0)
    grad_out = torch.randn(*shape[:2], rows, out_channels, dtype=torch.float64).to(device, dtype)

    def ours(hidden, weight, bias, tokens=None):
        return adapter_out(hidden, grid, weight, bias, tokens, pool=pool, dtype=dtype, backend=backend)

    def plain(hidden, weight, bias, tokens=None, backwards=False):
        return plain_out(hidden.to(weight.dtype), grid, weight, bias, tokens, pool, backwards)

    check(ours, plain, tensors, grad_out)


@pytest.mark.parametrize("kind", ["large mean", "outlier channels"])
def test_statistics_keep_their_digits(native, kind):
    """Tokens of a vision transformer have a few channels a hundred times larger than the others."""
    tensors = in_tensors((1, 2, 24), (8, 8), 1, 16, torch.float32, native[1])
    if kind == "large mean":
        tensors[0] = tensors[0] + 1000
    else:
        tensors[0][..., 3] *= 300
    truth = plain_in(*[tensors[0].double(), (8, 8), *(x.double() for x in tensors[1:])], 1)
    eager = plain_in(tensors[0], (8, 8), *tensors[1:], 1)
    norm, conv = tensors[1:3], tensors[3:]
    call = (tensors[0], *norm, 1e-5, *conv, 8, 8, 1, torch.float32, None, native[0])
    actual, *moments = op.adapter_in_fwd(*call)
    assert_as_exact_as_eager(actual, [eager], truth)
    # Eager's GroupNorm loses more digits of a large mean than its variance does.
    patches = tensors[0][:, :, 1:]
    variance, mean = torch.var_mean(patches, (1, 2, 3), correction=0)
    exact_variance, exact_mean = torch.var_mean(patches.double(), (1, 2, 3), correction=0)
    simple, exact = (mean, (variance + 1e-5).rsqrt()), (exact_mean, (exact_variance + 1e-5).rsqrt())
    for number in range(2):
        assert_as_exact_as_eager(moments[number].float(), [simple[number]], exact[number])


def test_given_statistics(native):
    """The clip's own give its bits, frame by frame; others are used as they are; there is no derivative."""
    backend, device = native
    tokens, *parameters = in_tensors((2, 3, 24), (4, 4), 1, 8, torch.float32, device)
    options = (4, 4, 2, torch.float32)
    whole, *moments = op.adapter_in_fwd(tokens, *parameters[:2], 1e-5, *parameters[2:], *options, None, backend)
    own = torch.stack(moments)
    for t in range(3):
        part = adapter_in(tokens[:, t, None], (4, 4), *parameters, pool=2, statistics=own, backend=backend)
        if backend == "cpp":
            assert torch.equal(part, whole[:, t, None])
        else:  # PyTorch's convolutions
            torch.testing.assert_close(part, whole[:, t, None], rtol=1e-5, atol=1e-5)
    other = torch.tensor([[0.1, 0.2], [2.0, 3.0]], dtype=torch.float64, device=device)
    hidden = adapter_in(tokens, (4, 4), *parameters, pool=2, statistics=other, backend=backend)
    exact = adapter_in(
        tokens.double(), (4, 4), *(x.double() for x in parameters), pool=2, statistics=other, backend="reference"
    )
    torch.testing.assert_close(hidden.double(), exact, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="no derivative where statistics are given"):
        adapter_in(tokens.requires_grad_(), (4, 4), *parameters, statistics=own, backend=backend)
    with pytest.raises(ValueError, match=r"statistics must be float64 of shape \(2, 2\) on"):
        adapter_in(tokens.detach(), (4, 4), *parameters, statistics=own[:, :1], backend=backend)


def test_convolutions_without_a_bias(native):
    backend, device = native
    tokens, norm_weight, norm_bias, weight, bias = in_tensors((1, 2, 8), (4, 4), 1, 8, torch.float32, device)
    call = (tokens, (4, 4), norm_weight, norm_bias, weight)
    hidden = adapter_in(*call, backend=backend)
    assert torch.equal(hidden, adapter_in(*call, torch.zeros_like(bias), backend=backend))
    weight.requires_grad_()
    out = adapter_out(hidden, (4, 4), weight, None, tokens, backend=backend)
    assert torch.equal(out, adapter_out(hidden, (4, 4), weight, torch.zeros_like(bias), tokens, backend=backend))
    (grad,) = torch.autograd.grad(out.sum(), weight)
    assert grad.isfinite().all() and grad.any()


def test_a_nan_stays_in_its_batch_entry(native):
    tokens, *parameters = in_tensors((2, 2, 24), (4, 8), 1, 16, torch.float32, native[1])
    weight, bias = (x.to(native[1]) for x in (torch.randn(24, 16, 3, 3), torch.randn(24)))
    tokens[0, 1, 5, 2] = float("nan")
    tokens.requires_grad_()
    hidden = adapter_in(tokens, (4, 8), *parameters, backend=native[0])
    out = adapter_out(hidden, (4, 8), weight, bias, tokens, backend=native[0])
    assert torch.equal(out[:, :, 0], tokens[:, :, 0])
    assert hidden[0].isnan().all() and out[0, :, 1:].isnan().all() and out[1].isfinite().all()
    (grad,) = torch.autograd.grad(out.sum(), tokens)
    assert (grad[:, :, 0] == 1).all() and grad[0, :, 1:].isnan().all() and grad[1].isfinite().all()


def test_autocast_rounds_nothing_inside(native):
    """Operators compute in the dtype that `hidden_dtype` names, also native a caller's autocast is on."""
    tokens, *parameters = in_tensors((1, 2, 24), (4, 8), 1, 16, torch.float32, native[1])
    options = (4, 8, 1, torch.float32, native[0])
    first = (*options[:-1], None, native[0])
    expected = op.adapter_in_fwd(tokens, *parameters[:2], 1e-5, *parameters[2:], *first)[0]
    weight, bias = (x.to(native[1]) for x in (torch.randn(24, 16, 3, 3), torch.randn(24)))
    with torch.autocast(native[1], torch.bfloat16):
        hidden = op.adapter_in_fwd(tokens, *parameters[:2], 1e-5, *parameters[2:], *first)[0]
        out = op.adapter_out_fwd(hidden, weight, bias, None, *options)
    assert torch.equal(hidden, expected)
    assert torch.equal(out, op.adapter_out_fwd(hidden, weight, bias, None, *options))


def adapter_and_tokens(dim=24, frames=3, grid=(8, 4), prefix=1, dtype=torch.float64, batch=2):
    adapter = TemporalAdapter(dim, hidden=32)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return adapter.to(dtype), torch.randn(batch, frames, prefix + grid[0] * grid[1], dim, dtype=dtype)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_add_to_is_forward_added_to_the_patches(prefix):
    adapter, tokens = adapter_and_tokens(prefix=prefix)
    out = adapter.add_to(tokens, (8, 4))
    assert torch.equal(out[:, :, :prefix], tokens[:, :, :prefix])
    update = adapter(tokens[:, :, prefix:].unflatten(2, (8, 4))).flatten(2, 3)
    torch.testing.assert_close(out[:, :, prefix:], tokens[:, :, prefix:] + update, atol=1e-13, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_and_exported(dtype):
    adapter, tokens = adapter_and_tokens(dtype=dtype)
    expected = adapter.add_to(tokens, (8, 4))
    compiled = torch.compile(lambda x: adapter.add_to(x, (8, 4)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), expected)
    images = tokens[:, :, 1:].unflatten(2, (8, 4))
    exported = torch.export.export(adapter, (images,))
    torch.testing.assert_close(exported.module()(images), adapter(images))


def test_frozen_parts_cost_and_get_nothing():
    adapter, tokens = adapter_and_tokens(dtype=torch.float32)
    adapter.conv1.requires_grad_(False)
    adapter.norm.requires_grad_(False)
    adapter.add_to(tokens, (8, 4)).sum().backward()
    got = {name for name, parameter in adapter.named_parameters() if parameter.grad is not None}
    assert got == {name for name, parameter in adapter.named_parameters() if parameter.requires_grad}


def eager_form(adapter, patches):
    """The adapter's update of patches `[B, T, h, w, C]` from PyTorch's modules alone, in their dtype."""
    batch, frames = patches.shape[:2]
    x = adapter.norm(patches.movedim(-1, 1)).transpose(1, 2).flatten(0, 1)
    x = adapter.conv_pool(adapter.conv1(x).relu()).relu()
    size = x.shape[2:]
    x = x.flatten(2).mT.unflatten(0, (batch, frames))  # [B, T, N, hidden]
    attention = adapter.attn_temp
    qkv = attention.qkv(adapter.norm2(x)).unflatten(-1, (3, attention.num_heads, -1)).unbind(-3)
    attended = eager(*qkv, *attention.window, attention.head_dim**-0.5)
    x = x + attention.proj(attended.flatten(-2))
    x = adapter.conv_upsample(x.flatten(0, 1).mT.unflatten(2, size)).relu()
    return adapter.conv2(x).movedim(1, -1).unflatten(0, (batch, frames))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """Tokens in 16 bits are as close to float64 as eager ones are; under autocast the residual stream stays float32."""
    adapter, tokens = adapter_and_tokens(dtype=dtype, frames=4)
    exact = TemporalAdapter(24, hidden=32).double()
    exact.load_state_dict(adapter.state_dict())
    truth = exact.add_to(tokens.double(), (8, 4)).detach()
    patches = tokens[:, :, 1:].unflatten(2, (8, 4))
    out = adapter.add_to(tokens, (8, 4))
    assert out.dtype == dtype and adapter(patches).dtype == dtype
    eager_out = torch.cat([tokens[:, :, :1], tokens[:, :, 1:] + eager_form(adapter, patches).flatten(2, 3)], 2)
    assert_as_exact_as_eager(out, [eager_out], truth)

    single = adapter.float()
    with torch.autocast("cpu", dtype):
        out = single.add_to(tokens.float(), (8, 4))
        assert single(patches.float()).dtype == dtype
        eager_out = tokens[:, :, 1:].float() + eager_form(single, patches.float()).flatten(2, 3)
    assert out.dtype == torch.float32
    assert_as_exact_as_eager(out[:, :, 1:], [eager_out], truth[:, :, 1:])


@pytest.mark.parametrize(
    "change, error, match",
    [
        (dict(tokens=torch.zeros(1, 2, 17, 7)), ValueError, r"weight must have shape \[O, 7, 3, 3\]"),
        (dict(tokens=torch.zeros(1, 2, 9)), ValueError, "tokens must have shape"),
        (dict(tokens=torch.zeros(1, 2, 15, 8)), ValueError, "at least h \\* w = 4 \\* 4 rows"),
        (dict(tokens=torch.zeros(1, 2, 17, 8).double()), TypeError, "norm_weight must be torch.float64 here"),
        (dict(norm_weight=torch.zeros(7)), ValueError, "norm_weight must have shape"),
        (dict(bias=torch.zeros(7)), ValueError, "bias must have shape"),
        (dict(grid=(4, 3)), ValueError, "multiples of pool=2, got 4 x 3"),
        (dict(grid=24), TypeError, "grid must be a pair"),
        (dict(grid=(4, 6, 1)), TypeError, "grid must be a pair"),
        (dict(grid=(4.0, 6)), TypeError, "whole numbers"),
        (dict(pool=2.0), TypeError, "whole numbers"),
        (dict(eps=-5.0), ValueError, "eps must be a positive number"),
        (dict(backend="cuda"), ValueError, "backend must be one of"),
    ],
)
def test_errors(change, error, match):
    names = ("tokens", "norm_weight", "norm_bias", "weight", "bias")
    call = dict(zip(names, in_tensors((1, 2, 8), (4, 4), 1, 8, torch.float32), strict=True))
    with pytest.raises(error, match=match):
        adapter_in(**{"grid": (4, 4), "pool": 2, **call, **change})


@needs_official
@pytest.mark.parametrize("frames", [1, 5])
def test_official_adapter(official, frames):  # noqa: F811
    theirs = official("Chrono", "models.locotrack_model").TemporalAdapter(24, 32, 11).double()
    ours, tokens = adapter_and_tokens(frames=frames, grid=(8, 8))
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.load_state_dict(ours.state_dict())
    patches = tokens[:, :, 1:].unflatten(2, (8, 8))
    expected = theirs(patches.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(ours(patches), expected, atol=1e-12, rtol=0)
