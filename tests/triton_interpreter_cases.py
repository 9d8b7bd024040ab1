"""The Triton kernels of temporal window attention, run line by line in NumPy by Triton's interpreter.

`test_triton_interpreter.py` runs this file in a process of its own. No bfloat16: the interpreter multiplies it wrongly.
"""

import pytest
import torch
from oracle import gradients, largest_terms, random_inputs, textbook
from test_contracts import LAYOUTS, laid_out
from test_temporal_window_attention import NAMES, among_more_keys, check, exact_results, run

from tritonkern import temporal_window_attention
from tritonkern.ops.temporal_window_attention import configs, reference

WHERE = ("triton", "cpu")
DTYPES = (torch.float64, torch.float32, torch.float16)
# Overflowing rows that no result depends on.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((2, 7, 3, 2, 8), 3),  # many clips in a tile, tiles that cut through clips
        ((1, 8, 1, 2, 32), 13),
        ((2, 3, 1, 2, 16), 13),  # shorter than the window
        ((3, 1, 2, 1, 24), 3),
        ((1, 9, 1, 1, 40), (2, 4)),
        ((1, 4, 1, 1, 256), 3),
        ((1, 3, 1, 1, 200), 3),
    ],
    ids=str,
)
def test_result_and_gradients(shape, window, dtype):
    check(WHERE, random_inputs(*shape, dtype=dtype), window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "around", "window"),
    [
        ((2, 7, 2, 2, 8), (4, 1), (3, 2)),
        ((1, 1, 3, 2, 16), (6, 2), 5),
        ((1, 16, 1, 2, 8), (0, 40), 5),  # by tile, with keys that no query sees
        ((1, 17, 1, 1, 24), (20, 0), (0, 4)),
    ],
    ids=str,
)
def test_keys_of_more_frames(shape, around, window, dtype):
    check(WHERE, among_more_keys(*around, random_inputs(*shape, dtype=dtype)), window, query_offset=around[0])


@pytest.mark.parametrize("frames", [3, 18])
def test_ring(frames):
    query, key, value, _ = among_more_keys(5, 2, random_inputs(1, frames, 2, 1, 8, dtype=torch.float16))
    options = dict(window=(4, 2), query_offset=5, backend="triton")
    expected = temporal_window_attention(query, key, value, **options)
    for start in (1, frames, frames + 6):
        ring = [x.roll(start, 1) for x in (key, value)]
        assert torch.equal(temporal_window_attention(query, *ring, start=start, **options), expected)


@pytest.mark.parametrize("window", [13, 1, (0, 5), (40, 0), 91, (0, 300)], ids=str)
def test_clip_of_several_tiles(window):
    check(WHERE, random_inputs(1, 150, 1, 1, 16, dtype=torch.float16), window)


@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scale(scale, dtype):
    check(WHERE, random_inputs(1, 11, 1, 1, 8, dtype=dtype), 5, scale)


def test_large_scores_do_not_overflow():
    query, key, value, grad_out = random_inputs(1, 20, 1, 2, 32, dtype=torch.float16)
    check(WHERE, [query * 60, key * 60, value, grad_out], 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_scale(dtype):
    """Backward has the softmax denominator from its logarithm, whose rounding is a relative error of every weight."""
    tensors = random_inputs(1, 11, 1, 1, 8, dtype=dtype)
    results = run(WHERE, tensors, 5, 30.0)
    doubles = [x.double() for x in tensors]
    lse = reference.forward(*doubles[:3], 2, 2, 30.0)[1]
    exact = exact_results(doubles[:3], doubles[3], 2, 2, 30.0)
    relative = torch.finfo(torch.float32).eps * lse.abs().max() + 4 * torch.finfo(dtype).eps
    for result, truth, term in zip(results, exact, largest_terms(doubles[:3], doubles[3], 30.0), strict=True):
        atol = float(relative * max(truth.abs().max(), term))
        torch.testing.assert_close(result.double(), truth, rtol=0, atol=atol)


def test_tensor_cores_with_tf32(monkeypatch):
    """The interpreter multiplies in float32, so that only the way through the kernel is another."""
    monkeypatch.setattr(configs, "tf32_allowed", lambda: True)
    check(WHERE, random_inputs(2, 21, 1, 2, 24), 5)


@pytest.fixture
def descriptors(monkeypatch):
    """The forward kernel that loads tiles by descriptors; three programs share the tiles."""
    from tritonkern.ops.temporal_window_attention import triton_tma

    used = []
    forward = triton_tma.forward
    monkeypatch.setattr(configs, "DESCRIPTORS", True)
    monkeypatch.setattr(configs, "has_descriptors", lambda: True)
    monkeypatch.setattr(triton_tma, "programs_of", lambda device: 3)
    monkeypatch.setattr(triton_tma, "forward", lambda *arguments: used.append(1) or forward(*arguments))
    return used


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((2, 24, 3, 3, 32), 13),  # two heads in a tile, of three
        ((1, 8, 1, 5, 24), (2, 0)),  # four heads in a tile, of five; a head that is no power of two
        ((1, 150, 1, 2, 16), 13),  # clips of several tiles
        ((2, 64, 1, 1, 64), 91),  # a clip in a tile, and a window beyond it
        ((1, 70, 2, 1, 8), (32, 32)),
        ((3, 2, 2, 1, 128), 3),
    ],
    ids=str,
)
def test_tensor_descriptors(descriptors, shape, window):
    check(WHERE, random_inputs(*shape, dtype=torch.float16), window)
    assert descriptors


def test_tensor_descriptors_keep_a_bad_frame_in_its_window(descriptors):
    query, key, value, _ = random_inputs(1, 70, 2, 2, 16, dtype=torch.float16)
    key[:, 20], value[:, 50, 0] = float("nan"), float("inf")
    out = run(WHERE, [query, key, value, query], 5)[0]
    bad = torch.zeros_like(out, dtype=torch.bool)
    bad[:, 18:23], bad[:, 48:53, 0] = True, True
    assert descriptors and torch.equal(~out.isfinite(), bad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensor_descriptors_and_strides(descriptors, layout):
    tensors = [x[:1, :5] for x in random_inputs(2, 21, 3, 2, 24, dtype=torch.float16)]
    check(WHERE, [laid_out(layout)(x) for x in tensors], (3, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", range(4), ids=("query", "key", "value", "grad_out"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_non_finite_input_stays_in_its_windows(at, bad, dtype):
    """One bad number in a tile that holds four clips."""
    tensors = random_inputs(1, 9, 2, 2, 16, dtype=dtype)
    clean = run(WHERE, tensors, (1, 2))
    tensors[at][0, 4, 1, 0, 5] = bad
    poisoned = run(WHERE, tensors, (1, 2))

    clip = [x[:, :, 1:, :1].double() for x in tensors]
    truth = gradients(lambda *x: textbook(*x, 1, 2, 16**-0.5), clip[:3], clip[3])
    for name, result, before, expected in zip(NAMES, poisoned, clean, truth, strict=True):
        wrong = torch.zeros_like(result, dtype=torch.bool)
        wrong[:, :, 1:, :1] = ~expected.isfinite()
        assert not result[wrong].isfinite().any(), f"{name} hides the {bad}"
        right = ~wrong[:, :, 1:, :1]
        tolerance = {"rtol": 1e-4, "atol": 1e-5}
        if (
            dtype == torch.float16
        ):  # rows of a poisoned tile are made again without tensor cores, and rounded differently
            tolerance = {"rtol": 4e-3, "atol": 4e-3}
        for n, h in ((0, 0), (0, 1), (1, 1)):
            torch.testing.assert_close(result[:, :, n, h], before[:, :, n, h], **tolerance)
        torch.testing.assert_close(result[:, :, 1:, :1][right].double(), expected[right], **tolerance)


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 64, 641, 65537, 2**30 + 1, 2**31 - 1])
def test_division_by_multiplication(divisor):
    from tritonkern.ops.temporal_window_attention import triton_rows

    _, multiplier, shift = triton_rows.divisor(divisor)
    near = [n * divisor + d for n in (0, 1, 2, 5, (2**31 - 1) // divisor) for d in (-1, 0, 1)]
    for x in [*near, *torch.randint(0, 2**31, (1000,)).tolist()]:
        if 0 <= x < 2**31:
            assert (2 * x * multiplier >> 32) >> shift == x // divisor
    assert 0 < multiplier < 2**32


def test_saved_tensors_may_come_back_misaligned():
    from tritonkern.ops._triton import aligned

    moved = torch.arange(33, dtype=torch.float32)[1:].view(1, 4, 1, 1, 8)
    assert moved.data_ptr() % 16 != 0 and aligned(moved).data_ptr() % 16 == 0
    assert torch.equal(aligned(moved), moved)
