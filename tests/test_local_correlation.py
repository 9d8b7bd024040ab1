"""Local correlation, alone and before a linear layer: what it computes, in every backend that can run here natively."""

import dataclasses
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from official import needs_official, official  # noqa: F401
from oracle import assert_as_exact_as_eager, fast_backends, native_backends, peak_memory

from tritonkern import local_correlation, local_correlation_linear
from tritonkern.ops.local_correlation import op

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")
BOTH = pytest.mark.parametrize("linear", [False, True], ids=["alone", "linear"])
COTRACKER = dict(padding="border", align_corners=True, axis_order="xy")
LOCOTRACK = dict(padding="zeros", align_corners=False, axis_order="yx")
OPTIONS = [
    dict(padding=padding, align_corners=align_corners, axis_order=axis_order)
    for padding, align_corners, axis_order in itertools.product(("border", "zeros"), (True, False), ("xy", "yx"))
]


@pytest.fixture(params=fast_backends(op.NAME))
def where(request):
    return request.param


def sampled(features, coords, radius, padding, align_corners, axis_order):
    """Patches `[B, T, N, P, C]` as the authors' repositories make them, by grid_sample."""
    height, width = features.shape[2:4]
    steps = torch.arange(-radius, radius + 1, device=coords.device)
    x, y = torch.meshgrid(steps, steps, indexing="ij" if axis_order == "xy" else "xy")
    places = (coords[..., None, :] + torch.stack([x, y], -1).flatten(0, 1)).flatten(0, 1)
    extent = torch.tensor([width, height], device=coords.device) - int(align_corners)
    images = features.to(coords.dtype).flatten(0, 1).permute(0, 3, 1, 2)
    grid = 2 * places / extent.clamp(min=1) - 1
    patches = F.grid_sample(images, grid, padding_mode=padding, align_corners=align_corners)
    return patches.permute(0, 2, 3, 1).unflatten(0, features.shape[:2]).to(features.dtype)


def eager(features, support, coords, radius, options, reverse=False):
    """What the authors' repositories do: the patches are stored and multiplied with the supports."""
    if reverse:  # the same with other roundings: sums over channels from the other end, in a mirror
        extent = torch.tensor([*features.shape[3:1:-1]], device=coords.device) - int(options["align_corners"])
        mirrored = (features.flip(2, 3, 4), support.flip(-1), extent - coords)
        return eager(*mirrored, radius, options).flip(-2)
    patches = sampled(features, coords, radius, **options)
    return torch.einsum("btnpc,bnsc->btnps" if support.dim() == 4 else "btnpc,bntsc->btnps", patches, support)


def textbook(features, support, coords, radius, padding, align_corners, axis_order):
    """One product of two vectors at a time."""
    B, T, height, width, _ = features.shape

    def cell(b, t, y, x):
        if padding == "zeros" and not (0 <= x < width and 0 <= y < height):
            return torch.zeros_like(features[0, 0, 0, 0])
        return features[b, t, min(max(y, 0), height - 1), min(max(x, 0), width - 1)]

    out = []
    for b, t, n in itertools.product(range(B), range(T), range(support.shape[1])):
        centre = coords[b, t, n] - (0 if align_corners else 0.5)
        for first, second in itertools.product(range(-radius, radius + 1), repeat=2):
            step = torch.tensor([first, second] if axis_order == "xy" else [second, first])
            low = centre.floor()
            (fx, fy), (x, y) = centre - low, (low.long() + step).tolist()
            above = (1 - fx) * cell(b, t, y, x) + fx * cell(b, t, y, x + 1)
            below = (1 - fx) * cell(b, t, y + 1, x) + fx * cell(b, t, y + 1, x + 1)
            sample = (1 - fy) * above + fy * below
            vectors = support[b, n] if support.dim() == 4 else support[b, n, t]
            out.append(torch.stack([(vector * sample).sum() for vector in vectors]))
    return torch.stack(out).view(*coords.shape[:3], (2 * radius + 1) ** 2, -1)


@dataclasses.dataclass
class Case:
    """One call; `tensors` are features, support, coords and, before a linear layer, weight and bias."""

    tensors: list
    grad_out: torch.Tensor
    radius: int
    options: dict

    def call(self, backend, *tensors):
        function = local_correlation if len(tensors) == 3 else local_correlation_linear
        return function(*tensors, radius=self.radius, **self.options, backend=backend)

    def eager(self, *tensors, reverse=False):
        flat = eager(*tensors[:3], self.radius, self.options, reverse)
        if len(tensors) == 3:
            return flat
        flat, weight = flat.flatten(-2), tensors[3]
        return F.linear(flat.flip(-1), weight.flip(-1), tensors[4]) if reverse else F.linear(flat, weight, tensors[4])

    def changed(self, **fields):
        return dataclasses.replace(self, **fields)


def case(
    device="cpu", *, B=1, T=2, N=3, grid=(5, 6), C=16, S=9, radius=1, dtype=torch.float32, options=None,
    linear=False, per_frame=False, outputs=5,
):  # fmt: skip
    """Random inputs; positions are in the map and up to three cells outside of it."""
    inputs = (2 * radius + 1) ** 2 * S
    shapes = [(B, T, *grid, C), (B, N, T, S, C) if per_frame else (B, N, S, C)]
    features, support = (torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes)
    place = torch.promote_types(dtype, torch.float32)
    coords = (torch.rand(B, T, N, 2) * torch.tensor([grid[1] + 6.0, grid[0] + 6.0]) - 3).to(device, place)
    tensors = [features, support, coords]
    if linear:
        tensors += [(torch.randn(shape) * inputs**-0.5).to(device, dtype) for shape in ((outputs, inputs), (outputs,))]
    grad_out = torch.randn((B, T, N, outputs) if linear else (B, T, N, (2 * radius + 1) ** 2, S)).to(device, dtype)
    return Case(tensors, grad_out, radius, options or COTRACKER)


def results(function, tensors, grad_out):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def run(where, case):
    return results(functools.partial(case.call, where[0]), case.tensors, case.grad_out)


def largest_terms(case):
    """Of the sums behind output and gradients. A position's gradient is a sum of differences, which may cancel."""
    sizes = [x.double().abs() for x in case.tensors]
    sizes[2] = case.tensors[2].double()
    grad_out = case.grad_out.double().abs()
    grads = results(case.eager, sizes, grad_out)
    terms = [x.max() if x.numel() else 0 for x in grads]
    if len(sizes) == 3:
        grad_samples = grad_out
    else:
        grad_samples = (grad_out @ sizes[3]).unflatten(-1, (-1, sizes[1].shape[-2]))
    terms[3] = 4 * (eager(*sizes[:3], case.radius, case.options) * grad_samples).sum((-1, -2)).max()
    return terms


def check(where, case):
    """Output and all gradients against float64, by the rule of `oracle.assert_as_exact_as_eager`."""
    actual = run(where, case)
    exact = results(case.eager, [x.double() for x in case.tensors], case.grad_out.double())
    plain = [results(functools.partial(case.eager, reverse=r), case.tensors, case.grad_out) for r in (False, True)]
    names = ("out", "grad_features", "grad_support", "grad_coords", "grad_weight", "grad_bias")
    for index, (result, term) in enumerate(zip(actual, largest_terms(case), strict=True)):
        assert result.dtype == (case.grad_out if index == 0 else case.tensors[index - 1]).dtype
        eager_results = [x[index].cpu() for x in plain]
        assert_as_exact_as_eager(result.cpu(), eager_results, exact[index].cpu(), term, names[index])
    return actual


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(B=2, T=3, N=5, grid=(9, 7), C=24, S=49, radius=3),
        dict(S=1, C=40, radius=3),
        dict(S=1, C=1, radius=0, N=1, T=1),
        dict(S=3, C=7, radius=2, grid=(1, 9)),
        dict(S=17, C=130, radius=1, grid=(8, 1), N=2),
        dict(S=25, C=33, radius=2, N=20, T=1),
        dict(S=8, C=256, radius=1, T=18, N=1),
        dict(S=2, C=8, radius=15, N=1, T=1, grid=(20, 4)),
        dict(S=70, C=16, radius=1, N=2),
    ],
    ids=str,
)
def test_result_and_gradients(where, linear, dtype, sizes):
    for options in (COTRACKER, LOCOTRACK):
        if options is COTRACKER or 1 not in sizes.get("grid", ()):
            check(where, case(where[1], dtype=dtype, linear=linear, options=options, **sizes))


@BOTH
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(where, linear, options):
    check(where, case(where[1], B=2, N=6, linear=linear, options=options))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_supports_of_each_frame(where, linear, dtype):
    for sizes in (dict(), dict(S=1, T=19, C=64, radius=3), dict(S=49, B=2, T=3)):
        check(where, case(where[1], per_frame=True, linear=linear, dtype=dtype, options=LOCOTRACK, **sizes))


@pytest.mark.parametrize("where", native_backends(op.NAME))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_textbook(where, options):
    """One product at a time, also on maps of a single row or column."""
    for grid, per_frame in (((4, 5), False), ((1, 3), True), ((1, 1), False)):
        this = case(where[1], grid=grid, S=2, C=3, N=2, dtype=torch.float64, options=options, per_frame=per_frame)
        expected = textbook(*(x.cpu() for x in this.tensors), this.radius, **options)
        torch.testing.assert_close(this.call(where[0], *this.tensors).cpu(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [COTRACKER, LOCOTRACK], ids=["border", "zeros"])
def test_whole_cells_and_places_far_away(where, options):
    """A position on a cell's centre reads that cell; far outside, also at infinity, is the border, or zeros."""
    this = case(where[1], T=1, N=8, grid=(5, 6), radius=1, options=options, dtype=torch.float64)
    features, support, coords = this.tensors
    half = 0 if options["align_corners"] else 0.5
    inside = torch.tensor([[2.0, 3.0], [4, 1]], dtype=torch.float64, device=where[1])
    away = torch.tensor([[-1e30, 2.0], [INF, 2.0], [3.0, 1e20], [-INF, -INF], [2e9, 2e9], [5e18, -5e18]])
    coords = torch.cat([inside, away.to(inside)]).view(1, 1, 8, 2) + half
    out = this.call(where[0], features, support, coords)
    order = (lambda p: p) if options["axis_order"] == "xy" else (lambda p: p % 3 * 3 + p // 3)
    for n, (x, y) in enumerate([(2, 3), (4, 1), (0, 2), (5, 2), (3, 4), (0, 0), (5, 4), (5, 0)]):
        for p, (dx, dy) in enumerate(itertools.product((-1, 0, 1), repeat=2)):
            cell = features[0, 0, min(max(y + dy, 0), 4), min(max(x + dx, 0), 5)]
            if n in (2, 3):  # only x is far away
                cell = features[0, 0, y + dy, x]
            if n == 4:
                cell = features[0, 0, y, x + dx]
            if n >= 5:
                cell = features[0, 0, y, x]
            expected = support[0, n] @ cell * (1 if n < 2 or options["padding"] == "border" else 0)
            torch.testing.assert_close(out[0, 0, n, order(p)], expected, rtol=1e-12, atol=1e-12)
    grads = results(functools.partial(this.call, where[0]), [features, support, coords], torch.ones_like(out))
    assert all(x.isfinite().all() for x in grads) and not grads[3][0, 0, 5:].any()


@BOTH
@pytest.mark.parametrize("options", [COTRACKER, LOCOTRACK], ids=["border", "zeros"])
def test_broken_positions_stay_alone(where, linear, options):
    this = case(where[1], B=2, T=3, N=4, linear=linear, options=options)
    clean = run(where, this)
    coords = this.tensors[2].clone()
    coords[0, 1, 2, 0] = coords[1, 2, 0, 1] = coords[1, 0, 3, 0] = NAN
    broken = coords.isnan().any(-1)
    out, grad_features, grad_support, grad_coords, *_ = run(
        where, this.changed(tensors=[*this.tensors[:2], coords, *this.tensors[3:]])
    )
    assert out[broken].isnan().all() and torch.equal(out[~broken], clean[0][~broken])
    assert grad_coords[broken].isnan().all() and torch.equal(grad_coords[~broken], clean[3][~broken])
    points = broken.any(1)
    assert grad_support[points].isnan().all() and torch.equal(grad_support[~points], clean[2][~points])
    # Nothing reaches the features, as if the broken positions had no gradient.
    silent = run(where, this.changed(grad_out=this.grad_out.masked_fill(broken[(..., *[None] * (out.dim() - 3))], 0)))
    assert torch.equal(grad_features, silent[1])


@pytest.mark.parametrize("options", [COTRACKER, LOCOTRACK], ids=["border", "zeros"])
def test_broken_features_and_supports_reach_what_reads_them(where, options):
    this = case(where[1], T=3, N=40, grid=(8, 9), options=options)
    features, support, coords = this.tensors
    clean = run(where, this)
    bad_features, bad_support = features.clone(), support.clone()
    bad_features[0, 1, 3, 4, 2] = NAN
    bad_support[0, 2, 5] = INF
    out, *_ = run(where, this.changed(tensors=[bad_features, support, coords]))
    expected = eager(bad_features, support, coords, this.radius, options)
    assert torch.equal(out.isnan(), expected.isnan()) and 0 < out.isnan().sum() < out.numel()
    assert torch.equal(out[~out.isnan()], clean[0][~out.isnan()])
    out, _, grad_support, _ = run(where, this.changed(tensors=[features, bad_support, coords]))
    others = torch.arange(40, device=where[1]) != 2
    assert torch.equal(out[:, :, others], clean[0][:, :, others]) and not out[0, :, 2, :, 5].isfinite().any()
    assert torch.equal(grad_support, clean[2])


def test_linear_with_none_for_a_bias_in_blocks(where):
    """More points and frames than a block holds; blocks change nothing."""
    this = case(where[1], T=35, N=60, S=49, C=8, radius=3, linear=True)
    weight = this.tensors[3]
    out, *grads = results(
        lambda *x: local_correlation_linear(*x, None, **COTRACKER, backend=where[0]), this.tensors[:4], this.grad_out
    )
    flat = lambda *x: local_correlation(*x[:3], **COTRACKER, backend=where[0]).flatten(-2)  # noqa: E731
    expected, *expected_grads = results(lambda *x: flat(*x) @ x[3].mT, this.tensors[:4], this.grad_out)
    for result, reference in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-4 * reference.abs().max().item())
    assert weight.shape == grads[3].shape


def test_memory_of_the_linear_form(where):
    """The flat vectors of T 24 and N 768 would be 177 MB; a block is 12 MiB, in the backward pass twice."""
    this = case(where[1], T=24, N=768, S=49, radius=3, C=16, grid=(24, 32), linear=True, outputs=32)
    run(where, this)
    with peak_memory(where[1]) as peak:
        run(where, this)
    assert peak.mebibytes < (96 if where[1] == "cpu" else 700)


@needs_official
def test_official_cotracker(where, official):  # noqa: F811
    """The sampling of the official model (its method needs nothing but a radius), and its product."""
    module = official("co-tracker", "cotracker.models.core.cotracker.cotracker3_online")
    peer = module.CoTrackerThreeBase.__new__(module.CoTrackerThreeBase)
    torch.nn.Module.__init__(peer)
    peer.corr_radius = 3
    this = case(where[1], T=3, N=11, grid=(12, 16), C=8, S=49, radius=3, dtype=torch.float64)
    features, support, coords = this.tensors
    maps = features.permute(0, 1, 4, 2, 3)
    torch.set_default_dtype(torch.float64)  # in which it makes its offsets and factors
    try:
        patches = peer.get_correlation_feat(maps, coords.flatten(0, 1))
    finally:
        torch.set_default_dtype(torch.float32)
    expected = torch.einsum("btnhwc,bnijc->btnhwij", patches.view(1, 3, 11, 7, 7, 8), support.unflatten(2, (7, 7)))
    actual = local_correlation(maps.permute(0, 1, 3, 4, 2), support, coords, **COTRACKER, backend=where[0])
    torch.testing.assert_close(actual, expected.reshape(actual.shape), rtol=1e-9, atol=1e-9)


@needs_official
@pytest.mark.parametrize(
    ("repository", "module"), [("locotrack/locotrack_pytorch", "models.utils"), ("tapnet", "tapnet.torch.utils")]
)
def test_official_locotrack_and_tapir(where, official, repository, module):  # noqa: F811
    """Both sample with `map_coordinates_2d`, whose coordinates are (y, x); it casts them to float32."""
    utils = official(repository, module)
    this = case(where[1], T=3, N=11, grid=(16, 16), C=8, S=49, radius=3, dtype=torch.float32)
    features, support, coords = this.tensors
    y, x = torch.meshgrid(torch.arange(-3, 4), torch.arange(-3, 4), indexing="ij")
    steps = torch.stack([y, x], -1).flatten(0, 1).to(where[1])
    places = coords.flip(-1).transpose(1, 2)[:, :, :, None] + steps
    patches = utils.map_coordinates_2d(features, places)
    expected = torch.einsum("bntpc,bnsc->btnps", patches, support)
    actual = local_correlation(features, support, coords, **LOCOTRACK, backend=where[0])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
