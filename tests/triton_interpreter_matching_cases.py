"""The Triton kernels of correlation_soft_argmax and soft_argmax_2d, run line by line in NumPy by Triton's interpreter.

`test_triton_interpreter.py` runs this file in a process of its own. No bfloat16: the interpreter multiplies it wrongly.
"""

import pytest
import test_correlation_soft_argmax as matching
import test_correlation_soft_argmax_2d as soft_argmax
import torch

WHERE = ("triton", "cpu")
DTYPES = (torch.float64, torch.float32, torch.float16)
NAN, INF = float("nan"), float("inf")
# Overflow and invalid values that a mask or a check of the kernels takes care of.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.slow]


@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 2, 5, 6, 12),
        (1, 17, 1, 9, 18, 40),  # several blocks of queries, runs of cells, tiles, blocks of channels
        (1, 2, 2, 1, 1, 3),  # one cell
    ],
    ids=str,
)
def test_result_and_gradients(shape, dtype, cosine):
    if dtype == torch.float64 and shape[-1] == 40:
        pytest.skip("its small tiles would take minutes here")
    matching.check(WHERE, *matching.random_inputs(*shape, dtype=dtype), cosine=cosine)


@pytest.mark.parametrize("cosine", [False, True])
def test_frames_together(cosine):
    """Out of deterministic mode, patches of several frames are made by one launch."""
    torch.use_deterministic_algorithms(False)
    matching.check(WHERE, *matching.random_inputs(2, 3, 3, 5, 9, 8), cosine=cosine)


def test_patches_of_a_few_frames_at_a_time(monkeypatch):
    from tritonkern.ops.correlation_soft_argmax import configs

    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(configs, "MAX_PATCHES", 2 * 2 * 3 * 5 * 9 * 2)  # two frames' worth
    matching.check(WHERE, *matching.random_inputs(2, 3, 3, 5, 9, 8), cosine=True)


def test_tensor_cores_with_tf32(monkeypatch):
    """The interpreter multiplies in float32, so that only the way through the kernels is another."""
    from tritonkern.ops import _triton
    from tritonkern.ops.correlation_soft_argmax import configs

    for module in (configs, _triton):
        monkeypatch.setattr(module, "tf32_allowed", lambda: True)
    matching.check(WHERE, *matching.random_inputs(1, 3, 1, 9, 10, 16))


@pytest.mark.parametrize("radius", [0.5, 9.7, INF])
def test_radius(radius):
    matching.check(WHERE, *matching.random_inputs(1, 2, 1, 11, 7, 8), radius=radius)


def test_large_logits_do_not_overflow():
    query, features = matching.random_inputs(1, 3, 1, 9, 7, 8)
    matching.check(WHERE, query * 1e5, features)


def test_cosine_of_vectors_shorter_than_eps():
    query, features = matching.random_inputs(1, 4, 1, 5, 6, 8)
    query[:, ::2] *= 1e-4
    features[:, :, ::3] *= 1e-5
    features[:, :, 1, 1] = 0
    matching.check(WHERE, query, features, cosine=True)


@pytest.mark.parametrize(
    ("cells", "best", "worst"),
    [
        ({}, (0, 0), (0, 0)),
        ({(11, 8): 1, (0, 0): -1, (11, 0): -1}, (11, 8), (0, 0)),
        ({(0, 8): 1, (5, 5): -1, (5, 6): -1}, (0, 8), (5, 5)),
    ],
)
def test_first_extremal_cell_wins(cells, best, worst):
    matching.test_first_extremal_cell_wins(WHERE, cells, best, worst, torch.float32)


def test_gradients_of_extrema_go_to_the_first_cell():
    matching.test_gradients_of_extrema_go_to_the_first_cell(WHERE)


@pytest.mark.parametrize("wanted", [tuple(i == j for j in range(4)) for i in range(4)] + [(False, True, False, True)])
@pytest.mark.parametrize("cosine", [False, True])
def test_any_of_the_results_may_carry_a_gradient(wanted, cosine):
    matching.check(WHERE, *matching.random_inputs(2, 3, 2, 5, 6, 8), wanted, cosine=cosine)


@pytest.mark.parametrize(("bad", "cell", "cosine"), [(NAN, (4, 5), True), (INF, (0, 0), True), (-INF, (8, 10), False)])
def test_non_finite_cell_stays_in_its_frame(bad, cell, cosine):
    matching.test_non_finite_cell_stays_in_its_frame(WHERE, bad, cell, cosine)


def test_non_finite_query_stays_alone():
    matching.test_non_finite_query_stays_alone(WHERE, NAN)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_bad_query_leaves_other_cells_of_its_tile_alone(bad):
    """Without the mean's gradient a query reaches the cells of its disc and no others."""
    query, features = matching.random_inputs(1, 3, 1, 8, 8, 8)
    query[0, 1, 2] = bad
    results, best, _ = matching.run(WHERE, query, features, (True, False, False, False), radius=1.5)
    row, column = divmod(best[0, 1, 0].item(), 8)
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    disc = (rows - row) ** 2 + (columns - column) ** 2 < 1.5**2
    assert torch.equal(~results[5][0, 0].isfinite().all(-1), disc)
    assert results[4][0, [0, 2]].isfinite().all() and not results[4][0, 1].isfinite().any()


def test_results_do_not_depend_on_the_other_queries():
    query, features = matching.random_inputs(1, 18, 1, 8, 12, 8)
    together = matching.FWD(query, features, 20.0, 5.0, False, 1e-6, "triton")
    alone = matching.FWD(query[:, 5:8].clone(), features, 20.0, 5.0, False, 1e-6, "triton")
    for all_queries, few in zip(together[:6], alone[:6], strict=True):
        torch.testing.assert_close(all_queries[:, 5:8], few, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("far_axis", [0, 1, 2], ids=["batch", "frames", "rows"])
def test_offsets_beyond_32_bits(far_axis):
    matching.test_offsets_beyond_32_bits(WHERE, far_axis)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 9, 21), (1, 40, 70), (2, 18, 72), (1, 1)], ids=str)
def test_soft_argmax(shape, dtype):
    soft_argmax.check(WHERE, soft_argmax.random_cost(*shape, dtype=dtype))


@pytest.mark.parametrize("radius", [0.5, 9.7, INF])
def test_soft_argmax_radius(radius):
    soft_argmax.check(WHERE, soft_argmax.random_cost(2, 17, 40), radius=radius)


@pytest.mark.parametrize("cell", [(0, 0), (8, 10)])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_soft_argmax_of_non_finite_cells(bad, cell):
    soft_argmax.test_non_finite_cell_stays_in_its_frame(WHERE, bad, cell)


def test_soft_argmax_of_nothing():
    soft_argmax.test_nothing_but_minus_infinity_is_nan(WHERE)
    soft_argmax.check(WHERE, soft_argmax.random_cost(0, 3, 4, 5))


def test_reach_of_a_disc():
    from tritonkern.ops.correlation_soft_argmax.triton_common import disc

    assert disc(5.0, 64, 64) == (25, (4, 4))
    assert disc(5.01, 64, 3) == (26, (5, 2))
    assert disc(0.5, 64, 64) == (1, (0, 0)) and disc(1.2e-38, 9, 9) == (1, (0, 0))
    assert disc(46340.0, 1, 1 << 20) == (46340**2, (0, 46339))
    assert disc(INF, 20, 1 << 20) == (2**32 - 1, (19, (1 << 20) - 1))


@pytest.mark.parametrize("cell", [-1, 63, -(2**31), 2**31 - 1])
def test_cells_outside_of_the_grid_take_no_part(cell):
    matching.test_cells_outside_of_the_grid_take_no_part(WHERE, cell)
    soft_argmax.test_cells_outside_of_the_grid_take_no_part(WHERE, cell)
