"""Query-key matching and the operations beside it in graphs of inductor and in exported programs."""

import pytest
import torch
from oracle import fast_backends

from tritonkern import attention_row_statistics, frame_local_attention, query_key_matching
from tritonkern.ops.query_key_matching import op


@pytest.fixture(params=fast_backends(op.NAME))
def where(request):
    return request.param


def match(query, key, cells, backend=None):
    found = query_key_matching(query, key, grid=(3, 4), cells=cells, radius=1.5, backend=backend)
    return found.index, found.peak, found.points


def rows_and_frames(rows, key, backend=None):
    statistics = attention_row_statistics(rows, key, [(0, 4), (2, 16)], backend=backend)
    options = dict(text=4, frames=3, renormalise=False, backend=backend)
    return *statistics, frame_local_attention(key, key + 1, key - 1, **options)


def matching_inputs(device="cpu", batch=2, frames=3):
    query, key = torch.randn(2, batch, frames, 12, 2, 8, device=device).unbind(0)
    return query, key, torch.randint(0, 12, (batch, 5), device=device)


@pytest.mark.slow
def test_compiled_by_inductor(where):
    backend, device = where
    query, key, cells = matching_inputs(device)

    def loss(query, key):
        _, peak, points = match(2 * query, key, cells, backend)
        return (peak.square().sum() + points.sin().sum(),)

    def results(function):
        leaves = [x.clone().requires_grad_() for x in (query, key)]
        (total,) = function(*leaves)
        return [total.detach(), *torch.autograd.grad(total, leaves)]

    torch._dynamo.reset()
    for actual, expected in zip(results(torch.compile(loss, fullgraph=True)), results(loss), strict=True):
        torch.testing.assert_close(actual, expected)
    rows, key = torch.randn(2, 5, 2, 8, device=device), torch.randn(2, 16, 2, 8, device=device)
    with torch.no_grad():
        compiled = torch.compile(rows_and_frames, fullgraph=True)(rows, key, backend)
        for actual, expected in zip(compiled, rows_and_frames(rows, key, backend), strict=True):
            torch.testing.assert_close(actual, expected)


def test_exported(where, tmp_path):
    backend, device = where

    class Match(torch.nn.Module):
        def forward(self, query, key, cells):
            return match(query, key, cells, backend)

    class Rows(torch.nn.Module):
        def forward(self, rows, key):
            return rows_and_frames(rows, key, backend)

    batch, frames, count = (torch.export.Dim(name) for name in ("batch", "frames", "count"))
    program = torch.export.export(
        Match(),
        matching_inputs(device),
        dynamic_shapes=[{0: batch, 1: frames}, {0: batch, 1: frames}, {0: batch}],
    )
    torch.export.save(program, tmp_path / "match.pt2")
    other = matching_inputs(device, 3, 5)
    for actual, expected in zip(
        torch.export.load(tmp_path / "match.pt2").module()(*other), match(*other, backend), strict=True
    ):
        assert torch.equal(actual, expected)
    rows, key = torch.randn(2, 5, 2, 8, device=device), torch.randn(2, 16, 2, 8, device=device)
    program = torch.export.export(Rows(), (rows, key), dynamic_shapes=[{0: batch, 1: count}, {0: batch}])
    rows, key = torch.randn(3, 7, 2, 8, device=device), torch.randn(3, 16, 2, 8, device=device)
    for actual, expected in zip(program.module()(rows, key), rows_and_frames(rows, key, backend), strict=True):
        assert torch.equal(actual, expected)
