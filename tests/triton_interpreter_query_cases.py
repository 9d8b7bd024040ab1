"""The Triton kernels of query-key matching, run line by line in NumPy by Triton's interpreter.

`test_query_key_triton.py` runs this file in a process of its own. No bfloat16: the interpreter multiplies it wrongly.
"""

import math

import pytest
import test_query_key_matching as match
import test_query_key_rows as rows
import torch

from tritonkern.ops.query_key_matching import op

WHERE = ("triton", "cpu")
DTYPES = (torch.float64, torch.float32, torch.float16)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("chosen", [True, False])
def test_cost_and_gradients(dtype, symmetric, chosen):
    size = (1, 2, 12, 2, 8)
    cells = match.some_cells(size) if chosen else None
    match.check_cost(WHERE, match.random_pair(size, dtype), cells, source=1, symmetric=symmetric)


@pytest.mark.parametrize("radius", [None, 1.5, math.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_and_gradients(dtype, radius):
    size, grid = (1, 2, 12, 2, 8), (3, 4)
    match.check_match(WHERE, match.random_pair(size, dtype), grid, radius=radius, source=1)


@pytest.mark.parametrize("options", [dict(), dict(symmetric=False, radius=2.0)], ids=str)
@pytest.mark.parametrize("shape", ["one", "ragged"])
def test_matches_of_some_cells(shape, options):
    """Several blocks of cells and of channels, ragged ones."""
    size, grid = match.SHAPES[shape]
    match.check_match(WHERE, match.random_pair(size), grid, cells=match.some_cells(size), **options)


def test_channels_in_several_parts():
    match.check_cost(WHERE, match.random_pair((1, 2, 6, 1, 70)), None)


def test_places():
    match.test_ties_go_to_the_lowest_cell(WHERE)
    match.test_scores_far_apart(WHERE)
    match.test_views_of_text_and_video_together(WHERE)


@pytest.mark.parametrize("tensor", [0, 1], ids=["query", "key"])
@pytest.mark.parametrize("frame", [0, 1])
def test_not_finite(tensor, frame):
    match.test_non_finite_input_stays_in_its_pairs(WHERE, tensor, frame, math.nan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_rows(dtype, masked):
    tensors = rows.random_rows(dtype, B=1, N=5)
    rows.check_rows(WHERE, *tensors, torch.rand(1, 61) < 0.7 if masked else None)


def test_cells_that_do_not_exist():
    """Nothing on a GPU checks those of a graph or of the operator: NaN in their results, the others as without them."""
    query, key = match.random_pair((1, 2, 6, 2, 8))
    cells = torch.tensor([[3, -1, 6, 2**40, -(2**40)]])
    options = (0, 2, 3, 0.3, True, 1.5)
    peak, points, index, weight = op.query_key_matching_fwd(query, key, cells, *options, "triton")
    expected = op.query_key_matching_fwd(query, key, cells[:, :1], *options, "triton")
    for x, y in zip((peak, points, index, weight), expected, strict=True):
        assert torch.equal(x[:, :, :1], y)
        assert (x[:, :, 1:] == -1).all() if x.dtype == torch.int64 else x[:, :, 1:].isnan().all()
    cost = op.query_key_cost_fwd(query, key, cells, 0, 0.3, True, "triton")
    assert cost[:, :, 1:].isnan().all() and cost[:, :, :1].isfinite().all()
    grads = op.query_key_matching_bwd(peak, points, query, key, cells, index, points, weight, *options, "triton")
    assert all(x.isnan().any() for x in grads)
    op.query_key_cost_bwd(cost, query, key, cells, 0, 0.3, True, "triton")


def test_other_rows():
    rows.test_rows_of_any_strides(WHERE)
    rows.test_rows_not_finite_or_masked_out(WHERE)
    rows.test_empty_rows(WHERE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("text_last", [False, True])
def test_frames(text_last, renormalise, dtype):
    rows.check_frames(WHERE, rows.random_frames(dtype, cells=20), 5, 2, text_last, renormalise)


@pytest.mark.parametrize("text, frames, cells", [(0, 3, 7), (40, 1, 4), (3, 2, 0), (1, 5, 1)])
def test_sizes_of_frames(text, frames, cells):
    rows.test_sizes_of_frames(WHERE, text, frames, cells, False)


def test_broken_value():
    rows.test_broken_value_stays_in_its_frame(WHERE, False)
