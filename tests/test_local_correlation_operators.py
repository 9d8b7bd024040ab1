"""Local correlation among PyTorch's tools: opcheck, compile, export, autocast, checkpointing, bad arguments."""

import pytest
import torch
from oracle import fast_backends, gradients
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tritonkern import local_correlation, local_correlation_linear
from tritonkern.ops.local_correlation import op

FWD, BWD = op.local_correlation_fwd, op.local_correlation_bwd
LINEAR_FWD, LINEAR_BWD = op.local_correlation_linear_fwd, op.local_correlation_linear_bwd
BOTH = pytest.mark.parametrize("linear", [False, True], ids=["alone", "linear"])


@pytest.fixture(params=fast_backends(op.NAME))
def where(request):
    return request.param


def tensors(linear, device="cpu", B=2, T=3, N=5, grid=(4, 6), C=8, S=3, dtype=torch.float32, per_frame=False):
    """features, support, coords and, before a linear layer, weight and bias; of radius 1."""
    support = (B, N, T, S, C) if per_frame else (B, N, S, C)
    shapes = [(B, T, *grid, C), support] + [(7, 9 * S), (7,)] * linear
    features, support, *others = (torch.randn(x, device=device).to(dtype) for x in shapes)
    return [features, support, torch.rand(B, T, N, 2, device=device) * 8 - 1, *others]


def correlate(linear, backend=None, align_corners=True, **options):
    function = local_correlation_linear if linear else local_correlation
    return lambda *x: function(*x, radius=1, align_corners=align_corners, backend=backend, **options)


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "sliced": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "empty": lambda x: x[:0] if x.dim() > 2 else x,
}


def arguments(linear, device, layout):
    return [LAYOUTS[layout](x) for x in tensors(linear, device, per_frame=layout == "sliced")]


@BOTH
@pytest.mark.parametrize("layout", ["transposed", "sliced", "empty"])
def test_opcheck(where, linear, layout):
    inputs = arguments(linear, where[1], layout)
    options = (1, layout == "sliced", layout == "empty")
    forward, backward = (LINEAR_FWD, LINEAR_BWD) if linear else (FWD, BWD)
    out = forward(*inputs, *options, where[0])
    saved = inputs[:4] if linear else inputs
    for needs_grad in ([True] * len(inputs), [False, True, False, True, False][: len(inputs)]):
        torch.library.opcheck(backward, (torch.randn_like(out), *saved, *options, needs_grad, where[0]))
    torch.library.opcheck(forward, (*(x.requires_grad_() for x in inputs), *options, where[0]))


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_fake_outputs_are_like_real_ones(where, linear, layout, dtype):
    inputs = [x.to(dtype) for x in arguments(linear, where[1], layout)]
    inputs[2] = inputs[2].to(op.accumulator(dtype))
    meta = [x.to("meta") for x in inputs]
    forward, backward = (LINEAR_FWD, LINEAR_BWD) if linear else (FWD, BWD)
    options = (1, False, True)
    out, fake = forward(*inputs, *options, where[0]), forward(*meta, *options)
    saved = slice(4 if linear else 3)
    for needs_grad in ([True] * len(inputs), [False] * len(inputs)):
        grads = backward(out, *inputs[saved], *options, needs_grad, where[0])
        fakes = backward(fake, *meta[saved], *options, needs_grad)
        for real, other in zip((out, *grads), (fake, *fakes), strict=True):
            assert (real.shape, real.stride(), real.dtype) == (other.shape, other.stride(), other.dtype)


@BOTH
def test_compiled_as_one_graph(where, linear):
    torch._dynamo.reset()
    inputs = tensors(linear, where[1])
    function = correlate(linear, where[0], align_corners=False, padding="zeros", axis_order="yx")
    grad_out = torch.randn_like(function(*inputs))
    compiled = torch.compile(lambda *x: function(*x) * 2, fullgraph=True, backend="aot_eager")
    plain = gradients(lambda *x: function(*x) * 2, inputs, grad_out)
    for x, y in zip(gradients(compiled, inputs, grad_out), plain, strict=True):
        assert torch.equal(x, y)


@BOTH
def test_exported_program_takes_any_clip_and_any_points(where, linear):
    class Correlate(torch.nn.Module):
        def forward(self, features, support, coords, *others):
            return correlate(linear, where[0])(features, support, coords, *others)

    inputs = tensors(linear, where[1])
    batch, frames, points = (torch.export.Dim(name) for name in ("batch", "frames", "points"))
    shapes = ({0: batch, 1: frames}, {0: batch, 1: points}, {0: batch, 1: frames, 2: points})
    if linear:
        shapes = (*shapes, ({}, {}))
    program = torch.export.export(Correlate(), tuple(inputs), dynamic_shapes=shapes)
    inputs = [*tensors(linear, where[1], B=3, T=7, N=11)[:3], *inputs[3:]]
    assert torch.equal(program.module()(*inputs), Correlate()(*inputs))


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(where, linear, dtype):
    """Features, support, weight and bias go to the dtype of autocast; positions stay as exact as they are."""
    features, support, coords, *others = tensors(linear, where[1])
    features.requires_grad_()
    with torch.autocast(where[1], dtype=dtype):
        out = correlate(linear, where[0])(features, support.to(dtype), coords, *others)
    halves = [x.to(dtype) for x in (features, support, *others)]
    assert out.dtype == dtype
    assert torch.equal(out, correlate(linear, where[0])(*halves[:2], coords, *halves[2:]))
    out.sum().backward()
    assert features.grad.dtype == torch.float32


@BOTH
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(where, linear, use_reentrant):
    inputs = tensors(linear, where[1])
    function = correlate(linear, where[0])

    def run(wrap):
        leaves = [x.clone().requires_grad_() for x in inputs]
        wrap(*leaves).square().sum().backward()
        return [x.grad for x in leaves]

    saved = run(lambda *x: checkpoint(function, *x, use_reentrant=use_reentrant))
    for x, y in zip(saved, run(function), strict=True):
        assert torch.equal(x, y)


@BOTH
def test_a_dispatch_mode_sees_one_operator(where, linear):
    class Counter(TorchDispatchMode):
        seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(function)
            return function(*args, **(kwargs or {}))

    inputs = [x.requires_grad_() for x in tensors(linear, where[1])]
    with Counter() as counter:
        correlate(linear, where[0])(*inputs).sum().backward()
    expected = [LINEAR_FWD, LINEAR_BWD] if linear else [FWD, BWD]
    assert [function for function in counter.seen if function.namespace == "tritonkern"] == expected


FEATURES, SUPPORT, COORDS, WEIGHT, BIAS = tensors(True)
OWN = tensors(False, per_frame=True)[1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": [1.0]}, TypeError, "features must be a torch.Tensor, got list"),
        ({"support": SUPPORT.int()}, TypeError, "support must be float64, .* got torch.int32"),
        ({"support": SUPPORT.double()}, TypeError, "support must have the dtype of features"),
        ({"features": FEATURES.to_sparse()}, TypeError, "features must be a dense"),
        ({"support": SUPPORT.to("meta")}, ValueError, "support must be on the device of features, cpu, got meta"),
        ({"features": FEATURES[0]}, ValueError, r"features must have shape \[B, T, h, w, C\]"),
        ({"support": SUPPORT[0]}, ValueError, r"support must have shape \[B, N, S, C\] or"),
        ({"features": FEATURES[:, :, :0]}, ValueError, "features must have at least one cell"),
        ({"support": SUPPORT[:, :, :0]}, ValueError, "support must have at least one vector"),
        ({"support": SUPPORT[:1]}, ValueError, "support must have B and C of features"),
        ({"support": SUPPORT[..., :4]}, ValueError, "support must have B and C of features"),
        ({"support": OWN[:, :, :2]}, ValueError, "support must have T of features, 3, on axis 2"),
        ({"coords": COORDS[..., :1]}, ValueError, r"coords must have shape \(2, 3, 5, 2\)"),
        ({"coords": COORDS.transpose(1, 2)}, ValueError, r"coords must have shape \(2, 3, 5, 2\)"),
        ({"coords": COORDS.long()}, TypeError, "coords must be float64"),
        ({"radius": -1}, ValueError, "radius must be from 0 to 15, got -1"),
        ({"radius": 16}, ValueError, "radius must be from 0 to 15, got 16"),
        ({"radius": 1.0}, TypeError, "radius must be an int, got float"),
        ({"radius": True}, TypeError, "radius must be an int, got bool"),
        ({"padding": "reflection"}, ValueError, "padding must be 'border' or 'zeros', got 'reflection'"),
        ({"axis_order": "xyz"}, ValueError, "axis_order must be 'xy' or 'yx', got 'xyz'"),
        ({"align_corners": None}, TypeError, "align_corners must be a bool, got NoneType"),
        ({"backend": "cuda"}, ValueError, "backend must be one of cpp, triton, reference or None"),
        ({"weight": WEIGHT[:, 1:]}, ValueError, r"weight must have \(2 radius \+ 1\)\^2 S = 27 columns"),
        ({"weight": BIAS}, ValueError, "weight must have 2 axes"),
        ({"weight": WEIGHT.double()}, TypeError, "weight must have the dtype of features"),
        ({"bias": BIAS[1:]}, ValueError, r"bias must have shape \(7,\), as weight has rows, got \(6,\)"),
        ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor"),
        ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
        ({"support": None}, TypeError, "support must be a torch.Tensor, got NoneType"),
        ({"coords": torch.tensor(1.0)}, ValueError, r"coords must have shape \[B, T, N, 2\], got \(\)"),
        ({"features": torch.tensor(1.0)}, ValueError, "features must have shape"),
        ({"coords": COORDS.to_sparse()}, TypeError, "coords must be a dense"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments(arguments, error, message):
    good = {"features": FEATURES, "support": SUPPORT, "coords": COORDS, "radius": 1, "align_corners": True}
    with pytest.raises(error, match=message):
        local_correlation_linear(**{**good, "weight": WEIGHT, "bias": BIAS, **arguments})
    if not {"weight", "bias"} & set(arguments):
        with pytest.raises(error, match=message):
            local_correlation(**{**good, **arguments})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    """They claim to be strided, and have no shape."""
    with pytest.raises(TypeError, match="support must be a dense"):
        local_correlation(FEATURES, torch.nested.nested_tensor([*SUPPORT]), COORDS, radius=1, align_corners=True)


def test_direct_calls_of_the_operators_are_checked():
    """Kernels use the addresses of tensors, so callers of `torch.ops` must not get past the checks either."""
    good, options = (FEATURES, SUPPORT, COORDS), (1, False, True)
    out = FWD(*good, *options)
    flat = LINEAR_FWD(*good, WEIGHT, BIAS, *options)
    with pytest.raises(TypeError, match="coords must be torch.float32"):
        FWD(*good[:2], COORDS.double(), *options)
    with pytest.raises(ValueError, match="coords"):
        FWD(*good[:2], COORDS[:1], *options)
    with pytest.raises(ValueError, match="radius"):
        FWD(*good, 16, False, True)
    for bad in (out[:1], out.double()):
        with pytest.raises(ValueError, match="grad_out"):
            BWD(bad, *good, *options, [True] * 3)
    with pytest.raises(ValueError, match="grad_out"):
        LINEAR_BWD(flat[..., 1:], *good, WEIGHT, *options, [True] * 5)
    with pytest.raises(ValueError, match="weight"):
        LINEAR_BWD(flat, *good, WEIGHT[:, 1:], *options, [True] * 5)
    with pytest.raises(ValueError, match="needs_grad must have 5 flags"):
        LINEAR_BWD(flat, *good, WEIGHT, *options, [True] * 4)


def test_the_binding_names_the_argument():
    _cpp = pytest.importorskip("tritonkern._cpp", exc_type=ImportError)
    tensors = dict(features=FEATURES, support=SUPPORT, position=COORDS, out=FEATURES.new_empty(2, 3, 5, 27))
    options = dict(radius=1, zeros=False, y_first=True, num_threads=1)
    _cpp.local_correlation_forward(**tensors, **options)
    for name, bad, error in (
        ("features", FEATURES.int(), TypeError),
        ("support", SUPPORT[..., 1:], ValueError),
        ("position", COORDS.double(), TypeError),
        ("out", tensors["out"][..., 1:], ValueError),
        ("out", tensors["out"].mT.contiguous().mT, ValueError),
        ("radius", 16, ValueError),
    ):
        with pytest.raises(error, match=name):
            _cpp.local_correlation_forward(**{**tensors, **options, name: bad})
    left, right, out = torch.zeros(3, 4), torch.zeros(4, 5), torch.zeros(3, 5)
    _cpp.local_correlation_multiply(left, right, False, 1, out)
    for arguments, name in (((left[:, 1:], right, out), "right"), ((left, right, out[1:]), "out")):
        with pytest.raises(ValueError, match=name):
            _cpp.local_correlation_multiply(*arguments[:2], False, 1, arguments[2])
