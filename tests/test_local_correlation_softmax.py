"""Local correlation with a softmax over its samples, of one pair of features and support or of several."""

import dataclasses
import functools

import pytest
import test_local_correlation as local
import torch
import torch.nn.functional as F
from oracle import assert_as_exact_as_eager, fast_backends, native_backends, peak_memory
from test_local_correlation import COTRACKER, DTYPES, LOCOTRACK, NAN, results

from tritonkern import local_correlation, local_correlation_linear
from tritonkern.ops.local_correlation import op

ANOTHER = dict(grid=(3, 7), C=5, S=2)  # another map for the same points
LEVEL_3 = dict(T=2, N=1, grid=(5, 7), C=12, S=49, radius=3)  # DiTracker's coarsest, of odd width


@pytest.fixture(params=fast_backends(op.NAME))
def where(request):
    return request.param


@dataclasses.dataclass
class Cost:
    """One call; `tensors` are all features, all supports, coords and, before a linear layer, weight and bias."""

    pairs: int
    tensors: list
    grad_out: torch.Tensor
    radius: int
    options: dict
    scale: float | None

    def split(self, tensors):
        count = self.pairs
        return tensors[:count], tensors[count : 2 * count], tensors[2 * count], tensors[2 * count + 1 :]

    def call(self, backend, *tensors):
        features, support, coords, layer = self.split(tensors)
        options = dict(**self.options, radius=self.radius, softmax=True, scale=self.scale, backend=backend)
        if not layer:
            return local_correlation(*features, *support, coords, **options)
        if self.pairs == 1:
            return local_correlation_linear(*features, *support, coords, *layer, **options)
        return local_correlation_linear(features, support, coords, *layer, **options)

    def weights(self, tensors, reverse=False):
        """The distributions of each pair, `[B, T, N, P, S]`, from sampled patches and PyTorch's softmax."""
        features, support, coords, _ = self.split(tensors)
        for x, y in zip(features, support, strict=True):
            scale = x.shape[-1] ** -0.5 if self.scale is None else self.scale
            yield (scale * local.eager(x, y, coords, self.radius, self.options, reverse)).softmax(-2)

    def eager(self, *tensors, reverse=False):
        layer, weights = self.split(tensors)[3], list(self.weights(tensors, reverse))
        if not layer:
            return weights[0]
        flat, (weight, bias) = torch.cat([x.flatten(-2) for x in weights], -1), layer
        return F.linear(flat.flip(-1), weight.flip(-1), bias) if reverse else F.linear(flat, weight, bias)

    def largest_terms(self):
        """Of the sums behind output and gradients: see `test_local_correlation.largest_terms`."""
        tensors = [x.double() for x in self.tensors]
        features, support, coords, layer = self.split(tensors)
        grad_out, weights = self.grad_out.double().abs(), list(self.weights(tensors))
        columns = [x.shape[-2] * x.shape[-1] for x in weights]
        parts = (grad_out @ layer[0].abs()).split(columns, -1) if layer else [grad_out.flatten(-2)]
        of_features, of_support, of_coords = [], [], 0
        for x, y, weight, part in zip(features, support, weights, parts, strict=True):
            scale = x.shape[-1] ** -0.5 if self.scale is None else self.scale
            part = part.view_as(weight)
            size = scale * weight * (part + (weight * part).sum(-2, keepdim=True))
            terms = local.largest_terms(local.Case([x, y, coords], size, self.radius, self.options))
            of_features.append(terms[1])
            of_support.append(terms[2])
            of_coords += terms[3]
        of_layer = [grad_out.sum((0, 1, 2)).max()] * 2 if layer else []
        return [0, *of_features, *of_support, of_coords, *of_layer]


def cost(
    device="cpu", *, pairs=(), dtype=torch.float32, linear=False, outputs=5, options=COTRACKER, scale=None, **sizes
):
    """Random inputs of `local.case`, with more pairs of these sizes for the same points."""
    first = local.case(device, dtype=dtype, options=options, **sizes)
    shared = {key: sizes[key] for key in ("B", "T", "N", "radius") if key in sizes}
    cases = [first, *(local.case(device, dtype=dtype, **shared, **more) for more in pairs)]
    features, support, _ = zip(*(x.tensors for x in cases), strict=True)
    tensors, grad_out = [*features, *support, first.tensors[2]], first.grad_out
    if linear or pairs:
        inputs = sum(x.grad_out.shape[-2:].numel() for x in cases)
        tensors += [torch.randn(shape).to(device, dtype) for shape in ((outputs, inputs), (outputs,))]
        grad_out = torch.randn(*grad_out.shape[:3], outputs).to(device, dtype)
    return Cost(len(cases), tensors, grad_out, first.radius, options, scale)


def run(where, case):
    return results(functools.partial(case.call, where[0]), case.tensors, case.grad_out)


def check(where, case):
    """Output and all gradients against float64, by the rule of `oracle.assert_as_exact_as_eager`."""
    actual = run(where, case)
    exact = results(case.eager, [x.double() for x in case.tensors], case.grad_out.double())
    plain = [results(functools.partial(case.eager, reverse=r), case.tensors, case.grad_out) for r in (False, True)]
    for i, (result, term) in enumerate(zip(actual, case.largest_terms(), strict=True)):
        assert result.dtype == (case.grad_out if i == 0 else case.tensors[i - 1]).dtype
        eager_results = [x[i].cpu() for x in plain]
        assert_as_exact_as_eager(result.cpu(), eager_results, exact[i].cpu(), term, f"result {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        LEVEL_3,
        dict(S=1, C=40, radius=2, scale=3.0, linear=True),
        dict(S=17, T=18, N=2, per_frame=True, scale=0.01),
        dict(pairs=[ANOTHER]),
        dict(**LEVEL_3, pairs=[dict(grid=(5, 7), C=12, S=49)]),
        dict(B=2, T=3, N=5, grid=(6, 8), C=24, S=25, radius=2, pairs=[ANOTHER, dict(S=1)], scale=0.5),
    ],
    ids=str,
)
def test_result_and_gradients(where, dtype, sizes):
    for options in (COTRACKER, LOCOTRACK):
        check(where, cost(where[1], dtype=dtype, options=options, **sizes))


@pytest.mark.parametrize("where", native_backends(op.NAME))
def test_textbook(where):
    """One product, one exponential at a time."""
    for options in (COTRACKER, LOCOTRACK):
        this = cost(where[1], grid=(4, 5), S=2, C=3, N=2, dtype=torch.float64, options=options, scale=1.3)
        products = local.textbook(*(x.cpu() for x in this.tensors), this.radius, **options)
        out = this.call(where[0], *this.tensors).cpu()
        for place in torch.cartesian_prod(*map(torch.arange, products.shape)).tolist():
            *point, p, s = place
            powers = [float(torch.exp(1.3 * z)) for z in products[(*point, slice(None), s)]]
            assert abs(float(out[tuple(place)]) - powers[p] / sum(powers)) < 1e-12


def test_sums_to_one_over_places(where):
    """For each support, over the places; not for each place over the supports."""
    this = cost(where[1], N=8, S=9, scale=2.0, options=LOCOTRACK)
    out = this.call(where[0], *this.tensors)
    torch.testing.assert_close(out.sum(-2), torch.ones_like(out.sum(-2)))
    assert (out.sum(-1) - 1).abs().max() > 0.1


@pytest.mark.parametrize("axis_order", ["xy", "yx"])
def test_order_of_axes(where, axis_order):
    """The two channels are x and y, of which each support takes one: the softmax of a ramp along that axis."""
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(12.0), indexing="ij")
    features = torch.stack([x, y], -1)[None, None].to(where[1])
    coords = torch.tensor([5.25, 4.5], device=where[1]).view(1, 1, 1, 2)
    support = torch.eye(2, device=where[1])[None, None]
    options = dict(radius=2, align_corners=True, axis_order=axis_order, backend=where[0])
    out = local_correlation(features, support, coords, softmax=True, scale=0.5, **options)[0, 0, 0]
    ramp = (0.5 * torch.arange(-2.0, 3)).softmax(0) / 5
    of_x, of_y = out.cpu().unflatten(0, (5, 5)).unbind(-1)
    if axis_order == "yx":
        of_x, of_y = of_x.mT, of_y.mT
    torch.testing.assert_close(of_x, ramp[:, None].expand(5, 5))
    torch.testing.assert_close(of_y, ramp.expand(5, 5))


@pytest.mark.parametrize("options", [COTRACKER, LOCOTRACK], ids=["border", "zeros"])
def test_places_far_outside_are_all_alike(where, options):
    this = cost(where[1], T=1, N=3, options=options)
    far = torch.tensor([[-1e30, -1e30], [float("inf"), 3e9], [1e6, 1e6]], device=where[1]).view(1, 1, 3, 2)
    out, *grads = run(where, dataclasses.replace(this, tensors=[*this.tensors[:2], far]))
    torch.testing.assert_close(out, torch.full_like(out, 1 / 9))
    assert all(x.isfinite().all() for x in grads) and not grads[2].any()


@pytest.mark.parametrize("linear", [False, True], ids=["alone", "linear"])
def test_broken_numbers_reach_what_depends_on_them(where, linear):
    """A NaN in the map of one frame reaches points of that frame, a NaN position its own."""
    this = cost(where[1], T=3, N=40, grid=(8, 9), linear=linear, pairs=[ANOTHER] if linear else ())
    clean, pairs = run(where, this)[0], this.pairs
    bad_map, bad_position = ([x.clone() for x in this.tensors] for _ in range(2))
    bad_map[pairs - 1][0, 1, 2, 3, 1] = bad_position[2 * pairs][0, 1, 2, 0] = NAN
    expected = torch.zeros_like(clean, dtype=torch.bool)
    expected[:, 1, 2] = True
    for tensors, broken in ((bad_map, this.eager(*bad_map).isnan()), (bad_position, expected)):
        out = this.call(where[0], *tensors)
        assert torch.equal(out.isnan(), broken) and 0 < broken.sum() < out[:, 1].numel()
        assert torch.equal(out[~broken], clean[~broken]) and not broken[:, ::2].any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        *[(dict(scale=x), ValueError, "scale must be a positive number") for x in (0.0, -1.0, NAN, float("inf"))],
        (dict(scale="1"), TypeError, "scale must be a number, got str"),
        (dict(softmax=1), TypeError, "softmax must be a bool, got int"),
        (dict(softmax=False, scale=0.5), ValueError, "scale is that of the softmax, got 0.5 without softmax=True"),
    ],
    ids=str,
)
def test_bad_scales(arguments, error, message):
    this = cost()
    options = {**COTRACKER, "radius": 1, "softmax": True, **arguments}
    with pytest.raises(error, match=message):
        local_correlation(*this.tensors, **options)
    with pytest.raises(error, match=message):
        local_correlation_linear(*this.tensors, torch.randn(3, 81), **options)


def test_bad_pairs():
    this = cost(pairs=[ANOTHER])
    features, support, coords, (weight, bias) = this.split(this.tensors)
    for change, error, message in (
        (dict(support=support[:1]), ValueError, "features and support must be as many, at least one, got 2 and 1"),
        (dict(features=[], support=[]), ValueError, "at least one, got 0 and 0"),
        (dict(features=features[0]), ValueError, "got 1 and 2"),
        (dict(features=[features[0], None]), TypeError, r"features\[1\] must be a torch.Tensor, got NoneType"),
        (dict(support=support[::-1]), ValueError, r"support\[0\] must have B and C of features\[0\]"),
        (dict(features=[features[0], features[1][:, :1]]), ValueError, "coords must have shape"),
        (dict(features=[x.double() for x in features]), TypeError, r"weight must have the dtype of features\[0\]"),
        (
            dict(features=[features[0], features[1].double()], support=[support[0], support[1].double()]),
            TypeError,
            r"features\[1\] must have the dtype of features\[0\]",
        ),
        (
            dict(weight=weight[:, 1:]),
            ValueError,
            r"weight must have \(2 radius \+ 1\)\^2 S = 9 x 9 \+ 9 x 2 = 99 columns",
        ),
    ):
        arguments = dict(features=features, support=support, coords=coords, weight=weight, bias=bias) | change
        with pytest.raises(error, match=message):
            local_correlation_linear(**arguments, radius=1, **COTRACKER, softmax=True)


def test_pairs_without_a_softmax(where):
    """The layer of each pair applied by itself."""
    this = cost(where[1], pairs=[ANOTHER], dtype=torch.float64)
    features, support, coords, (weight, bias) = this.split(this.tensors)
    options = dict(radius=1, **COTRACKER, backend=where[0])
    found = local_correlation_linear(features, support, coords, weight, bias, **options)
    first, second = (local_correlation(x, y, coords, **options) for x, y in zip(features, support, strict=True))
    torch.testing.assert_close(found, F.linear(torch.cat([first.flatten(-2), second.flatten(-2)], -1), weight, bias))


@pytest.mark.parametrize("where", native_backends(op.NAME))
def test_alone_gradcheck_and_opcheck(where):
    this = cost(where[1], T=2, N=2, grid=(3, 4), C=2, S=2, dtype=torch.float64)
    tensors = [x.requires_grad_() for x in this.tensors]
    assert torch.autograd.gradcheck(functools.partial(this.call, where[0]), tensors, nondet_tol=0)
    torch.library.opcheck(op.local_correlation_fwd, (*tensors, 1, False, False, 0.5, where[0]))


def test_what_is_kept_for_the_backward_pass(where):
    """Nothing but the inputs, before a linear layer and alone."""
    for linear in (False, True):
        this, kept = cost(where[1], linear=linear), []
        leaves = [x.requires_grad_() for x in this.tensors]
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            this.call(where[0], *leaves)
        inputs = {x.data_ptr() for x in leaves}
        assert kept and all(x.data_ptr() in inputs for x in kept)


def test_memory(where):
    """The distributions of both pairs would be 118 MB; 12 MiB blocks of these and of their gradients are stored."""
    sizes = dict(T=24, N=256, S=49, radius=3, C=16, grid=(24, 32))
    this = cost(where[1], **sizes, pairs=[dict(S=49, C=16, grid=(24, 32))], outputs=32)
    run(where, this)
    with peak_memory(where[1]) as peak:
        run(where, this)
    assert peak.mebibytes < (64 if where[1] == "cpu" else 900)
