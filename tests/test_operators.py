"""Operators among PyTorch's tools: opcheck, compile, export, autocast, checkpointing, DDP, threads, bad arguments."""

import contextlib

import pytest
import torch
from oracle import fast_backends, gradients, random_inputs, run_python
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tritonkern
from tritonkern import temporal_window_attention
from tritonkern.ops import _registry
from tritonkern.ops.temporal_adapter import op as adapter_op
from tritonkern.ops.temporal_window_attention import op

FWD, BWD = op.temporal_window_attention_fwd, op.temporal_window_attention_bwd

LAYOUTS = {
    "contiguous": lambda *shape: torch.randn(shape),
    "transposed": lambda b, t, n, h, d: torch.randn(b, n, h, t, d).permute(0, 3, 1, 2, 4),
    "sliced": lambda b, t, n, h, d: torch.randn(b, 2 * t, n, h, d + 8)[:, ::2, ..., 3 : d + 3],
    "expanded": lambda b, t, n, h, d: torch.randn(b, t, 1, h, d).expand(b, t, n, h, d),
    "empty": lambda b, t, n, h, d: torch.randn(b, 0, n, h, d),
}


@pytest.fixture(params=fast_backends(op.NAME))
def where(request):
    return request.param


@pytest.fixture(params=LAYOUTS)
def inputs(request, where):
    with torch.device(where[1]):
        return [LAYOUTS[request.param](2, 7, 3, 2, 8) for _ in range(3)]


def test_forward_mode_is_refused_not_silently_zero():
    x = torch.randn(1, 5, 2, 8)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: temporal_window_attention(q, q, q, 3), (x,), (x,))


def test_schemas_follow_the_declared_functions():
    assert str(FWD._schema) == (
        "tritonkern::temporal_window_attention_fwd(Tensor query, Tensor key, Tensor value, SymInt left, SymInt right,"
        " float scale, str? backend=None) -> (Tensor, Tensor)"
    )
    # Fields of named tuples are arguments of their own.
    assert str(adapter_op.adapter_out_fwd._schema) == (
        "tritonkern::adapter_out_fwd(Tensor hidden, Tensor conv_weight, Tensor? conv_bias, Tensor? tokens,"
        " SymInt grid_rows, SymInt grid_columns, SymInt grid_pool, ScalarType dtype, str? backend=None) -> Tensor"
    )


def test_opcheck(where, inputs):
    options = (2, 1, 0.3, where[0])
    out, lse = FWD(*inputs, *options)
    torch.library.opcheck(BWD, (torch.randn_like(out), *inputs, out, lse, *options))
    torch.library.opcheck(FWD, (*(x.requires_grad_() for x in inputs), *options))


def test_fake_outputs_are_contiguous_like_real_ones(where, inputs):
    out, lse = FWD(*inputs, 2, 1, 0.3, where[0])
    grads = BWD(out, *inputs, out, lse, 2, 1, 0.3, where[0])
    meta = [x.to("meta") for x in inputs]
    fake_out, fake_lse = FWD(*meta, 2, 1, 0.3)
    fakes = BWD(fake_out, *meta, fake_out, fake_lse, 2, 1, 0.3)
    for real, fake in zip((out, lse, *grads), (fake_out, fake_lse, *fakes), strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


def test_compiled_as_one_graph(where, inputs):
    def attend(*x):
        return temporal_window_attention(*x, (2, 1), backend=where[0]) * 2

    grad_out = torch.randn(inputs[0].shape, device=where[1])
    torch._dynamo.reset()  # every layout is compiled again, and the limit on that is eight
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        gradients(compiled, inputs, grad_out), gradients(attend, inputs, grad_out), strict=True
    ):
        assert torch.equal(actual, expected)


def test_compiled_by_inductor(where):
    *inputs, grad_out = random_inputs(2, 9, 2, 8, device=where[1])
    compiled = torch.compile(lambda *x: temporal_window_attention(*x, 5, backend=where[0]) + x[0], fullgraph=True)
    expected = gradients(lambda *x: temporal_window_attention(*x, 5, backend=where[0]) + x[0], inputs, grad_out)
    for actual, plain in zip(gradients(compiled, inputs, grad_out), expected, strict=True):
        torch.testing.assert_close(actual, plain)


def test_other_clip_lengths_do_not_recompile():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(temporal_window_attention, fullgraph=True, backend=counter)
    for frames in (5, 7, 9, 30, 31):
        x = torch.randn(2, frames, 2, 8)
        compiled(x, x, x)
    assert counter.frame_count <= 2  # the static shape first, then every other length


def test_exported_program_takes_any_clip(where, tmp_path):
    class Attend(torch.nn.Module):
        def forward(self, query, key, value):
            return temporal_window_attention(query, key, value, 5, backend=where[0])

    inputs = random_inputs(2, 9, 2, 8, device=where[1])[:3]
    batch, frames = torch.export.Dim("batch"), torch.export.Dim("frames")
    program = torch.export.export(Attend(), tuple(inputs), dynamic_shapes=[{0: batch, 1: frames}] * 3)
    torch.export.save(program, tmp_path / "attend.pt2")
    loaded = torch.export.load(tmp_path / "attend.pt2").module()
    inputs = random_inputs(3, 20, 2, 8, device=where[1])[:3]
    assert torch.equal(loaded(*inputs), Attend()(*inputs))


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


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(where, use_reentrant):
    tensors = random_inputs(2, 9, 2, 8, device=where[1])

    def run(wrap):
        *leaves, grad_out = (x.detach().clone() for x in tensors)
        out = wrap(*(x.requires_grad_() for x in leaves))
        out.backward(grad_out)  # reentrant checkpoints refuse torch.autograd.grad
        return [out, *(x.grad for x in leaves)]

    def attend(*x):
        return temporal_window_attention(*x, 5, backend=where[0])

    saved = run(lambda *x: checkpoint(attend, *x, use_reentrant=use_reentrant))
    for actual, expected in zip(saved, run(attend), strict=True):
        assert torch.equal(actual, expected)


def test_a_dispatch_mode_sees_one_operator(where):
    class Counter(TorchDispatchMode):
        seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(function)
            return function(*args, **(kwargs or {}))

    query = torch.randn(1, 9, 3, 2, 8, device=where[1], requires_grad=True)
    with Counter() as counter:
        temporal_window_attention(query, query, query, backend=where[0]).sum().backward()
    ours = [function for function in counter.seen if function.namespace == "tritonkern"]
    assert ours == [FWD, BWD]


@pytest.mark.parametrize("backend", [p for p in fast_backends(op.NAME) if p.values[0][0] == "cpp"])
def test_set_num_threads_is_obeyed(backend):
    output = run_python(
        """
        import os, torch, tritonkern
        def threads_after(count):
            torch.set_num_threads(count)
            x = torch.randn(4, 64, 16, 4, 32)
            before = len(os.listdir("/proc/self/task"))
            tritonkern.temporal_window_attention(x, x, x, backend="cpp")
            return len(os.listdir("/proc/self/task")) - before
        torch.set_num_threads(1); torch.randn(4, 64, 16, 4, 32)
        print(threads_after(1), threads_after(3))
        """,
        OMP_NUM_THREADS="1",
    )
    assert output.split() == ["0", "2"]


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
            {"key": GOOD[:, :4]},
            ValueError,
            r"the shape of query, \(2, 5, 3, 2, 8\), got \(2, 4, 3, 2, 8\)",
        ),
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


def test_direct_calls_of_the_operators_are_checked():
    """Kernels take raw pointers, so whoever calls `torch.ops` must not get past the checks either."""
    out, lse = FWD(GOOD, GOOD, GOOD, 1, 1, 0.3)
    with pytest.raises(ValueError, match="use unsqueeze"):
        FWD(GOOD[0], GOOD[0], GOOD[0], 1, 1, 0.3)
    with pytest.raises(ValueError, match="left count"):
        FWD(GOOD, GOOD, GOOD, -1, 1, 0.3)
    for bad in (
        (out[:1], GOOD, GOOD, GOOD, out, lse),
        (out, GOOD, GOOD, GOOD, out[:1], lse),
        (out, GOOD, GOOD, GOOD, out, lse.double()),
        (out, GOOD, GOOD[:1], GOOD, out, lse),
    ):
        with pytest.raises(ValueError):
            BWD(*bad, 1, 1, 0.3)


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
