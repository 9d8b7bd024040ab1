"""Tensors of a wrong kind in every argument of every function and layer: errors that name the argument."""

import functools
import traceback

import pytest
import torch
import torch.nn.functional as F

import tritonkern
from tritonkern.functional._adapter import adapter_in, adapter_out
from tritonkern.functional._full_attention import full_attention
from tritonkern.models import DINOv2, LocoTrackRefiner, insert_tracktention
from tritonkern.models.dinov2 import DINOv2Config
from tritonkern.models.matching import MatchingTracker
from tritonkern.nn import CorrelationSoftArgmax, TemporalAdapter, TemporalWindowAttention, Tracktention

x5 = torch.randn(1, 2, 3, 2, 8)
grid = torch.randn(1, 2, 3, 4, 2, 8)
points = torch.rand(1, 2, 5, 2)
seen = torch.ones(1, 2, 5, dtype=torch.bool)
tracked = torch.randn(1, 2, 5, 2, 8)
features, support = torch.randn(1, 2, 4, 4, 8), torch.randn(1, 5, 3, 8)
cells = torch.randn(1, 2, 6, 2, 8)
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


# Name -> (what is called, its tensors, its other arguments)
CALLS = {
    "temporal_window_attention": (
        tritonkern.temporal_window_attention,
        dict(query=x5, key=x5, value=x5),
        dict(window=3),
    ),
    "track_sample_attention": (
        tritonkern.track_sample_attention,
        dict(query=tracked, key=grid, value=grid, tracks=points, sigma=torch.ones(()), visibility=seen),
        {},
    ),
    "track_splat_attention": (
        tritonkern.track_splat_attention,
        dict(query=grid, key=tracked, value=tracked, tracks=points, sigma=torch.ones(()), visibility=seen),
        {},
    ),
    "correlation_soft_argmax": (
        tritonkern.correlation_soft_argmax,
        dict(query=torch.randn(1, 5, 8), features=features),
        {},
    ),
    "soft_argmax_2d": (tritonkern.soft_argmax_2d, dict(cost_volume=torch.randn(3, 4)), {}),
    "local_correlation": (
        tritonkern.local_correlation,
        dict(features=features, support=support, coords=points),
        dict(radius=1, align_corners=True),
    ),
    "local_correlation_linear": (
        tritonkern.local_correlation_linear,
        dict(features=features, support=support, coords=points, weight=torch.randn(4, 27), bias=torch.randn(4)),
        dict(radius=1, align_corners=True),
    ),
    "correlation_pyramid": (
        tritonkern.correlation_pyramid,
        dict(features=features[:, 0], targets=features, flow=torch.randn(1, 2, 4, 4, 2)),
        dict(levels=2, radius=1),
    ),
    "temporal_mixer": (
        tritonkern.temporal_mixer,
        dict(
            x=torch.randn(2, 3, 8),
            norm_weight=torch.ones(8),
            conv1_weight=torch.randn(32, 1, 3),
            conv1_bias=torch.randn(32),
            conv2_weight=torch.randn(32, 1, 3),
            conv2_bias=torch.randn(32),
        ),
        {},
    ),
    "adapter_in": (
        adapter_in,
        dict(
            tokens=torch.randn(1, 2, 4, 8),
            norm_weight=torch.ones(8),
            norm_bias=torch.ones(8),
            weight=torch.randn(4, 8, 3, 3),
            bias=torch.randn(4),
        ),
        dict(grid=(2, 2)),
    ),
    "adapter_out": (
        adapter_out,
        dict(
            hidden=torch.randn(1, 2, 4, 4),
            weight=torch.randn(8, 4, 3, 3),
            bias=torch.randn(8),
            tokens=torch.randn(1, 2, 4, 8),
        ),
        dict(grid=(2, 2)),
    ),
    "query_key_matching": (
        tritonkern.query_key_matching,
        dict(query=cells, key=cells, cells=torch.tensor([[0, 5]])),
        dict(grid=(2, 3)),
    ),
    "query_key_cost": (
        tritonkern.query_key_cost,
        dict(query=cells, key=cells, cells=torch.tensor([[0, 5]])),
        {},
    ),
    "attention_row_statistics": (
        tritonkern.attention_row_statistics,
        dict(rows=x5[0], key=x5[0], mask=torch.ones(2, 3, dtype=torch.bool)),
        dict(segments=[(0, 2)]),
    ),
    "frame_local_attention": (
        tritonkern.frame_local_attention,
        dict(query=x5[0], key=x5[0], value=x5[0]),
        dict(text=1, frames=2, renormalise=True),
    ),
    "full_attention": (full_attention, dict(query=x5[0], key=x5[0], value=x5[0]), {}),
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
        dict(features=F.normalize(features, dim=-1), queries=queries),
        {},
    ),
    "MatchingTracker": (Tracker(), dict(video=torch.rand(1, 2, 16, 16, 3), queries=queries), {}),
    "LocoTrackRefiner.refine": (refine, dict(features=F.normalize(features, dim=-1), queries=queries), {}),
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
    "no dimension more": lambda x: x[0] if x.ndim else x[None],
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
        if name == "soft_argmax_2d" and kind in ("meta", "other device"):
            continue  # its only tensor
        if kind == "None" and (argument in OPTIONAL or name == "adapter_out" and argument == "tokens"):
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
