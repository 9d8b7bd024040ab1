"""Full attention: every backend against float64, the rule of twice eager PyTorch's error, the choice of a backend."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_exact_as_eager, fast_backends

from tritonkern.functional import _full_attention as module
from tritonkern.functional._full_attention import full_attention
from tritonkern.ops._dtypes import DTYPES
from tritonkern.ops.full_attention import op

# B, L, S, H, D: one of everything, ragged blocks of queries, keys and channels, whole blocks.
SHAPES = [(1, 1, 1, 1, 1), (2, 5, 7, 3, 8), (1, 49, 257, 2, 17), (1, 96, 512, 1, 64)]


@pytest.fixture(params=[where for where in fast_backends(op.NAME) if where.id != "triton"])
def backend(request):
    return request.param[0]


def random_inputs(shape, dtype, scale=1.0):
    """query, key and value, parts of one tensor as a projection leaves them where lengths agree, and a cotangent."""
    B, L, S, H, D = shape
    sizes = [(B, L, H, D), (B, S, H, D), (B, S, H, D), (B, L, H, D)]
    return [(scale * torch.randn(*size[:2], 2, *size[2:], dtype=torch.float64)).to(dtype)[:, :, 1] for size in sizes]


def textbook(query, key, value):
    """One query at a time."""
    rows = []
    for i in range(query.shape[1]):
        scores = (query[:, i, None] * key).sum(-1) / math.sqrt(query.shape[-1])  # [B, S, H]
        rows.append((scores.softmax(1)[..., None] * value).sum(1))
    return torch.stack(rows, 1)


def eager(query, key, value):
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    return (weights @ value).transpose(1, 2)


def eager_roundings(inputs):
    """Output and gradients of the eager form, with keys, channels or both in reverse order as well."""
    for axes in ((), (1,), (-1,), (1, -1)):
        of_rows = [axis for axis in axes if axis == -1]
        query, key, value, grad = (
            x.flip(flipped) for x, flipped in zip(inputs, (of_rows, axes, axes, of_rows), strict=True)
        )
        found = results(eager, [query, key, value, grad])
        yield [x.flip(flipped) for x, flipped in zip(found, (of_rows, of_rows, axes, axes), strict=True)]


def pytorch(query, key, value):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


def results(function, inputs):
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


def test_reference_is_the_textbook_loop():
    torch.manual_seed(7)
    inputs = random_inputs((2, 5, 7, 3, 8), torch.float64)
    found = results(lambda *x: full_attention(*x, backend="reference"), inputs)
    for actual, truth in zip(found, results(textbook, inputs), strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-13)


def check(backend, inputs):
    """Output and gradients for query, key, value and a cotangent against float64, by the rule of docs/numerics.md."""
    found = results(lambda *x: full_attention(*x, backend=backend), inputs)
    exact = results(textbook, [x.double() for x in inputs])
    # PyTorch's gradients, which are ours as well, are not those of the eager form.
    plain = zip(*eager_roundings(inputs), results(pytorch, inputs), strict=True)
    query, key, value, grad = (x.double() for x in inputs)
    scale = query.shape[-1] ** -0.5
    weights = (torch.einsum("blhd,bshd->bhls", query, key) * scale).softmax(-1)
    # A weight is an exponential of a score, whose last digit counts; 16-bit gradients start from the rounded output.
    score = 1 + scale * torch.einsum("blhd,bshd->bhls", query.abs(), key.abs()).max()
    accumulator = torch.promote_types(inputs[0].dtype, torch.float32)
    of_out = score * torch.einsum("bhls,bshd->blhd", weights, value.abs()).max()
    score = max(score, torch.finfo(inputs[0].dtype).eps / torch.finfo(accumulator).eps)
    # Sizes of what the gradients are sums of.
    size = torch.einsum("blhd,bshd->bhls", grad.abs(), value.abs())
    size = weights * (size + (weights * size).sum(-1, keepdim=True))
    terms = (
        of_out,
        score * scale * torch.einsum("bhls,bshd->blhd", size, key.abs()).max(),
        score * scale * torch.einsum("bhls,blhd->bshd", size, query.abs()).max(),
        score * torch.einsum("bhls,blhd->bshd", weights, grad.abs()).max(),
    )
    for name, actual, twins, truth, term in zip(
        ("out", "query", "key", "value"), found, plain, exact, terms, strict=True
    ):
        forward = name == "out"
        assert_as_exact_as_eager(actual, twins[:-1] if forward else twins, truth, term, name)
    assert found[0].dtype == inputs[0].dtype and found[0].is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradients(backend, shape, dtype):
    torch.manual_seed(0)
    check(backend, random_inputs(shape, dtype, 2.0))


def test_scale_and_log_sum_exp(backend):
    torch.manual_seed(1)
    query, key, value, _ = random_inputs((1, 60, 300, 2, 16), torch.float64)
    out, lse = op.full_attention_fwd(query, key, value, -0.3, backend)
    scores = torch.einsum("blhd,bshd->blhs", query, key) * -0.3
    assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-12)
    assert torch.allclose(out, torch.einsum("blhs,bshd->blhd", scores.softmax(-1), value), atol=1e-12)


def test_scores_far_apart_and_not_finite(backend):
    torch.manual_seed(2)
    query, key, value, _ = random_inputs((1, 50, 600, 1, 8), torch.float32)
    # The first 300 scores are 100 below the others, so that what their blocks added must decay to nothing.
    query[..., 0], key[:, :300, :, 0], key[:, 300:, :, 0] = 10.0, -20.0, 10.0
    out = full_attention(query, key, value, backend=backend)
    assert torch.allclose(out, full_attention(query, key[:, 300:], value[:, 300:], backend="reference"), atol=1e-5)
    # No weight at all for keys of -inf, as in PyTorch, wherever they are; NaN for a query of NaN, and for no other.
    key[:, :300, :, 0] = -torch.inf
    assert torch.allclose(full_attention(query, key, value, backend=backend), out, atol=1e-5)
    query[:, 7] = torch.nan
    broken = full_attention(query, key, value, backend=backend).isnan().flatten(2).any(-1)[0]
    assert broken.nonzero().tolist() == [[7]]


def test_a_query_alone_gets_what_it_gets_beside_others():
    query, key, value, _ = random_inputs((1, 1200, 300, 1, 16), torch.float32)
    found = full_attention(query, key, value, backend="cpp")
    assert torch.equal(full_attention(query[:, 777:778], key, value, backend="cpp"), found[:, 777:778])


@pytest.fixture
def asked(monkeypatch):
    """Calls of PyTorch's attention, on a machine where ours is faster."""
    calls, pytorchs = [], F.scaled_dot_product_attention
    monkeypatch.setattr(module, "_pytorch_is_slower", lambda: True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x, **y: calls.append(x) or pytorchs(*x, **y))
    return calls


@pytest.mark.parametrize(
    "queries, keys, expected", [(1024, 1024, 0), (1023, 1100, 1), (1100, 1000, 1), (1024, (1 << 16) + 1, 1)]
)
def test_own_kernel_where_it_is_faster(asked, monkeypatch, queries, keys, expected):
    query, key, value, _ = random_inputs((1, queries, keys, 1, 1), torch.float32)
    full_attention(query, key, value)
    assert len(asked) == expected
    monkeypatch.setattr(module, "_pytorch_is_slower", lambda: False)
    full_attention(query, key, value)
    assert len(asked) == expected + 1


def test_graphs_and_transforms_keep_pytorchs(asked):
    torch.manual_seed(6)
    inputs = [x.contiguous() for x in random_inputs((1, 1030, 1030, 1, 4), torch.float32)[:3]]
    eager_result = full_attention(*inputs)
    assert not asked
    for graph in (
        torch.compile(full_attention, fullgraph=True, backend="aot_eager", dynamic=True),
        torch.export.export(Wrapper(), tuple(inputs)).module(),
    ):
        torch.testing.assert_close(graph(*inputs), eager_result)
    exported = torch.export.export(Wrapper(), tuple(inputs))
    assert not any("tritonkern" in str(node.target) for node in exported.graph.nodes)
    grad = torch.func.grad(lambda query: full_attention(query, *inputs[1:]).sum())(inputs[0])
    assert grad.shape == inputs[0].shape


class Wrapper(torch.nn.Module):
    def forward(self, query, key, value):
        return full_attention(query, key, value)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda q, k, v: (q, k.double(), v), TypeError, "key must have the dtype of query"),
        (lambda q, k, v: (q[0], k, v), ValueError, "query must be .B, L, H, D."),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), ValueError, "key must be .B, L, H, D."),
        (lambda q, k, v: (q[:, :, :0], k[:, :, :0], v[:, :, :0]), ValueError, "query must be .B, L, H, D."),
        (lambda q, k, v: (q, k, v[:, :-1]), ValueError, "value must have shape"),
        (lambda q, k, v: (q, k[..., :-1], v), ValueError, "key must have shape"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        full_attention(*change(*random_inputs((1, 3, 4, 2, 8), torch.float32)[:3]))
    with pytest.raises(ValueError, match="triton"):
        full_attention(*random_inputs((1, 3, 4, 2, 8), torch.float32)[:3], backend="triton")
