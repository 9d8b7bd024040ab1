"""`correlation_soft_argmax` and `soft_argmax_2d` among PyTorch's tools, and their errors; see `test_operators.py`."""

import pytest
import torch
import torch.nn.functional as F
from oracle import fast_backends, run_python
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tritonkern
from tritonkern import correlation_soft_argmax, soft_argmax_2d
from tritonkern.ops.correlation_soft_argmax import op

FWD, BWD = op.correlation_soft_argmax_fwd, op.correlation_soft_argmax_bwd
FWD_2D, BWD_2D = op.soft_argmax_2d_fwd, op.soft_argmax_2d_bwd
OPTIONS = (20.0, 2.0, True, 1e-6)

LAYOUTS = {
    "contiguous": lambda *shape: torch.randn(shape),
    "transposed": lambda b, t, h, w, c: torch.randn(b, c, t, w, h).permute(0, 2, 4, 3, 1),
    "sliced": lambda b, t, h, w, c: torch.randn(b, 2 * t, h, w, c + 8)[:, ::2, ..., 3 : c + 3],
    "expanded": lambda b, t, h, w, c: torch.randn(b, 1, h, w, c).expand(b, t, h, w, c),
    "empty": lambda b, t, h, w, c: torch.randn(b, 0, h, w, c),
}


@pytest.fixture(params=fast_backends(op.NAME))
def where(request):
    return request.param


@pytest.fixture(params=LAYOUTS)
def inputs(request, where):
    with torch.device(where[1]):
        return [torch.randn(2, 3, 16), F.normalize(LAYOUTS[request.param](2, 3, 4, 5, 16), dim=-1)]


@pytest.fixture
def plain(where):
    with torch.device(where[1]):
        return [F.normalize(torch.randn(shape), dim=-1) for shape in ((2, 3, 16), (2, 3, 4, 5, 16))]


def results(function, tensors):
    """What `function` returns and the gradients of its sum, weighted by place."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    out = (out,) if isinstance(out, torch.Tensor) else tuple(out)
    weights = [torch.arange(x.numel(), device=x.device, dtype=x.dtype).view(x.shape) for x in out]
    return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, weights)]


def assert_same(actual, expected):
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_opcheck(where, inputs):
    saved = FWD(*inputs, *OPTIONS, where[0])
    grads = [torch.randn_like(x) for x in saved[:4]]
    kept = (saved[0], saved[2], *saved[4:])
    torch.library.opcheck(BWD, (*grads, *inputs, *kept, *OPTIONS, where[0]))
    torch.library.opcheck(BWD, (grads[0], None, None, None, *inputs, *kept, *OPTIONS, where[0]))
    torch.library.opcheck(FWD, (*(x.requires_grad_() for x in inputs), *OPTIONS, where[0]))


def test_opcheck_of_the_soft_argmax(where, inputs):
    cost = inputs[1].movedim(-1, 1)
    saved = FWD_2D(cost, 20.0, 2.0, where[0])
    torch.library.opcheck(BWD_2D, (torch.randn_like(saved[0]), cost, *saved, 20.0, 2.0, where[0]))
    torch.library.opcheck(FWD_2D, (cost.requires_grad_(), 20.0, 2.0, where[0]))


@pytest.mark.parametrize("cosine", [False, True])
def test_fake_outputs_are_contiguous_like_real_ones(where, inputs, cosine):
    options = (20.0, 2.0, cosine, 1e-6)
    meta = [x.to("meta") for x in inputs]
    pairs = [(FWD(*inputs, *options, where[0]), FWD(*meta, *options))]
    (points, _, maximum, _, *rest), _ = pairs[0]
    backward = points, None, maximum, None
    kept = points, maximum, *rest
    faked = [[None if x is None else x.to("meta") for x in group] for group in (backward, kept)]
    pairs.append((BWD(*backward, *inputs, *kept, *options, where[0]), BWD(*faked[0], *meta, *faked[1], *options)))
    cost = inputs[1]
    pairs.append((FWD_2D(cost, 20.0, 2.0, where[0]), FWD_2D(cost.to("meta"), 20.0, 2.0)))
    saved = pairs[-1][0]
    args = saved[0], cost, *saved
    pairs.append(([BWD_2D(*args, 20.0, 2.0, where[0])], [BWD_2D(*(x.to("meta") for x in args), 20.0, 2.0)]))
    for reals, fakes in pairs:
        for real, fake in zip(reals, fakes, strict=True):
            assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


def test_compiled_as_one_graph(where, inputs):
    def match(query, features):
        found = correlation_soft_argmax(query, features, backend=where[0])
        return found.points * 2, found.max - found.min, soft_argmax_2d(features, backend=where[0])

    torch._dynamo.reset()  # every layout is compiled again, and the limit on that is eight
    compiled = torch.compile(match, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, inputs), results(match, inputs))


@pytest.mark.slow
def test_compiled_by_inductor(where, plain):
    def match(query, features):
        return correlation_soft_argmax(query, features, backend=where[0]).points + query.sum()

    for actual, expected in zip(
        results(torch.compile(match, fullgraph=True), plain), results(match, plain), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_other_numbers_of_queries_and_frames_do_not_recompile():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(correlation_soft_argmax, fullgraph=True, backend=counter)
    for queries, frames in ((5, 3), (7, 4), (9, 8), (30, 9), (31, 17)):
        compiled(torch.randn(2, queries, 16), torch.randn(2, frames, 4, 5, 16))
    assert counter.frame_count <= 2  # the static shape first, then every other


def test_exported_program_takes_any_clip(where, plain, tmp_path):
    class Match(torch.nn.Module):
        def forward(self, query, features):
            return correlation_soft_argmax(query, features, backend=where[0]).points

    queries, frames = torch.export.Dim("queries"), torch.export.Dim("frames")
    program = torch.export.export(Match(), tuple(plain), dynamic_shapes=[{1: queries}, {1: frames}])
    torch.export.save(program, tmp_path / "match.pt2")
    loaded = torch.export.load(tmp_path / "match.pt2").module()
    inputs = [torch.randn(2, 11, 16, device=where[1]), torch.randn(2, 7, 4, 5, 16, device=where[1])]
    assert torch.equal(loaded(*inputs), Match()(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_apply(where, plain, dtype):
    backend, device = where
    expected = results(lambda *x: correlation_soft_argmax(*x, backend=backend), plain)
    with torch.autocast(device, dtype=dtype):
        assert_same(results(lambda *x: correlation_soft_argmax(*x, backend=backend), plain), expected)
        assert soft_argmax_2d(plain[1], backend=backend).dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(where, plain, use_reentrant):
    def match(*x):
        return tuple(correlation_soft_argmax(*x, backend=where[0]))

    def run(wrap):
        leaves = [x.detach().clone().requires_grad_() for x in plain]
        out = wrap(*leaves)
        sum(x.sum() for x in out).backward()  # reentrant checkpoints refuse torch.autograd.grad
        return [*out, *(x.grad for x in leaves)]

    assert_same(run(lambda *x: checkpoint(match, *x, use_reentrant=use_reentrant)), run(match))


def test_a_dispatch_mode_sees_one_operator(where, plain):
    class Counter(TorchDispatchMode):
        seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(function)
            return function(*args, **(kwargs or {}))

    query, features = (x.requires_grad_() for x in plain)
    with Counter() as counter:
        correlation_soft_argmax(query, features, backend=where[0]).points.sum().backward()
        soft_argmax_2d(features, backend=where[0]).sum().backward()
    assert [f for f in counter.seen if f.namespace == "tritonkern"] == [FWD, BWD, FWD_2D, BWD_2D]


def test_statistics_without_a_gradient_are_not_differentiated(where, plain):
    """A tracker's head uses them detached; the operator must not receive a tensor of zeros for each."""

    class Gradients(TorchDispatchMode):
        seen = None

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is BWD:
                self.seen = [x is None for x in args[:4]]
            return function(*args, **(kwargs or {}))

    query, features = (x.requires_grad_() for x in plain)
    with Gradients() as gradients:
        correlation_soft_argmax(query, features, backend=where[0]).points.sum().backward()
    assert gradients.seen == [False, True, True, True]


def test_cells_and_weights_carry_no_gradient(plain):
    query, features = (x.requires_grad_() for x in plain)
    assert [x.requires_grad for x in FWD(query, features, *OPTIONS, "reference")] == [True] * 4 + [False] * 5
    assert [x.requires_grad for x in FWD_2D(features, 20.0, 2.0, "reference")] == [True, False, False, False]


@pytest.mark.parametrize("backend", [p for p in fast_backends(op.NAME) if p.values[0][0] == "cpp"])
def test_set_num_threads_is_obeyed(backend):
    output = run_python(
        """
        import os, torch, tritonkern
        def threads_after(count):
            torch.set_num_threads(count)
            query, features = torch.randn(2, 64, 32), torch.randn(2, 6, 24, 24, 32)
            before = len(os.listdir("/proc/self/task"))
            tritonkern.correlation_soft_argmax(query, features, backend="cpp")
            return len(os.listdir("/proc/self/task")) - before
        torch.set_num_threads(1); torch.randn(2, 6, 24, 24, 32)
        print(threads_after(1), threads_after(3))
        """,
        OMP_NUM_THREADS="1",
    )
    assert output.split() == ["0", "2"]


NESTED = torch.nested.as_nested_tensor([torch.randn(3, 16), torch.randn(2, 16)])
LONG = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 2, 100_000, 16)
QUERY, FEATURES = torch.randn(2, 3, 16), torch.randn(2, 5, 4, 6, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
        ({"features": FEATURES.int()}, TypeError, "features must be float64, .* got torch.int32"),
        ({"features": FEATURES.double()}, TypeError, "features must have the dtype of query"),
        ({"query": None}, TypeError, "query must be a torch.Tensor, got NoneType"),
        ({"features": None}, TypeError, "features must be a torch.Tensor, got NoneType"),
        ({"query": torch.tensor(1.0)}, ValueError, r"query must have shape \[B, N, C\], got \(\)"),
        ({"features": torch.tensor(1.0)}, ValueError, r"features must have shape \[B, T, h, w, C\], got \(\)"),
        ({"query": NESTED}, TypeError, "query must be a dense .strided. tensor, got a nested one"),
        ({"features": FEATURES.to_sparse()}, TypeError, "features must be a dense"),
        ({"features": FEATURES.to("meta")}, ValueError, "features must be on the device of query, cpu, got meta"),
        ({"query": QUERY[0]}, ValueError, r"query must have shape \[B, N, C\], got \(3, 16\)"),
        ({"features": FEATURES[0]}, ValueError, r"features must have shape \[B, T, h, w, C\]"),
        ({"features": FEATURES[:1]}, ValueError, "features must have the batch size B of query, 2, got 1"),
        ({"query": QUERY[..., :8]}, ValueError, "features must have the number of channels C of query, 8, got 16"),
        ({"query": QUERY[..., :0], "features": FEATURES[..., :0]}, ValueError, "at least one channel"),
        ({"features": FEATURES[:, :, :0]}, ValueError, "features must have at least one cell, got a grid of 0 x 6"),
        ({"temperature": 0}, ValueError, "temperature must be a positive finite number .*, got 0"),
        ({"temperature": float("inf")}, ValueError, "temperature must be a positive finite"),
        ({"temperature": torch.tensor(1.0)}, TypeError, "temperature must be a number, got Tensor"),
        ({"radius": -1.0}, ValueError, "radius must be a positive number, .*, got -1.0"),
        ({"radius": float("nan")}, ValueError, "radius must be a positive number, .*, got nan"),
        ({"radius": "5"}, TypeError, "radius must be a number, got str"),
        ({"eps": 0.0}, ValueError, "eps must be a positive finite number"),
        ({"radius": 50_000.0, "features": LONG}, ValueError, "radius must be at most 46340 cells or cover the whole"),
        ({"cosine": 1}, TypeError, "cosine must be a bool, got int"),
        ({"backend": "cuda"}, ValueError, "backend must be one of cpp, triton, reference or None, got 'cuda'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        correlation_soft_argmax(**{"query": QUERY, "features": FEATURES, **arguments})


@pytest.mark.parametrize(
    ("cost", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "cost_volume must be a torch.Tensor, got list"),
        (None, {}, TypeError, "cost_volume must be a torch.Tensor, got NoneType"),
        (NESTED, {}, TypeError, "cost_volume must be a dense .strided. tensor, got a nested one"),
        (torch.tensor(1.0), {}, ValueError, r"cost_volume must have shape \[..., h, w\], got \(\)"),
        (QUERY.long(), {}, TypeError, "cost_volume must be float64"),
        (QUERY[0, 0], {}, ValueError, r"cost_volume must have shape \[..., h, w\], got \(16,\)"),
        (QUERY[:, :0], {}, ValueError, "cost_volume must have at least one cell"),
        (QUERY, {"temperature": -2}, ValueError, "temperature must be a positive"),
        (QUERY, {"radius": True}, TypeError, "radius must be a number, got bool"),
        (QUERY, {"backend": 1}, TypeError, "backend must be a string"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments_of_the_soft_argmax(cost, options, error, message):
    with pytest.raises(error, match=message):
        soft_argmax_2d(cost, **options)


def test_direct_calls_of_the_operators_are_checked():
    """Kernels take raw pointers, so whoever calls `torch.ops` must not get past the checks either."""
    saved = FWD(QUERY, FEATURES, 20.0, 5.0, False, 1e-6)
    kept = (saved[0], saved[2], *saved[4:])
    with pytest.raises(ValueError, match="temperature"):
        FWD(QUERY, FEATURES, -1.0, 5.0, False, 1e-6)
    for index in range(len(kept)):
        wrong = [x[:1] if at == index and x.numel() else x for at, x in enumerate(kept)]
        if kept[index].numel():
            with pytest.raises(ValueError, match="pass what the forward operator returned"):
                BWD(saved[0], None, None, None, QUERY, FEATURES, *wrong, 20.0, 5.0, False, 1e-6)
    with pytest.raises(ValueError, match="saved_query_inverse_norm must be"):  # saved without cosine
        BWD(saved[0], None, None, None, QUERY, FEATURES, *kept, 20.0, 5.0, True, 1e-6)
    with pytest.raises(ValueError, match="grad_points must be"):
        BWD(saved[0].double(), None, None, None, QUERY, FEATURES, *kept, 20.0, 5.0, False, 1e-6)
    points, maximum, best, weight = FWD_2D(QUERY, 20.0, 5.0)
    with pytest.raises(ValueError, match="saved_best must be"):
        BWD_2D(points, QUERY, points, maximum, best.long(), weight, 20.0, 5.0)


def test_compiled_once_for_several_temperatures():
    """torch.compile makes a number that changes a variable of the graph."""
    torch._dynamo.reset()
    query, features, cost = torch.randn(1, 3, 16), torch.randn(1, 2, 5, 6, 16), torch.randn(2, 5, 6)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(temperature):
        match = tritonkern.correlation_soft_argmax(query, features, temperature=temperature)
        return match.points, tritonkern.soft_argmax_2d(cost, temperature=temperature)

    for temperature in (20.0, 10.0, 5.0):
        points, peaks = compiled(temperature)
        assert torch.equal(points, tritonkern.correlation_soft_argmax(query, features, temperature=temperature).points)
        assert torch.equal(peaks, tritonkern.soft_argmax_2d(cost, temperature=temperature))
