"""The Triton kernels of local correlation, run line by line in NumPy by Triton's interpreter.

`test_local_correlation_triton.py` runs this file in a process of its own. No bfloat16: the interpreter multiplies it
wrongly.
"""

import pytest
import test_local_correlation as local
import test_local_correlation_softmax as softmax
import torch

from tritonkern import correlation_pyramid

WHERE = ("triton", "cpu")
BOTH = pytest.mark.parametrize("linear", [False, True], ids=["alone", "linear"])
# Of NaN positions, which the kernels take care of.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture(autouse=True)
def atomics():
    """Out of deterministic mode, where features get their gradients from the kernels."""
    torch.use_deterministic_algorithms(False)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(N=2, T=1),
        dict(N=1, T=1, S=49, radius=3, C=40),
        dict(N=1, T=1, S=1, C=1, radius=0),
        dict(N=1, T=2, S=70, C=70, radius=1, grid=(2, 9)),
    ],
    ids=str,
)
def test_result_and_gradients(linear, dtype, sizes):
    if dtype == torch.float64 and sizes["T"] * sizes.get("C", 0) > 1:
        pytest.skip("its small tiles would take minutes here")
    for options in (local.COTRACKER, local.LOCOTRACK):
        local.check(WHERE, local.case(dtype=dtype, linear=linear, options=options, **sizes))


@pytest.mark.parametrize("options", local.OPTIONS, ids=str)
def test_every_option(options):
    local.check(WHERE, local.case(N=3, T=1, options=options))


def test_deterministic_mode():
    torch.use_deterministic_algorithms(True)
    local.check(WHERE, local.case())


@BOTH
def test_supports_of_each_frame(linear):
    local.check(WHERE, local.case(per_frame=True, linear=linear, options=local.LOCOTRACK))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_softmax(dtype):
    for sizes in (dict(N=2, T=1, radius=2), dict(N=1, T=1, pairs=[softmax.ANOTHER], scale=0.3)):
        softmax.check(WHERE, softmax.cost(dtype=dtype, **sizes))
    this = softmax.cost(dtype=dtype, N=2, T=1)
    this.tensors[2][0, 0, 1, 0] = local.NAN
    out = this.call(WHERE[0], *this.tensors)
    assert out[:, :, 1].isnan().all() and not out[:, :, 0].isnan().any()


@pytest.mark.parametrize("options", [local.COTRACKER, local.LOCOTRACK], ids=["border", "zeros"])
def test_places(options):
    local.test_whole_cells_and_places_far_away(WHERE, options)
    local.test_broken_positions_stay_alone(WHERE, False, options)


def test_localcorr():
    """The peer of `correlation_pyramid`, if it is installed: the package localcorr, whose kernels are Triton's too."""
    localcorr = pytest.importorskip("localcorr")
    features, targets, flow = torch.randn(1, 4, 4, 8), torch.randn(1, 1, 4, 4, 8), torch.randn(1, 1, 4, 4, 2) * 2
    y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    coords = (flow[:, 0] + torch.stack([x, y], -1)).movedim(-1, 1).contiguous()
    maps = features.movedim(-1, 1).contiguous(), targets[:, 0].movedim(-1, 1).contiguous()
    theirs = localcorr.get_localcorr_block(*maps, num_levels=2, radius=1, corr_mode="localcorr_triton")(coords)
    ours = correlation_pyramid(features, targets, flow, 2, 1, backend="triton")
    torch.testing.assert_close(ours[:, 0].movedim(-1, 1), theirs, rtol=1e-4, atol=1e-4)
