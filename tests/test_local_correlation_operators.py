"""Bad arguments of local correlation, and of its binding."""

import pytest
import torch
from functions import local

from tritonkern import local_correlation, local_correlation_linear

FEATURES, SUPPORT, COORDS, WEIGHT, BIAS, _ = local(linear=True).values()
OWN = local(linear=False, per_frame=True)["support"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"support": SUPPORT.double()}, TypeError, "support must have the dtype of features"),
        ({"features": FEATURES[0]}, ValueError, r"features must have shape \[B, T, h, w, C\]"),
        ({"support": SUPPORT[0]}, ValueError, r"support must have shape \[B, N, S, C\] or"),
        ({"features": FEATURES[:, :, :0]}, ValueError, "features must have at least one cell"),
        ({"support": SUPPORT[:, :, :0]}, ValueError, "support must have at least one vector"),
        ({"support": SUPPORT[:1]}, ValueError, "support must have B and C of features"),
        ({"support": SUPPORT[..., :4]}, ValueError, "support must have B and C of features"),
        ({"support": OWN[:, :, :2]}, ValueError, "support must have T of features, 3, on axis 2"),
        ({"coords": COORDS[..., :1]}, ValueError, r"coords must have shape \(2, 3, 5, 2\)"),
        ({"coords": COORDS.transpose(1, 2)}, ValueError, r"coords must have shape \(2, 3, 5, 2\)"),
        ({"radius": -1}, ValueError, "radius must be from 0 to 15, got -1"),
        ({"radius": 16}, ValueError, "radius must be from 0 to 15, got 16"),
        ({"radius": 1.0}, TypeError, "radius must be an int, got float"),
        ({"radius": True}, TypeError, "radius must be an int, got bool"),
        ({"padding": "reflection"}, ValueError, "padding must be 'border' or 'zeros', got 'reflection'"),
        ({"axis_order": "xyz"}, ValueError, "axis_order must be 'xy' or 'yx', got 'xyz'"),
        ({"align_corners": None}, TypeError, "align_corners must be a bool, got NoneType"),
        ({"backend": "cuda"}, ValueError, "backend must be one of cpp, triton, reference or None"),
        ({"weight": WEIGHT[:, 1:]}, ValueError, r"weight must have \(2 radius \+ 1\)\^2 S = 9 x 3 = 27 columns"),
        ({"weight": BIAS}, ValueError, "weight must have 2 axes"),
        ({"weight": WEIGHT.double()}, TypeError, "weight must have the dtype of features"),
        ({"bias": BIAS[1:]}, ValueError, r"bias must have shape \(7,\), as weight has rows, got \(6,\)"),
        ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor"),
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


def test_the_binding_names_the_argument():
    _cpp = pytest.importorskip("tritonkern._cpp", exc_type=ImportError)
    tensors = dict(features=FEATURES, support=SUPPORT, position=COORDS, out=FEATURES.new_empty(2, 3, 5, 27))
    options = dict(radius=1, zeros=False, y_first=True, scale=0.0, num_threads=1)
    _cpp.local_correlation_forward(**tensors, **options)
    for name, bad, error in (
        ("features", FEATURES.int(), TypeError),
        ("support", SUPPORT[..., 1:], ValueError),
        ("position", COORDS.double(), TypeError),
        ("out", tensors["out"][..., 1:], ValueError),
        ("out", tensors["out"].mT.contiguous().mT, ValueError),
        ("radius", 16, ValueError),
        ("scale", -1.0, ValueError),
        ("scale", float("nan"), ValueError),
    ):
        with pytest.raises(error, match=name):
            _cpp.local_correlation_forward(**{**tensors, **options, name: bad})
    weights = torch.zeros(2, 27)
    _cpp.local_correlation_softmax_backward(weights, 9, 0.5, 1, weights.clone())
    for arguments, error, name in (
        ((weights, 9, 0.5, 1, weights[1:]), ValueError, "grad"),
        ((weights, 9, 0.5, 1, weights.double()), TypeError, "grad"),
        ((weights.half(), 9, 0.5, 1, weights.half()), TypeError, "weights"),
        ((weights, 9, 0.5, 1, weights.T.contiguous().T), ValueError, "grad"),
        ((weights, 2, 0.5, 1, weights), ValueError, "samples"),
    ):
        with pytest.raises(error, match=name):
            _cpp.local_correlation_softmax_backward(*arguments)
    left, right, out = torch.zeros(3, 4), torch.zeros(4, 5), torch.zeros(3, 5)
    _cpp.local_correlation_multiply(left, right, False, 1, out)
    for arguments, name in (((left[:, 1:], right, out), "right"), ((left, right, out[1:]), "out")):
        with pytest.raises(ValueError, match=name):
            _cpp.local_correlation_multiply(*arguments[:2], False, 1, arguments[2])
