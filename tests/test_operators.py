"""Operators: schemas, autocast, DDP, devices, bad arguments. What holds for every function: test_contracts.py."""

import contextlib

import pytest
import torch
from oracle import fast_backends, random_inputs

import tritonkern
from tritonkern import temporal_window_attention
from tritonkern.ops import _registry
from tritonkern.ops.temporal_adapter import op as adapter_op
from tritonkern.ops.temporal_window_attention import op

FWD, BWD = op.temporal_window_attention_fwd, op.temporal_window_attention_bwd


@pytest.fixture(params=fast_backends(op.NAME))
def where(request):
    return request.param


def test_schemas_follow_the_declared_functions():
    assert str(FWD._schema) == (
        "tritonkern::temporal_window_attention_fwd(Tensor query, Tensor key, Tensor value, SymInt left, SymInt right,"
        " float scale, SymInt query_offset, SymInt start, str? backend=None) -> (Tensor, Tensor)"
    )
    # Fields of named tuples are arguments of their own.
    assert str(adapter_op.adapter_out_fwd._schema) == (
        "tritonkern::adapter_out_fwd(Tensor hidden, Tensor conv_weight, Tensor? conv_bias, Tensor? tokens,"
        " SymInt grid_rows, SymInt grid_columns, SymInt grid_pool, ScalarType dtype, str? backend=None) -> Tensor"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_follows_scaled_dot_product_attention(where, dtype):
    backend, device = where
    query, key, value, _ = random_inputs(1, 9, 2, 8, device=device)
    value = value.to(dtype).requires_grad_()  # as a Linear gives it; a LayerNorm gives float32
    query.requires_grad_()
    with torch.autocast(device, dtype=dtype):
        out = temporal_window_attention(query, key, value, backend=backend)
        twin = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        doubles = [x.double() for x in (query, key, value)]
        assert temporal_window_attention(*doubles, backend=backend).dtype == torch.float64
    assert out.dtype == twin.dtype == dtype
    assert torch.equal(out, temporal_window_attention(query.to(dtype), key.to(dtype), value, backend=backend))
    out.sum().backward()
    assert (query.grad.dtype, value.grad.dtype) == (torch.float32, dtype)
    with pytest.raises(TypeError, match="value must have the dtype"):
        temporal_window_attention(query, key, value, backend=backend)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_distributed_data_parallel(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        layer = tritonkern.TemporalWindowAttention(32, num_heads=4)
        x = torch.randn(2, 9, 32)
        layer(x).square().sum().backward()
        expected = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        torch.nn.parallel.DistributedDataParallel(layer)(x).square().sum().backward()
        for parameter, grad in zip(layer.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
    finally:
        torch.distributed.destroy_process_group()


GOOD = torch.randn(2, 5, 3, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
        ({"key": GOOD.int()}, TypeError, "key must be float64, .* got torch.int32"),
        ({"value": GOOD.double()}, TypeError, "value must have the dtype of query"),
        ({"value": GOOD.to_sparse()}, TypeError, "value must be a dense"),
        ({"value": GOOD.to("meta")}, ValueError, "value must be on the device of query, cpu, got meta"),
        (
            {"key": GOOD[:, :, :2]},
            ValueError,
            r"key must have the shape of query, \(2, 5, 3, 2, 8\), but for the number of frames, got \(2, 5, 2, 2, 8\)",
        ),
        (
            {"value": GOOD[:, :4]},
            ValueError,
            r"value must have the shape of key, .* got \(2, 4, 3, 2, 8\)",
        ),
        (dict.fromkeys(("key", "value"), GOOD[:, :4]), ValueError, r"key must have at least .* = 0 \+ 5 frames, got 4"),
        ({"query_offset": 1}, ValueError, r"key must have at least query_offset \+ T = 1 \+ 5 frames, got 5"),
        ({"query_offset": -1}, ValueError, r"query_offset must be from 0 to 2\*\*30, got -1"),
        ({"query_offset": 1.0}, TypeError, "query_offset must be an int, got float"),
        ({"start": 5}, ValueError, "start must be a row of key, from 0 to 4, got 5"),
        ({"start": -1}, ValueError, "start must be a row of key, from 0 to 4, got -1"),
        ({"start": True}, TypeError, "start must be an int, got bool"),
        ({"query": GOOD[0, 0]}, ValueError, "query must have shape"),
        (dict.fromkeys(("query", "key", "value"), GOOD[..., :4]), ValueError, "multiple of 8 from 8 to 256, got 4"),
        (dict.fromkeys(("query", "key", "value"), GOOD[..., :0]), ValueError, "multiple of 8 from 8 to 256, got 0"),
        (dict.fromkeys(("query", "key", "value"), GOOD.repeat(1, 1, 1, 1, 33)), ValueError, "got 264"),
        ({"window": 12}, ValueError, "window must be an odd number of frames.* got 12"),
        ({"window": -1}, ValueError, "window must be an odd"),
        ({"window": (1, -2)}, ValueError, "window must have a right count from 0"),
        ({"window": (2**31, 0)}, ValueError, "window must have a left count from 0"),
        ({"window": 13.0}, TypeError, "window must be an odd int or a pair"),
        ({"window": True}, TypeError, "window must be an odd int or a pair"),
        ({"window": (1, 2, 3)}, TypeError, "window must be an odd int or a pair"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        ({"scale": torch.tensor(1.0)}, TypeError, "scale must be a number"),
        ({"backend": "cuda"}, ValueError, "backend must be one of cpp, triton, reference or None, got 'cuda'"),
        ({"backend": 1}, TypeError, "backend must be a string"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        temporal_window_attention(**{"query": GOOD, "key": GOOD, "value": GOOD, **arguments})


def test_uninitialised_memory_is_poisoned_in_every_test():
    assert torch.empty(100).isnan().all() and torch.empty_like(GOOD).isnan().all()


def test_operators_run_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device: on a GPU every operator makes that of its tensors the current one."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tritonkern::")]
    assert len(names) > 10
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
    made_current, x = [], torch.ones(2)
    device = lambda device: made_current.append(device) or contextlib.nullcontext()  # noqa: E731
    monkeypatch.setattr(torch.cuda, "device", device)
    run = _registry._on_its_device(lambda scale, x: scale * x, 1)
    for current in (0, None):  # a tensor on a CPU is on the device of number None
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        assert run(3, x).tolist() == [3, 3]
    assert made_current == [x.device]
