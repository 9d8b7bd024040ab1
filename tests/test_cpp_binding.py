"""Tensors on their way into C++: what a kernel sees of them, and the errors for those that it must not see."""

import pytest
import torch

_cpp = pytest.importorskip("tritonkern._cpp", reason="the C++ extension was not built", exc_type=ImportError)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool],
    ids=str,
)
def test_dtype_shape_and_strides(dtype):
    x = torch.zeros(4, 5, 6, dtype=dtype)[:, ::2].mT
    assert _cpp.view(x) == (str(dtype).removeprefix("torch."), (4, 6, 3), (30, 1, 12))
    assert _cpp.view(torch.zeros((), dtype=dtype)) == (str(dtype).removeprefix("torch."), (), ())


@pytest.mark.parametrize("stride", [0, 1, 7, 2**40])
def test_axes_of_size_1_have_the_strides_of_a_contiguous_tensor(stride):
    """PyTorch lets them have any, and a kernel may multiply them."""
    storage = torch.zeros(100)
    assert _cpp.view(storage.as_strided((1, 3, 1, 4, 1), (stride, 8, stride, 2, stride)))[2] == (24, 8, 8, 2, 1)
    assert _cpp.view(storage.as_strided((1, 1, 1), (stride,) * 3))[2] == (1, 1, 1)
    row = storage.as_strided((1, 1, 1, 32), (96, 96, 96, 1), 32)  # the middle third of a row
    assert _cpp.view(row)[2] == (32, 32, 32, 1)


def test_what_is_no_tensor_is_a_type_error():
    for x in (1, [1.0], "tensor", torch.float32, torch.zeros(1, 1, 1, 1, 1, 1, 1), torch.zeros(2, 2).to_sparse()):
        with pytest.raises(TypeError, match="x: torch.Tensor"):
            _cpp.view(x)


def forward(**changed):
    q = torch.zeros(2, 5, 3, 2, 8)
    arguments = {"query": q, "key": q, "value": q, "out": torch.empty_like(q), "lse": torch.empty(2, 5, 3, 2)}
    options = {"left": 1, "right": 1, "scale": 1.0, "offset": 0, "start": 0, "num_threads": 1}
    _cpp.temporal_window_attention_forward(**{**arguments, **options, **changed})


@pytest.mark.parametrize(
    ("name", "x", "error", "message"),
    [
        ("query", torch.zeros(5, 3, 2, 8), ValueError, r"must have 5 axes, got shape \[5, 3, 2, 8\]"),
        (
            "query",
            torch.zeros(2, 5, 3, 2, 8).int(),
            TypeError,
            "must be float64, float32, bfloat16 or float16, got int32",
        ),
        ("query", torch.zeros(2, 5, 3, 2, 8, dtype=torch.complex64), TypeError, "must be float64.*, got other"),
        ("key", torch.zeros(2, 5, 3, 2, 8).double(), TypeError, "must be float32, got float64"),
        ("key", torch.zeros(2, 5, 3, 1, 8), ValueError, r"must have shape \[2, 5, 3, 2, 8\], got \[2, 5, 3, 1, 8\]"),
        ("value", torch.zeros(2, 4, 3, 2, 8), ValueError, r"must have shape \[2, 5, 3, 2, 8\], got \[2, 4, 3, 2, 8\]"),
        ("value", torch.zeros(2, 5, 3, 2, 8, device="meta"), ValueError, "must be on the CPU"),
        ("value", None, TypeError, "must be a tensor, got None"),
        ("out", torch.zeros(2, 5, 3, 2, 16)[..., :8], ValueError, "must be contiguous, got strides"),
        ("lse", torch.zeros(2, 5, 3), ValueError, "must have 4 axes"),
        ("lse", torch.zeros(2, 5, 3, 2).double(), TypeError, "must be float32, got float64"),
    ],
    ids=str,
)
def test_a_wrong_tensor_is_an_error_that_names_the_argument(name, x, error, message):
    forward()
    with pytest.raises(error, match=f"^{name} {message}"):
        forward(**{name: x})


@pytest.mark.parametrize(("name", "number"), [("offset", 1), ("offset", -1), ("start", 5), ("start", -1)])
def test_a_frame_outside_the_keys_is_refused(name, number):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        forward(**{name: number})
