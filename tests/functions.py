"""A small call of every function with operators of its own: what the tests of their common promises run."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import tritonkern
from tritonkern.functional._adapter import adapter_in, adapter_out
from tritonkern.functional._full_attention import full_attention
from tritonkern.ops._dtypes import accumulator
from tritonkern.ops.temporal_adapter.op import hidden_dtype


class Function(NamedTuple):
    call: Callable
    make: Callable[..., dict]
    """Its arguments, with float32 on the CPU, from sizes that all have a default."""
    clip: str
    """Sizes that differ from clip to clip."""
    empty: str
    """Sizes that may be 0."""
    ones: Sequence[dict]
    """Sizes of which some are 1, each of them in turn."""
    many: Sequence[dict]
    """Sizes whose work threads share in different ways."""
    tiny: dict
    """Sizes for finite differences."""


def window(B=2, T=7, N=3, H=2, D=8):
    return {name: torch.randn(B, T, N, H, D) for name in ("query", "key", "value")}


def window_among_more_keys(T=6, before=3, after=2, **sizes):
    tensors = window(T=T, **sizes)
    return tensors | {name: window(T=T + before + after, **sizes)[name] for name in ("key", "value")}


def tracks_and_grid(splat, B=2, T=3, M=6, h=4, w=5, H=2, D=8):
    tracked, gridded = (B, T, M, H, D), (B, T, h, w, H, D)
    query, key = (gridded, tracked) if splat else (tracked, gridded)
    tracks, visibility = torch.rand(B, T, M, 2) * torch.tensor([w, h]), torch.rand(B, T, M) > 0.2
    tensors = dict(query=torch.randn(query), key=torch.randn(key), value=torch.randn(key), tracks=tracks)
    return tensors | dict(sigma=torch.tensor(0.7), visibility=visibility)


def match(B=2, N=3, T=3, h=4, w=5, C=16):
    return dict(query=unit(B, N, C), features=unit(B, T, h, w, C))


def unit(*shape):
    return F.normalize(torch.randn(shape), dim=-1)


def cost(B=2, T=3, h=4, w=5):
    return dict(cost_volume=0.25 * torch.randn(B, T, h, w))


def local(linear, per_frame=False, B=2, T=3, N=5, h=4, w=6, C=8, S=3, radius=1, outputs=7):
    support = torch.randn((B, N, T, S, C) if per_frame else (B, N, S, C))
    coords = torch.rand(B, T, N, 2) * torch.tensor([w + 2.0, h + 2.0]) - 1
    tensors = dict(features=torch.randn(B, T, h, w, C), support=support, coords=coords)
    if linear:
        inputs = (2 * radius + 1) ** 2 * S
        tensors |= dict(weight=torch.randn(outputs, inputs) * inputs**-0.5, bias=torch.randn(outputs))
    return tensors | dict(radius=radius)


def local_pairs(B=2, T=3, N=5, h=4, w=6, C=8, S=3, radius=1, outputs=7, per_frame=False):
    first = local(False, per_frame, B, T, N, h, w, C, S, radius)
    second = local(False, False, B, T, N, 3, 5, 4, 2, radius)
    inputs = (2 * radius + 1) ** 2 * (S + 2)
    tensors = dict(features=first["features"], small=second["features"], support=first["support"])
    tensors |= dict(small_support=second["support"], coords=first["coords"])
    return tensors | dict(weight=torch.randn(outputs, inputs) * inputs**-0.5, bias=torch.randn(outputs), radius=radius)


def costs(features, small, support, small_support, coords, weight, bias, **options):
    pairs = ([features, small], [support, small_support])
    options |= dict(align_corners=True, softmax=True)
    return tritonkern.local_correlation_linear(*pairs, coords, weight, bias, **options)


def mixer(B=2, N=3, T=5, C=24):
    tensors = dict(x=torch.randn(B, N, T, C), norm_weight=torch.randn(C))
    for conv in ("conv1", "conv2"):
        tensors |= {f"{conv}_weight": torch.randn(4 * C, 1, 3), f"{conv}_bias": torch.randn(4 * C)}
    return tensors


def recurrence(B=2, T=5, N=3, H=2, D=5):
    x = dict(x=torch.randn(B, T, N, H * D), conv_weight=torch.randn(4, H * D), conv_bias=torch.randn(H * D))
    for gate in ("input_gate", "decay_gate"):
        x |= {f"{gate}_weight": torch.randn(H, D, D) * D**-0.5, f"{gate}_bias": torch.randn(H, D)}
    return x | dict(decay=torch.randn(H * D) - 2)


def recur(*x, **options):
    """Without the frames of the state after the clip, which are those of x."""
    out, (_, hidden) = tritonkern.gated_linear_recurrence(*x, **options)
    return out, hidden


def full(B=2, L=5, S=7, H=2, D=8):
    return dict(query=torch.randn(B, L, H, D), key=torch.randn(B, S, H, D), value=torch.randn(B, S, H, D))


def tokens_in(B=2, T=2, h=4, w=4, prefix=1, C=8, O=8, pool=2):  # noqa: E741
    tokens = torch.randn(B, T, prefix + h * w, C)
    norm = dict(norm_weight=torch.randn(C), norm_bias=torch.randn(C))
    return dict(tokens=tokens, grid=(h, w), **norm, **conv(O, C), pool=pool)


def tokens_out(B=2, T=2, h=4, w=4, prefix=1, C=8, O=8, pool=2):  # noqa: E741
    hidden = torch.randn(B, T, h * w // pool**2, pool**2 * O)
    return dict(hidden=hidden, grid=(h, w), **conv(C, O), tokens=torch.randn(B, T, prefix + h * w, C), pool=pool)


def conv(outputs, inputs):
    return dict(weight=torch.randn(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5, bias=torch.randn(outputs))


def query_key(located, B=2, T=3, h=3, w=4, H=2, D=8, M=5):
    pair = {name: 2 * torch.randn(B, T, h * w, H, D) for name in ("query", "key")}
    return pair | dict(cells=torch.randint(0, h * w, (B, M))) | (dict(grid=(h, w), radius=1.5) if located else {})


def located(*x, **options):
    """Without the numbers of the cells, which are no floating-point numbers."""
    return tritonkern.query_key_matching(*x, **options)[1:]


partial = functools.partial
WINDOW = Function(
    partial(tritonkern.temporal_window_attention, window=(2, 1)), window, "BT", "BTNH",
    ones=(dict(B=1, N=1, H=1), dict(T=1, N=1)), many=(dict(B=3, T=50, N=5, H=4, D=32),), tiny=dict(N=1, H=1),
)  # fmt: skip
OFFSET = WINDOW._replace(
    call=partial(WINDOW.call, query_offset=3), make=window_among_more_keys, clip="B",
    ones=(dict(B=1, N=1, H=1), dict(T=1, N=1, after=0)), tiny=dict(T=3, N=1, H=1, after=1),
)  # fmt: skip
SAMPLE = Function(
    tritonkern.track_sample_attention, partial(tracks_and_grid, False), "BT", "BTMH",
    ones=(dict(B=1, T=1, M=3, h=1, w=4, H=1), dict(B=1, M=1, h=3, w=1)),
    many=(dict(T=3, M=50, h=12, w=13, D=16), dict(T=40, M=9)), tiny=dict(B=1, T=1, M=4, h=3, w=4, H=1),
)  # fmt: skip
SPLAT = SAMPLE._replace(call=tritonkern.track_splat_attention, make=partial(tracks_and_grid, True))
MATCH = Function(
    partial(tritonkern.correlation_soft_argmax, radius=2.0), match, "NT", "BNT",
    ones=[{axis: 1} for axis in "BNThwC"], many=(dict(N=70, h=20, w=24, C=32), dict(B=1, N=40, T=1, h=64, w=64, C=64)),
    tiny=dict(B=1, N=2, T=2, C=4),
)  # fmt: skip
COST = Function(
    partial(tritonkern.soft_argmax_2d, radius=2.0), cost, "BT", "BT",
    ones=[{axis: 1} for axis in "BThw"], many=(dict(T=100, h=20, w=24),), tiny={},
)  # fmt: skip
LOCAL = Function(
    partial(tritonkern.local_correlation, align_corners=True), partial(local, False), "BTN", "BTN",
    ones=(
        dict(B=1, T=1, N=1, h=1, w=1, C=1, S=1, radius=0, outputs=1),
        dict(B=1, h=1, w=5, C=1, outputs=1, per_frame=True),
        dict(N=1, h=5, w=1, S=1),
        dict(B=1, T=1, S=1, radius=0, C=20),
    ),
    # The first has products that PyTorch splits among threads along the axis of the sums.
    many=(
        dict(B=1, T=2, N=3, S=49, C=256, radius=3, outputs=384),
        dict(B=1, N=37, S=49, C=40, h=11, w=13, radius=3),
    ),
    tiny=dict(B=1, T=2, N=2, h=3, w=4, C=2, S=2, outputs=2),
)  # fmt: skip
LINEAR = partial(tritonkern.local_correlation_linear, align_corners=False, padding="zeros", axis_order="yx")
MIXER = Function(
    tritonkern.temporal_mixer, mixer, "NT", "BNT",
    ones=(dict(B=1, N=1, T=1, C=1), dict(B=1, T=1, C=9), dict(N=1), dict(B=1, N=1, T=4)),
    many=(dict(B=1, N=100, T=40, C=96), dict(B=1, T=70), dict(B=1, N=700, T=3, C=7)), tiny=dict(B=1, N=2, T=4, C=3),
)  # fmt: skip
RECURRENCE = Function(
    recur, recurrence, "TN", "BTN",
    ones=(dict(B=1, T=1, N=1, H=1, D=1), dict(B=1, T=1, D=9), dict(N=1, H=1), dict(B=1, N=1, T=4)),
    many=(dict(B=1, N=100, T=6, H=3, D=16), dict(B=300, N=1, T=2)), tiny=dict(B=1, N=2, T=3, H=1, D=3),
)  # fmt: skip
FULL = Function(
    full_attention, full, "LS", "B", ones=(dict(B=1, L=1, S=1, H=1, D=1), dict(B=1, H=1)),
    many=(dict(B=1, L=1200, S=300, H=1, D=16),), tiny=dict(B=1, L=3, S=4),
)  # fmt: skip
FIRST = Function(
    adapter_in, tokens_in, "BT", "BT", ones=(dict(B=1, T=1, h=2, w=1, prefix=0, C=1, O=1, pool=1),),
    many=(dict(T=3, h=20, w=24, C=64, O=32, pool=4),), tiny=dict(B=1, h=2, w=4, C=3, O=4),
)  # fmt: skip
LOCATED = Function(
    located, partial(query_key, True), "TM", "BTM",
    ones=(dict(B=1, T=2, h=1, w=1, H=1, D=1, M=1), dict(B=1, H=1)), many=(dict(B=1, h=10, w=10, H=3, D=16),),
    tiny=dict(B=1, T=2, h=2, w=3, D=3, M=3),
)  # fmt: skip
FUNCTIONS = {
    "temporal_window_attention": WINDOW,
    "temporal_window_attention-offset": OFFSET,
    "track_attention-sample": SAMPLE,
    "track_attention-splat": SAMPLE._replace(
        call=tritonkern.track_splat_attention, make=partial(tracks_and_grid, True)
    ),
    "correlation_soft_argmax": MATCH,
    "correlation_soft_argmax-cosine": MATCH._replace(call=partial(MATCH.call, cosine=True)),
    "correlation_soft_argmax-2d": COST,
    "local_correlation": LOCAL,
    "local_correlation-linear": LOCAL._replace(call=LINEAR, make=partial(local, True)),
    "local_correlation-softmax": LOCAL._replace(call=costs, make=local_pairs, ones=LOCAL.ones[:2]),
    "temporal_mixer": MIXER,
    "temporal_mixer-causal": MIXER._replace(call=partial(MIXER.call, causal=True)),
    "gated_linear_recurrence": RECURRENCE,
    "full_attention": FULL,
    "temporal_adapter-in": FIRST,
    "temporal_adapter-out": FIRST._replace(call=adapter_out, make=tokens_out),
    "query_key_matching": LOCATED,
    "query_key_matching-cost": LOCATED._replace(call=tritonkern.query_key_cost, make=partial(query_key, False)),
}
"""Names begin with the operation."""
POSITIONS = ("tracks", "sigma", "coords")
"""Arguments that are never in 16 bits."""


def cast(name, x, dtype):
    """A tensor of a call in `dtype`."""
    if not x.is_floating_point():
        return x
    if name in POSITIONS:
        return x.to(accumulator(dtype))
    return x.to(hidden_dtype(x.device, dtype) if name == "hidden" else dtype)


def on(backends, names=FUNCTIONS):
    """`(name, (backend, device))` of every function on every one of the backends of its operation."""
    return [
        pytest.param(name, where.values[0], id=f"{name}-{where.id}", marks=where.marks)
        for name in names
        for where in backends(name.partition("-")[0])
    ]


def prepare(name, where, dtype=torch.float32, **sizes):
    """A call as a function of its tensors alone, and these."""
    (backend, device), function = where, FUNCTIONS[name]
    arguments = function.make(**sizes)
    others = {key: x for key, x in arguments.items() if not isinstance(x, torch.Tensor)}
    tensors = {key: cast(key, x.to(device), dtype) for key, x in arguments.items() if key not in others}
    names = list(tensors)

    def call(*x):
        return function.call(**dict(zip(names, x, strict=True)), **others, backend=backend)

    return call, list(tensors.values())


def outputs(made):
    return [made] if isinstance(made, torch.Tensor) else list(made)


def results(call, tensors, wanted=None):
    """Outputs and gradients, for cotangents that depend on the shapes alone; None where one does not exist or is not
    `wanted`."""
    wanted = [x.is_floating_point() and (wanted is None or wanted[at]) for at, x in enumerate(tensors)]
    leaves = [x.detach().requires_grad_(want) for x, want in zip(tensors, wanted, strict=True)]
    made = outputs(call(*leaves))
    assert all(x.requires_grad == any(wanted) for x in made)
    cotangents = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(at), dtype=torch.float64).to(x)
        for at, x in enumerate(made)
    ]
    some = [leaf for leaf in leaves if leaf.requires_grad]
    grads = iter(torch.autograd.grad(made, some, cotangents, allow_unused=True, materialize_grads=True) if some else ())
    return [*(x.detach() for x in made), *(next(grads) if want else None for want in wanted)]


def same(found, expected):
    """Whether all results are equal to the bit; those that do not exist are skipped."""
    pairs = zip(found, expected, strict=True)
    return all(x is None or y is None or torch.equal(x, y) for x, y in pairs)
