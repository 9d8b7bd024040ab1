"""Track attention, both directions: what it computes, in every backend that can run here natively.

tests/properties draws random cases of it; Triton's interpreter has its own process and file.
"""

import dataclasses

import pytest
import torch
from oracle import assert_as_exact_as_eager, fast_backends, peak_memory, track_exact, track_textbook

from tritonkern import track_sample_attention, track_splat_attention
from tritonkern.ops.track_attention import op

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("out", "grad_query", "grad_key", "grad_value", "grad_tracks", "grad_sigma")
BOTH = pytest.mark.parametrize("splat", [False, True], ids=["sample", "splat"])
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=fast_backends(op.NAME))
def where(request):
    return request.param


@dataclasses.dataclass
class Case:
    """One call and the cotangent of its output; `tensors` are query, key, value, tracks and sigma."""

    tensors: list
    grad_out: torch.Tensor
    splat: bool
    scale: float
    visibility: torch.Tensor | None = None
    culling: bool = True

    def attend(self, backend, *tensors):
        query, key, value, tracks, sigma = tensors
        function = track_splat_attention if self.splat else track_sample_attention
        options = dict(sigma=sigma, scale=self.scale, visibility=self.visibility, culling=self.culling)
        return function(query, key, value, tracks, **options, backend=backend)

    def changed(self, **tensors):
        """With some of query, key, value, tracks, sigma or fields in another form."""
        names = ("query", "key", "value", "tracks", "sigma")
        new = [tensors.pop(name, old) for name, old in zip(names, self.tensors, strict=True)]
        return dataclasses.replace(self, tensors=new, **tensors)


def case(splat, device="cpu", *, B=1, T=2, M=7, grid=(5, 6), H=2, D=16, dtype=torch.float32, sigma=0.5, scale=None):
    """Random inputs; tracks are in the grid or up to one cell outside of it."""
    tracked, gridded = (B, T, M, H, D), (B, T, *grid, H, D)
    shapes = (gridded, tracked, tracked, gridded) if splat else (tracked, gridded, gridded, tracked)
    query, key, value, grad_out = (torch.randn(x, dtype=torch.float64).to(device, dtype) for x in shapes)
    place = torch.promote_types(dtype, torch.float32)
    tracks = (torch.rand(B, T, M, 2) * torch.tensor([grid[1] + 2.0, grid[0] + 2.0]) - 1).to(device, place)
    sigma = torch.tensor(sigma, dtype=place, device=device)
    return Case([query, key, value, tracks, sigma], grad_out, splat, D**-0.5 if scale is None else scale)


def results(function, tensors, grad_out):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    if not out.requires_grad:  # nothing visible
        return [out, *(torch.zeros_like(x) for x in leaves)]
    grads = torch.autograd.grad(out, leaves, grad_out, allow_unused=True, materialize_grads=True)
    return [out.detach(), *grads]


def run(where, case):
    return results(lambda *x: case.attend(where[0], *x), case.tensors, case.grad_out)


def visible(case):
    finite = case.tensors[3].isfinite().all(-1)
    return finite if case.visibility is None else finite & case.visibility


def check(where, case):
    """Output and all gradients against the exact formula, by the rule of `oracle.assert_as_exact_as_eager`."""
    actual = run(where, case)
    options = dict(scale=case.scale, visible=visible(case), splat=case.splat)
    exact, terms = track_exact(*case.tensors, case.grad_out, **options)
    plain = []
    for order in ((), (1,), (-1,), (1, -1)):  # one order of the sums alone may be lucky on small tensors
        dense = lambda *x, order=order: track_textbook(*x, order=order, **options)  # noqa: E731
        plain.append(results(dense, case.tensors, case.grad_out))
    for index, name in enumerate(NAMES):
        assert actual[index].dtype == (case.tensors[[0, 0, 1, 2, 3, 4][index]]).dtype
        if name == "grad_sigma" and case.tensors[4] == INF:
            assert actual[index] == 0  # where the formula reads 0 / 0
            continue
        rounded = [x[index].cpu() for x in plain]
        assert_as_exact_as_eager(actual[index].cpu(), rounded, exact[index], terms[index], name)
    return actual


@BOTH
def test_reference_is_the_textbook_loop(splat):
    this = case(splat, M=9, grid=(4, 5), D=8, dtype=torch.float64)
    this.tensors[3][0, 1, 2] = torch.tensor([NAN, 2.0])
    this = this.changed(visibility=torch.rand(1, 2, 9) > 0.3)
    options = dict(scale=this.scale, visible=visible(this), splat=splat)
    tensors = [*this.tensors[:3], this.tensors[3].nan_to_num(), this.tensors[4]]
    expected = results(lambda *x: track_textbook(*x, **options), tensors, this.grad_out)
    for name, x, y in zip(NAMES, run(("reference", "cpu"), this), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13, msg=name)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(B=2, T=2, M=16, grid=(8, 7), H=3, D=32),
        dict(M=1),
        dict(grid=(1, 1)),
        dict(M=1, grid=(1, 1), H=1, D=8),
        dict(T=1, M=40, grid=(1, 23), D=24),
        dict(T=1, M=5, grid=(17, 2), D=72, H=1),
        dict(T=1, M=3, grid=(4, 4), D=256, H=1),
        dict(T=1, M=130, grid=(16, 16), H=1, D=8),
    ],
    ids=str,
)
def test_result_and_gradients(where, splat, dtype, sizes):
    check(where, case(splat, where[1], dtype=dtype, **sizes))


@BOTH
@pytest.mark.parametrize("sigma", [0.05, 0.3, 2.0, 7.5, 1e4, INF])
def test_sigma(where, splat, sigma):
    check(where, case(splat, where[1], grid=(9, 8), M=12, sigma=sigma))


@BOTH
@pytest.mark.parametrize("scale", [0.0, -0.7, 5.0])
def test_scale(where, splat, scale):
    check(where, case(splat, where[1], scale=scale))


@BOTH
def test_vanishing_sigma_takes_the_nearest(where, splat):
    """A bias beyond the dtype's range leaves the nearest column its weight of one."""
    this = case(splat, where[1], M=9)
    query, key, value, tracks, _ = this.tensors
    tracks = tracks.clamp(min=0.1, max=4.9)
    cells = torch.stack(torch.meshgrid(torch.arange(6.0), torch.arange(5.0), indexing="xy"), -1).flatten(0, 1) + 0.5
    distance = torch.cdist(tracks.cpu(), cells)
    nearest = (distance.transpose(2, 3) if splat else distance).argmin(-1)[..., None, None]
    expected = value.cpu().flatten(2, -3).gather(2, nearest.expand(-1, -1, -1, 2, 16)).view_as(query)
    for sigma in (1e-3, 1e-30):
        out = this.attend(where[0], query, key, value, tracks, sigma)
        assert torch.equal(out.cpu(), expected)


@BOTH
def test_infinite_sigma_is_plain_attention(where, splat):
    this = case(splat, where[1], dtype=torch.float64, sigma=INF)
    query, key, value, *_ = (x.flatten(2, -3).transpose(2, 3) if x.dim() > 4 else x for x in this.tensors)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(2, 3)
    torch.testing.assert_close(this.attend(where[0], *this.tensors), plain.reshape(this.grad_out.shape))
    number = this.attend(where[0], *this.tensors[:4], INF)
    assert torch.equal(number, this.attend(where[0], *this.tensors))
    assert run(where, this)[4].abs().max() == 0


@BOTH
def test_number_and_tensor_sigma_agree(where, splat):
    this = case(splat, where[1], dtype=torch.float64)
    for sigma in (0.3, 7.0, INF):
        tensor = torch.tensor(sigma, dtype=torch.float64, device=where[1])
        number = this.attend(where[0], *this.tensors[:4], sigma)
        assert torch.equal(number, this.attend(where[0], *this.tensors[:4], tensor))
        assert torch.equal(number, this.attend(where[0], *this.tensors[:4], -tensor))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_options_and_positions_at_the_ends_of_their_ranges(where, splat, dtype):
    """Finite input and any sigma, scale or finite position: results and gradients are finite."""
    far = torch.finfo(dtype).max
    for sigma in (5e-324, 1e-200, 1e-30, 1e30, 1e200, INF):
        for scale in (0.0, 2.0**64, -(2.0**64)):
            this = case(splat, where[1], T=1, M=5, grid=(3, 4), H=1, D=8, dtype=dtype, sigma=sigma, scale=scale)
            for at, position in enumerate([(far, 1.0), (-far, far), (1.0, 1e20)]):
                this.tensors[3][0, 0, at] = torch.tensor(position)
            assert all(x.isfinite().all() for x in run(where, this)), (sigma, scale)
            alone = run(where, this.changed(visibility=torch.arange(5, device=where[1]).eq(0).view(1, 1, 5)))
            assert all(x.isfinite().all() for x in alone), (sigma, scale)


@BOTH
def test_tracks_far_outside_and_coincident(where, splat):
    this = case(splat, where[1], M=10)
    tracks = this.tensors[3]
    tracks[:, :, 0] = torch.tensor([-40.0, 3.0])
    tracks[:, :, 1] = torch.tensor([2.0, 55.0])
    tracks[:, :, 2:5] = tracks[:, :, 5:6]
    tracks[:, :, 6] = torch.tensor([2.0, 3.0])  # a corner, four cells equally near
    check(where, this)


@BOTH
def test_every_track_in_one_corner(where, splat):
    """A cell far from every track attends to the nearest ones, with full weight."""
    this = case(splat, where[1], M=6, grid=(20, 18))
    this.tensors[3].mul_(0.1)
    out = check(where, this)[0]
    if splat:
        assert (out.abs().sum(-1) > 0).all()


@BOTH
def test_visibility(where, splat):
    this = case(splat, where[1], B=2, T=3, M=9)
    visibility = torch.rand(2, 3, 9, device=where[1]) > 0.4
    visibility[0, 1] = False
    results = check(where, this.changed(visibility=visibility))
    hidden = ~visibility
    silent = results[2:5] if splat else (results[0], results[1], results[4])
    for x in silent:
        assert (x[hidden] == 0).all()
    assert all((x[0, 1] == 0).all() for x in results[:4])
    # The same without them.
    none = torch.zeros_like(visibility)
    assert all((x == 0).all() for x in run(where, this.changed(visibility=none)))
    every = torch.ones_like(visibility)
    for x, y in zip(run(where, this.changed(visibility=every)), run(where, this), strict=True):
        assert torch.equal(x, y)


@BOTH
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_bad_coordinates_are_invisible(where, splat, bad):
    this = case(splat, where[1], M=8)
    visibility = torch.ones(1, 2, 8, dtype=torch.bool, device=where[1])
    visibility[:, 0, 3] = visibility[:, 1, 5] = False
    expected = run(where, this.changed(visibility=visibility))
    tracks = this.tensors[3].clone()
    tracks[:, 0, 3, 0] = tracks[:, 1, 5, 1] = bad
    for x, y in zip(run(where, this.changed(tracks=tracks)), expected, strict=True):
        assert torch.equal(x, y)


@BOTH
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nothing_of_an_invisible_track_is_read(where, splat, bad):
    this = case(splat, where[1], M=8)
    visibility = torch.ones(1, 2, 8, dtype=torch.bool, device=where[1])
    visibility[:, :, 2] = False
    expected = run(where, this.changed(visibility=visibility))
    poisoned = {"tracks": this.tensors[3].clone()}
    poisoned["tracks"][:, :, 2] = 1e30
    for name, index in (("key", 1), ("value", 2)) if splat else (("query", 0),):
        poisoned[name] = this.tensors[index].clone()
        poisoned[name][:, :, 2] = bad
    for x, y in zip(run(where, this.changed(visibility=visibility, **poisoned)), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("name", ["query", "key", "value"])
@BOTH
def test_non_finite_input_is_not_hidden(where, splat, name, bad):
    """It reaches what lies near it, and no other frame or head. (Nothing of its frame may be skipped, for any head, so
    that other heads' sums may round differently.)"""
    this = case(splat, where[1], M=6, T=3)
    this.tensors[3][:, :, 0] = torch.tensor([2.6, 1.4])  # cell (row 1, column 2)
    clean = this.attend(where[0], *this.tensors)
    index = ("query", "key", "value").index(name)
    poisoned = [x.clone() for x in this.tensors]
    at = (0, 1, 1, 2, 1) if poisoned[index].dim() == 6 else (0, 1, 0, 1)
    poisoned[index][at] = bad
    out = this.attend(where[0], *poisoned)
    assert not out[(0, 1, 1, 2, 1) if splat else (0, 1, 0, 1)].isfinite().all()
    assert torch.equal(out[:, ::2], clean[:, ::2])
    torch.testing.assert_close(out[:, 1, ..., 0, :], clean[:, 1, ..., 0, :])


def far_giant(splat, device, dtype, size):
    """One key, `size` times as long as the others and far from everything else, that some queries look along."""
    this = case(splat, device, M=24, grid=(24, 20), H=1, D=8, dtype=dtype)
    query, key, _, tracks, _ = this.tensors
    tracks.mul_(0.3)
    if splat:
        tracks[:, :, 0] = torch.tensor([14.5, 12.5])
    giant = key[:, :, 0] if splat else key[:, :, 12, 14]
    direction = giant / giant.norm(dim=-1, keepdim=True)
    giant.copy_(direction * size)
    some = query[:, :, ::3] if not splat else query[:, :, :5, ::3]
    some.copy_((direction[:, :, None] if not splat else direction[:, :, None, None]).expand_as(some) * 4)
    return this


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 300.0, 480.0, 1000.0])
def test_culling_keeps_what_a_huge_key_makes_matter(where, splat, dtype, size):
    """About -700 of bias against a product of up to 1400: the far key may take all of the weight."""
    this = far_giant(splat, where[1], dtype, size)
    culled = check(where, this)
    complete = check(where, this.changed(culling=False))
    difference = (culled[0].double() - complete[0].double()).abs().max()
    assert difference <= 2 * torch.finfo(dtype).eps * complete[0].double().abs().max()
    if size == 1000.0:
        giant = this.tensors[2][:, :, 0] if splat else this.tensors[2][:, :, 12, 14]
        some = culled[0][:, :, 0, 0] if splat else culled[0][:, :, 0]
        torch.testing.assert_close(some, giant)


@BOTH
def test_many_far_columns_matter_together(where, splat):
    """Each far column weighs little, all of them together do not: a wide bias and equal scores."""
    this = case(splat, where[1], M=400, grid=(20, 20), H=1, D=8, sigma=6.0, scale=0.0)
    this.tensors[3].clamp_(min=0.0, max=20.0)
    check(where, this)


def test_no_weight_is_stored(where):
    """Weights and bias of this call would take 268 MB each way."""
    for splat in (False, True):
        this = case(splat, where[1], T=1, M=4096, grid=(64, 64), H=4, D=32)
        run(where, case(splat, where[1]))
        with peak_memory(where[1]) as peak:
            run(where, this)
        assert peak.mebibytes < 64


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("away", [20, 300, 3000])
def test_tracks_ever_farther_outside(backend, away):
    """Squared distances of millions must not drown the differences between neighbouring cells, nor their gradients."""
    this = case(False, sigma=away**0.5)  # neighbouring cells differ by about 1 in their biases
    this.tensors[3] = this.tensors[3] + torch.tensor([away, -0.5 * away])
    exact = results(lambda *x: this.attend("reference", *x), [x.double() for x in this.tensors], this.grad_out.double())
    for name, actual, expected in zip(NAMES, run((backend, "cpu"), this), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=2e-6 * expected.abs().max().item(), rtol=0, msg=name)
