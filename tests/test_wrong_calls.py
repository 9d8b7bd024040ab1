"""Tensors of a wrong kind in every argument of every function and layer: errors that name the argument."""

import functools
import traceback

import pytest
import torch
import torch.nn.functional as F
from functions import FUNCTIONS

import tritonkern
from tritonkern.models import DINOv2, LocoTrackRefiner, insert_tracktention
from tritonkern.models.dinov2 import DINOv2Config
from tritonkern.models.matching import MatchingTracker
from tritonkern.nn import CorrelationSoftArgmax, TemporalAdapter, TemporalWindowAttention, Tracktention

features = F.normalize(torch.randn(1, 2, 4, 4, 8), dim=-1)
points, seen = torch.rand(1, 2, 5, 2), torch.ones(1, 2, 5, dtype=torch.bool)
rows = torch.randn(2, 3, 2, 8)
queries = torch.tensor([[[0.0, 5.0, 6.0], [1.0, 2.0, 3.0]]])


class Tracker(MatchingTracker):
    resolution = (16, 16)

    def features(self, video):
        return F.normalize(F.avg_pool2d(video.flatten(0, 1).movedim(-1, 1), 4).movedim(1, -1), dim=-1)[None]


@functools.cache
def refiner():
    return LocoTrackRefiner("small", steps=0)


def refine(features, queries):
    return refiner().refine([features] * 3, queries)


def call_of(function):
    arguments = function.make()
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    return function.call, tensors, {name: x for name, x in arguments.items() if name not in tensors}


# Name -> (what is called, its tensors, its other arguments)
CALLS = {name: call_of(function) for name, function in FUNCTIONS.items()} | {
    "correlation_pyramid": (
        tritonkern.correlation_pyramid,
        dict(features=features[:, 0], targets=features, flow=torch.randn(1, 2, 4, 4, 2)),
        dict(levels=2, radius=1),
    ),
    "attention_row_statistics": (
        tritonkern.attention_row_statistics,
        dict(rows=rows, key=rows, mask=torch.ones(2, 3, dtype=torch.bool)),
        dict(segments=[(0, 2)]),
    ),
    "frame_local_attention": (
        tritonkern.frame_local_attention,
        dict(query=rows, key=rows, value=rows),
        dict(text=1, frames=2, renormalise=True),
    ),
    "TemporalWindowAttention": (TemporalWindowAttention(32, 4), dict(x=torch.randn(1, 3, 32)), {}),
    "TemporalAdapter": (TemporalAdapter(8, hidden=32, pool=2), dict(tokens=torch.randn(1, 2, 4, 4, 8)), {}),
    "TemporalAdapter.add_to": (
        TemporalAdapter(8, hidden=32, pool=2).add_to,
        dict(tokens=torch.randn(1, 2, 5, 8)),
        dict(grid=(2, 2)),
    ),
    "Tracktention": (
        Tracktention(16, 2, depth=1),
        dict(features=torch.randn(1, 2, 3, 4, 16), tracks=points, visibility=seen),
        {},
    ),
    "CorrelationSoftArgmax": (
        CorrelationSoftArgmax((16, 16)),
        dict(features=features, queries=queries),
        {},
    ),
    "MatchingTracker": (Tracker(), dict(video=torch.rand(1, 2, 16, 16, 3), queries=queries), {}),
    "LocoTrackRefiner.refine": (refine, dict(features=features, queries=queries), {}),
    "DINOv2": (DINOv2(DINOv2Config(64, 1, 1, grid=2)), dict(images=torch.randn(2, 3, 28, 28)), {}),
    "TracktentionModel": (
        insert_tracktention(DINOv2(DINOv2Config(64, 1, 1, grid=2)), [0], 64, num_heads=2, depth=1),
        dict(video=torch.randn(1, 2, 3, 28, 28), tracks=points * 28, visibility=seen),
        {},
    ),
}
OPTIONAL = {"visibility", "bias", "cells", "mask"}
KINDS = {
    "None": lambda x: None,
    "list": lambda x: x.tolist(),
    "NumPy": lambda x: x.numpy(),
    "0-d": lambda x: x.flatten()[0],
    "too few dimensions": lambda x: x[(0,) * max(x.ndim - 1, 1)] if x.ndim else x[None],
    "nested": lambda x: torch.nested.as_nested_tensor([torch.randn(2, 8), torch.randn(3, 8)]),
    "jagged": lambda x: torch.nested.as_nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged),
    "sparse": lambda x: x.to_sparse(),
    "integer": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "meta": lambda x: x.to("meta"),
    "other device": lambda x: x.to("cuda" if torch.cuda.is_available() else "meta"),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_wrong_tensors(name, kind):
    function, tensors, options = CALLS[name]
    faults = []
    for argument, x in tensors.items():
        if name == "correlation_soft_argmax-2d" and kind in ("meta", "other device"):
            continue  # its only tensor
        if kind == "None" and (argument in OPTIONAL or name == "temporal_adapter-out" and argument == "tokens"):
            continue
        if kind == "bool" and argument in ("visibility", "mask") or kind == "integer" and argument == "cells":
            continue
        if argument == "sigma" and kind in ("list", "NumPy", "0-d", "None"):
            continue
        try:
            wrong = KINDS[kind](x)
        except RuntimeError:  # a mask that cannot be of this kind
            continue
        try:
            function(**{**tensors, argument: wrong}, **options)
            faults.append(f"{argument}: accepted")
        except (TypeError, ValueError) as error:
            where = traceback.extract_tb(error.__traceback__)[-1].filename
            # Where shapes, dtypes or devices do not fit together, one of the others may be named.
            if not any(other in str(error) for other in (*tensors, "images")) or "tritonkern" not in where:
                faults.append(f"{argument}: {type(error).__name__}: {str(error)[:200]} ({where})")
        except Exception as error:
            faults.append(f"{argument}: {type(error).__name__}: {str(error)[:200]}")
    assert not faults, "\n".join(faults)


def test_the_right_calls():
    for function, tensors, options in CALLS.values():
        function(**tensors, **options)
